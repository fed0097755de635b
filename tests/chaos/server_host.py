"""A server that dies in many ways and is restarted each time, on the same port with the same data."""

import json
import random
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from time import monotonic, sleep

import faults
from scenarios import Plan
from supervisor import Event, Supervisor

_PORTS = 20_000, 32_000
"""Below the range of ephemeral ports: no connection may take the port of a server that is down."""

_SNAPSHOT_UPDATES = 5, 20
"""Range of the number of updates between two snapshots."""

_MOST_FAILURES = 3
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01


class GoneError(Exception):
    """The server cannot start any more."""


class ServerHost:
    """Starts the server, injects faults into it, and restarts it.

    Args:
        plan: The run's plan.
        note: Called with the name of each fault when it happens.

    Attributes:
        target: HOST:PORT of the server.
        log: Path of the server's log.
        problems: Descriptions of what went wrong.
        gone: Why the server cannot start any more; None while it can.
    """

    def __init__(self, plan: Plan, note: Callable[[str], None]) -> None:
        self._plan = plan
        self._note = note
        self._random = random.Random(f"host {plan.seed}")
        scenario = plan.scenario
        self._deaths = faults.Deaths(self._random, scenario.durability, plan.first)
        self._port = free_port()
        self.target = f"127.0.0.1:{self._port}"
        self.log = plan.folder / "server.log"
        self.problems: list[str] = []
        self.gone: str | None = None
        self._faulty = True
        self._failures = 0
        self._pid: int | None = None
        self._resume: float | None = None
        self._kill: float | None = None
        self._supervisor = Supervisor("server_program", plan.folder / "server.err")
        self._start()

    def close(self) -> None:
        self._supervisor.close()

    def strike(self, kind: str) -> None:
        """Injects one fault of `faults.SIGNALS` or `faults.DEATHS`, if the server runs."""
        if self._pid is None or self._kill is not None:
            return
        if kind == "stop server":
            if self._resume is None:
                self._note(f"signal {kind}")
                self._supervisor.signal(self._pid, signal.SIGSTOP)
                self._resume = monotonic() + self._random.uniform(0.02, 0.4)
            return
        self._note(f"signal {kind}")
        self._end(signal.SIGKILL if kind == "kill server" else signal.SIGTERM)

    def tend(self) -> None:
        """Restarts the server if it has ended, and continues it if its stop is over.

        Raises:
            GoneError: The server cannot start any more.
        """
        with suppress(Empty):
            while True:
                self._handle(self._supervisor.events.get_nowait())
        if self.gone:
            raise GoneError(self.gone)
        if self._pid is None:
            self._start()
        now = monotonic()
        if self._resume is not None and now >= self._resume:
            self._supervisor.signal(self._pid or 0, signal.SIGCONT)
            self._resume = None
        if self._kill is not None and now >= self._kill:
            self.problems.append(f"the server did not end within {_STOP_SECONDS:.0f} s of SIGTERM")
            self._end(signal.SIGKILL)

    def calm(self) -> None:
        """Stops all further faults, and kills a server that still has failpoints armed."""
        self._faulty = False
        if self._plan.scenario.mortal:
            self.strike("kill server")
            self._wait_for_restart()

    def restart(self) -> None:
        """Restarts the server once more: with SIGKILL if its durability survives that, else with SIGTERM."""
        if self._plan.scenario.mortal:
            self._end(signal.SIGKILL if self._plan.scenario.journals else signal.SIGTERM)
            self._wait_for_restart()

    def _end(self, number: signal.Signals) -> None:
        assert self._pid is not None
        self._kill = monotonic() + _STOP_SECONDS
        self._supervisor.signal(self._pid, number)

    def _wait_for_restart(self) -> None:
        before, end = self._pid, monotonic() + 2 * _STOP_SECONDS
        while self._pid in (before, None) and monotonic() < end:
            self.tend()
            sleep(_POLL_SECONDS)

    def _handle(self, event: Event) -> None:
        if event.pid == self._pid and event.what == "ended":
            self._ended(event)
        elif event.pid == self._pid and self._resume is None:  # a failpoint stopped it
            self._resume = event.at + self._random.uniform(0.02, 0.3)

    def _ended(self, event: Event) -> None:
        expected = event.status == -signal.SIGKILL or (event.status in (0, -signal.SIGTERM) and self._kill is not None)
        self._pid = self._resume = self._kill = None
        self._failures = 0 if expected else self._failures + 1
        if not expected or not self._plan.scenario.mortal:
            self.problems.append(f"the server ended with status {event.status}")
        if self._failures >= _MOST_FAILURES:
            last = (self._plan.folder / "server.err").read_text().rstrip().rpartition("\n")[2]
            self.gone = f"the server cannot start any more: {last}"

    def _start(self) -> None:
        plan, durability = self._plan, self._plan.scenario.durability
        settings = {"port": self._port, "durability": durability, "log": str(self.log), "defect": plan.defect}
        if plan.scenario.mortal:
            settings |= {"data": str(plan.folder / "data"), "updates": self._random.randint(*_SNAPSHOT_UPDATES)}
        environment = {"DELTASERVE_FAILPOINTS": ""}
        if self._faulty:
            log = plan.folder / "server.faults"
            deaths = self._deaths.draw() if plan.scenario.mortal else []
            environment = faults.server_environment(self._random, deaths, plan.rate, log)
        self._pid = self._supervisor.start([json.dumps(settings)], environment)


def free_port() -> int:
    """Returns a free port, at random because other runs look for one at the same time."""
    while True:
        port = random.SystemRandom().randint(*_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
