"""Starts a program many times, quickly: a supervisor process has all modules loaded and forks for each start.

The harness forks the supervisor before it uses gRPC, which does not survive a fork. The supervisor reads commands as
lines of JSON from its standard input, and reports its children's events on its standard output. It alone sends them
signals, because only a parent knows that a process id still belongs to its child.
"""

import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, NoReturn

from deltaserve._common import failpoints

_POLL_SECONDS = 0.01
_DESCRIPTORS = 4096

_LOADED = (
    *("deltaserve", "google.rpc.error_details_pb2", "grpc_status.rpc_status"),
    *("deltaserve_server.app", "deltaserve_server.optimizers.cpu", "deltaserve_server.optimizers.values"),
)
"""Modules that programs need beside their own imports."""


class Event(NamedTuple):
    """A child "ended" with its status, negative for a signal, or "stopped"."""

    what: str
    pid: int
    status: int
    at: float


class Supervisor:
    """The harness's end of a supervisor. Create it while this process has only one thread.

    Args:
        program: A module of this folder with a function `main`.
        errors: File for the error output of its processes.
    """

    def __init__(self, program: str, errors: Path) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        for name in (*_LOADED, program):
            import_module(name)
        heard, self._told = os.pipe()
        self._said, saying = os.pipe()
        log = os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._pid = os.fork()
        if not self._pid:
            _supervise(program, heard, saying, log)
        for descriptor in (heard, saying, log):
            os.close(descriptor)
        self._reading: threading.Thread | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        """Starts the program and returns its process id."""
        if self._reading is None:
            self._reading = threading.Thread(target=self._read, daemon=True)
            self._reading.start()
        self._tell({"start": list(arguments), "environment": dict(environment)})
        return self._started.get(timeout=30)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends a signal to a process, if it still runs."""
        self._tell({"signal": int(number), "pid": pid})

    def close(self) -> None:
        """Kills all processes of the program and ends the supervisor."""
        os.close(self._told)
        os.waitpid(self._pid, 0)

    def _tell(self, command: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            os.write(self._told, (json.dumps(command) + "\n").encode())

    def _read(self) -> None:
        with os.fdopen(self._said) as lines:
            for line in lines:
                message = json.loads(line)
                if "started" in message:
                    self._started.put(message["started"])
                else:
                    self.events.put(Event(**message))


class _Program:
    """The supervisor process."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._children: set[int] = set()
        self._rest = b""

    def run(self) -> None:
        while True:
            self._reap()
            if not select.select([0], [], [], _POLL_SECONDS)[0]:
                continue
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._execute(json.loads(line))
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _execute(self, command: dict[str, Any]) -> None:
        if "start" in command:
            pid = os.fork()
            if not pid:
                _become(self._program, command["start"], command["environment"])
            self._children.add(pid)
            _report({"started": pid})
        elif command["pid"] in self._children:
            os.kill(command["pid"], command["signal"])

    def _reap(self) -> None:
        """Reports the children that have ended or stopped."""
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if not pid:
                return
            if os.WIFSTOPPED(status):
                _report({"what": "stopped", "pid": pid, "status": 0, "at": monotonic()})
                continue
            self._children.discard(pid)
            _report({"what": "ended", "pid": pid, "status": os.waitstatus_to_exitcode(status), "at": monotonic()})


def _report(message: dict[str, Any]) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def _supervise(program: str, heard: int, saying: int, log: int) -> NoReturn:
    """Turns this process into the supervisor of a program, without the files that were open."""
    status = 4
    try:
        _take_over(heard, saying, log)
        _Program(program).run()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(status)


def _become(program: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Turns this process into the program."""
    status = 4
    try:
        _take_over(os.open(os.devnull, os.O_RDWR), 2, 2)
        os.environ.update(environment)
        _arm()
        status = import_module(program).main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(status)


def _take_over(heard: int, saying: int, log: int) -> None:
    for number, descriptor in enumerate((heard, saying, log)):
        os.dup2(descriptor, number)
    os.closerange(3, _DESCRIPTORS)


def _arm() -> None:
    """Arms failpoints from the new environment; their module read the old one when it was imported."""
    failpoints._log_path = os.environ.get("DELTASERVE_FAILPOINTS_LOG")
    failpoints._armed = failpoints._from_environment()
