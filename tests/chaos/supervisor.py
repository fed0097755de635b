"""Starts a program again and again, quickly: a process in which everything is loaded forks one each time.

That process is forked itself, before anything of gRPC runs. It obeys lines of JSON on its standard input and says on
its standard output what becomes of its children. It alone sends them signals: it knows whose id is still theirs.
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

_LOOK_SECONDS = 0.01
_DESCRIPTORS = 4096

_LOADED = (
    *("deltaserve", "google.rpc.error_details_pb2", "grpc_status.rpc_status"),
    *("deltaserve_server.app", "deltaserve_server.adadelta.cpu", "deltaserve_server.adadelta.values"),
)
"""What programs load, beside what they import themselves."""


class Event(NamedTuple):
    """What became of a child: "ended" with its status, negative for a signal; or "stopped"."""

    what: str
    pid: int
    status: int
    at: float


class Supervisor:
    """The supervisor as the harness sees it. To be made while this process has one thread.

    Args:
        program: A module here with a function `main`.
        errors: A file for what its processes say.
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
        """Starts the program; returns its process id."""
        if self._reading is None:
            self._reading = threading.Thread(target=self._read, daemon=True)
            self._reading.start()
        self._tell({"start": list(arguments), "environment": dict(environment)})
        return self._started.get(timeout=30)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends a signal to a process, if it lives."""
        self._tell({"signal": int(number), "pid": pid})

    def close(self) -> None:
        """Ends all of them."""
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
    """The supervisor itself."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._children: set[int] = set()
        self._rest = b""

    def run(self) -> None:
        while True:
            self._look()
            if not select.select([0], [], [], _LOOK_SECONDS)[0]:
                continue
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _obey(self, command: dict[str, Any]) -> None:
        if "start" in command:
            pid = os.fork()
            if not pid:
                _become(self._program, command["start"], command["environment"])
            self._children.add(pid)
            _say({"started": pid})
        elif command["pid"] in self._children:
            os.kill(command["pid"], command["signal"])

    def _look(self) -> None:
        """Says which children have ended or stopped."""
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if not pid:
                return
            if os.WIFSTOPPED(status):
                _say({"what": "stopped", "pid": pid, "status": 0, "at": monotonic()})
                continue
            self._children.discard(pid)
            _say({"what": "ended", "pid": pid, "status": os.waitstatus_to_exitcode(status), "at": monotonic()})


def _say(message: dict[str, Any]) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def _supervise(program: str, heard: int, saying: int, log: int) -> NoReturn:
    """Becomes the supervisor of a program; lets go of all that this process had open."""
    status = 4
    try:
        _take_over(heard, saying, log)
        _Program(program).run()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(status)


def _become(program: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Becomes the program."""
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
    """Has failpoints be as the environment now says: it was read when they were loaded."""

    failpoints._log_path = os.environ.get("DELTASERVE_FAILPOINTS_LOG")
    failpoints._armed = failpoints._from_environment()
