"""Keeps a server there: it dies in all the ways there are, and is started anew on the same port with the same data."""

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
"""Below those that the system takes for connections: none of these must take the place of a server that is away."""

_UPDATES = 5, 20
"""After so many updates there is a snapshot."""

_MOST_FAILURES = 3
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.01


class GoneError(Exception):
    """A server does not come back any more."""


class Host:
    """A server, however often it dies.

    Args:
        plan: What is run.
        note: Is told each fault when it happens.

    Attributes:
        target: Where it is.
        account: Where it keeps its account.
        problems: What went wrong.
        gone: Why it does not come back any more; None while it does.
    """

    def __init__(self, plan: Plan, note: Callable[[str], None]) -> None:
        self._plan = plan
        self._note = note
        self._chance = random.Random(f"host {plan.seed}")
        scenario = plan.scenario
        self._deaths = faults.Deaths(self._chance, scenario.durability, plan.first)
        self._port = _free_port()
        self.target = f"127.0.0.1:{self._port}"
        self.account = plan.folder / "server.account"
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
        """Does one of what `faults.SIGNALS` and `faults.DEATHS` name, if the server is there."""
        if self._pid is None or self._kill is not None:
            return
        if kind == "stop server":
            if self._resume is None:
                self._note(f"signal {kind}")
                self._supervisor.signal(self._pid, signal.SIGSTOP)
                self._resume = monotonic() + self._chance.uniform(0.02, 0.4)
            return
        self._note(f"signal {kind}")
        self._end(signal.SIGKILL if kind == "kill server" else signal.SIGTERM)

    def tend(self) -> None:
        """Starts the server where it has ended, and lets it go on where it was stopped for long enough.

        Raises:
            GoneError: It does not come back any more.
        """
        with suppress(Empty):
            while True:
                self._take_note(self._supervisor.events.get_nowait())
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
        """From now on it dies no more: a server that still may is killed."""
        self._faulty = False
        if self._plan.scenario.mortal:
            self.strike("kill server")
            self._until_another()

    def restart(self) -> None:
        """Ends the server once more: as hard as what it has promised allows without a loss."""
        if self._plan.scenario.mortal:
            self._end(signal.SIGKILL if self._plan.scenario.journals else signal.SIGTERM)
            self._until_another()

    def _end(self, number: signal.Signals) -> None:
        assert self._pid is not None
        self._kill = monotonic() + _STOP_SECONDS
        self._supervisor.signal(self._pid, number)

    def _until_another(self) -> None:
        before, end = self._pid, monotonic() + 2 * _STOP_SECONDS
        while self._pid in (before, None) and monotonic() < end:
            self.tend()
            sleep(_LOOK_SECONDS)

    def _take_note(self, event: Event) -> None:
        if event.pid == self._pid and event.what == "ended":
            self._ended(event)
        elif event.pid == self._pid and self._resume is None:  # it stopped itself
            self._resume = event.at + self._chance.uniform(0.02, 0.3)

    def _ended(self, event: Event) -> None:
        expected = event.status == -signal.SIGKILL or (event.status in (0, -signal.SIGTERM) and self._kill is not None)
        self._pid = self._resume = self._kill = None
        self._failures = 0 if expected else self._failures + 1
        if not expected or not self._plan.scenario.mortal:
            self.problems.append(f"the server ended with status {event.status}")
        if self._failures >= _MOST_FAILURES:
            last = (self._plan.folder / "server.err").read_text().rstrip().rpartition("\n")[2]
            self.gone = f"the server does not start any more: {last}"

    def _start(self) -> None:
        plan, durability = self._plan, self._plan.scenario.durability
        settings = {"port": self._port, "durability": durability, "account": str(self.account), "plant": plan.plant}
        if plan.scenario.mortal:
            settings |= {"data": str(plan.folder / "data"), "updates": self._chance.randint(*_UPDATES)}
        environment = {"DELTASERVE_FAILPOINTS": ""}
        if self._faulty:
            log = plan.folder / "server.faults"
            deaths = self._deaths.draw() if plan.scenario.mortal else []
            environment = faults.server_environment(self._chance, deaths, plan.rate, log)
        self._pid = self._supervisor.start([json.dumps(settings)], environment)


def _free_port() -> int:
    """Returns a port that nobody listens on, by chance: others look for one at the same time."""
    while True:
        port = random.SystemRandom().randint(*_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
