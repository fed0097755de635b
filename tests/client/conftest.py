"""Fixtures: server processes to kill, a TCP proxy that cuts connections, and programs to interrupt."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.ports import held_port

if TYPE_CHECKING:
    from deltaserve import Worker
    from deltaserve_server import LocalServer

_SERVE = """
import json, signal, sys, threading
from pathlib import Path
import deltaserve_server
settings = json.loads(sys.argv[2])
if "data_dir" in settings:
    settings["data_dir"] = Path(settings["data_dir"])
server = deltaserve_server.Server(deltaserve_server.ServerConfig(bind=sys.argv[1], device="cpu", **settings))
server.start()
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print(server.target, flush=True)
while not stop.wait(0.2):  # polls like `deltaserve serve`, because a signal may wake another thread
    pass
server.stop()
"""


class ServerProcess:
    """A server process that restarts on the same port. `settings` are the fields of its `ServerConfig`."""

    def __init__(self, **settings: Any) -> None:
        self._port = held_port()
        self.target = f"127.0.0.1:{self._port.getsockname()[1]}"
        self._settings = json.dumps(settings)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "error", "-c", _SERVE, self.target, self._settings],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        assert self._process.stdout.readline().strip() == self.target, "the server did not start"

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kills the process with SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def end(self) -> None:
        """Stops the server cleanly with SIGTERM."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)  # faulthandler prints the stack of every thread
            raise

    def close(self) -> None:
        """Kills the process if it still runs, and releases its port."""
        if self._process.stdout and not self._process.stdout.closed:
            self.kill()
        self._port.close()


class Proxy:
    """A TCP proxy between clients and a server, with faults on demand."""

    def __init__(self, upstream: str) -> None:
        host, port = upstream.split(":")
        self._upstream = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.refusing = False
        self.cuts = 0
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._left: dict[str, int | None] = {"up": None, "down": None}
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_answers(self) -> None:
        """Holds back all data for the client until the next cut."""
        self._flowing.clear()

    def cut(self) -> None:
        """Closes every connection. New ones work."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
            self._left = dict.fromkeys(self._left)
            self.cuts += bool(pairs)
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._flowing.set()

    def cut_after(self, direction: str, count: int) -> None:
        """Cuts once, after `count` more bytes: "up" to the server or "down" to the client."""
        self._left[direction] = count

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    if self.refusing:
                        raise OSError("refused")
                    server = socket.create_connection(self._upstream)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._pairs.append((client, server))
                for arguments in ((client, server, "up"), (server, client, "down")):
                    threading.Thread(target=self._carry, args=arguments, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if direction == "down":
                    self._flowing.wait()
                left = self._left[direction]
                if left is not None:
                    self._left[direction] = left - len(data)
                    if left <= len(data):
                        self.cut()
                        break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


class Program:
    """A Python program in a separate process, which reports each step as a line on standard output."""

    def __init__(self, source: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", source, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Kills the program and the processes that it has forked."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def line(self) -> str:
        """Returns the next line that it prints."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        """Writes a line to the standard input of the program."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def finish(self, seconds: float = 30.0) -> tuple[int, str, str]:
        """Waits for the program to end. Returns its status and its remaining standard output and error."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


StartServer = Callable[..., ServerProcess]
StartProxy = Callable[[str], Proxy]
StartProgram = Callable[..., Program]


@pytest.fixture(scope="session")
def shared_server() -> "Iterator[LocalServer]":
    """The in-process server that all tests of a session share."""
    from deltaserve_server import LocalServer

    with LocalServer() as local:
        yield local


@pytest.fixture
def own_server() -> None:
    """Makes `server` a new server that the test may stop or change."""


@pytest.fixture
def server(request: pytest.FixtureRequest, shared_server: "LocalServer") -> "Iterator[LocalServer]":
    """A server without models: the shared one, or a new one for tests that use `own_server`."""
    import deltaserve
    from deltaserve_server import LocalServer

    if "own_server" in request.fixturenames:
        with LocalServer() as local:
            yield local
        return
    yield shared_server
    with deltaserve.connect(shared_server.target, timeout_seconds=30.0) as cleaner:
        for model in cleaner.models():
            cleaner.delete_model(model.name)


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    with ExitStack() as stack:

        def start(**settings: Any) -> ServerProcess:
            process = ServerProcess(**settings)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture(scope="module")
def server_for_all() -> Iterator[ServerProcess]:
    """The server process that the tests of a file share."""
    process = ServerProcess()
    yield process
    process.close()


@pytest.fixture
def start_proxy() -> Iterator[StartProxy]:
    with ExitStack() as stack:

        def start(upstream: str) -> Proxy:
            proxy = Proxy(upstream)
            stack.callback(proxy.close)
            return proxy

        yield start


@pytest.fixture
def start_program() -> Iterator[StartProgram]:
    with ExitStack() as stack:

        def start(source: str, *arguments: str) -> Program:
            program = Program(source, *arguments)
            stack.callback(program.kill)
            return program

        yield start


@pytest.fixture
def frequent_renewals(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Renews leases every 0.1 s. The list receives the intervals that the client asked for."""
    from deltaserve import _session

    renew, intervals = _session._renew, list[float]()

    def often(session: Any, closed: Any, seconds: float) -> None:
        intervals.append(seconds)
        renew(session, closed, 0.1)

    monkeypatch.setattr(_session, "_renew", often)
    return intervals


@pytest.fixture
def time_is_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Advances the clock of all clients by an hour, so that a call in progress makes no further attempt."""
    return lambda: monkeypatch.setattr("deltaserve._connection.monotonic", lambda: monotonic() + 3600)


Eventually = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def eventually() -> Eventually:
    """Waits until a condition is true, and returns its value."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = monotonic() + 10.0
        while not (met := condition()):
            assert monotonic() < deadline, "it did not happen within 10 s"
            sleep(0.01)
        return met

    return wait


GiveUp = Callable[["Worker", Any], None]


@pytest.fixture
def give_up(eventually: Eventually) -> GiveUp:
    """Makes a worker push a gradient and time out before its round closes. The push stays in the round."""
    from deltaserve import UnavailableError

    def step(worker: "Worker", gradient: Any) -> None:
        worker.pull()
        connection = worker._connection
        patience = connection.timeout_seconds

        def waits() -> bool:
            connection.timeout_seconds = 0.3
            with pytest.raises(UnavailableError, match="did not answer"):
                worker.step(gradient)
            connection.timeout_seconds = patience
            return worker.get_push().state == "waiting"  # on a busy machine the push may not have arrived yet

        eventually(waits)

    return step
