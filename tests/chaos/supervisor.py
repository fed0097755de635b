"""Starts workers as a supervisor would, quickly: a process that has the libraries loaded forks one for each of them.

As a program it obeys lines of JSON on its standard input and says on its standard output what becomes of its children.
It alone sends them signals: it knows whose id is still theirs. It loads nothing of ours, so each child reads its own
environment when it does.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, NoReturn

_LOOK_SECONDS = 0.01


class Event(NamedTuple):
    """What became of a child: "ended" with its status, negative for a signal; or "stopped"."""

    what: str
    pid: int
    status: int
    at: float


class Supervisor:
    """The supervisor as the harness sees it."""

    def __init__(self, errors: Path) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("ab"),
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        """Starts a worker; returns its process id."""
        self._tell({"start": list(arguments), "environment": dict(environment)})
        return self._started.get(timeout=30)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends a signal to a worker, if it lives."""
        self._tell({"signal": int(number), "pid": pid})

    def close(self) -> None:
        """Ends all of them."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(10)

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            message = json.loads(line)
            if "started" in message:
                self._started.put(message["started"])
            else:
                self.events.put(Event(**message))


class _Program:
    """The supervisor itself."""

    def __init__(self) -> None:
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
                _become_worker(command["start"], command["environment"])
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


def _become_worker(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    status = 4
    try:
        empty = os.open(os.devnull, os.O_RDWR)
        os.dup2(empty, 0)
        os.dup2(2, 1)
        os.environ.update(environment)
        from worker_program import main

        status = main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(status)


def _load() -> None:
    for name in ("google.protobuf.message_factory", "google.rpc.error_details_pb2", "grpc_status.rpc_status", "numpy"):
        import_module(name)


if __name__ == "__main__":
    _load()
    _Program().run()
