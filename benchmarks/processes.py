"""Runs servers and baselines in other processes, which do not share an interpreter with the measured code."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

from deltaserve_server import Server, ServerConfig
from deltaserve_server.config import DeviceKind


@dataclass(frozen=True, slots=True)
class Transport:
    """A transport between worker and server.

    Attributes:
        name: Name in the tables.
        bind: Address that the server binds; `{folder}` stands for an empty folder.
        worker: Arguments of `Model.worker`.
    """

    name: str
    bind: str = "127.0.0.1:0"
    worker: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> str:
        """Name of the row in the tables."""
        return f"deltaserve, {self.name}"


TCP = Transport("TCP", worker={"transport": "stream"})
UNIX = Transport("Unix socket", "unix:{folder}/socket", {"transport": "stream"})
SHARED = Transport("shared memory", worker={"transport": "shared"})
BFLOAT16 = Transport("TCP, bfloat16", worker={"transport": "stream", "wire": "bfloat16"})

TRANSPORTS = (TCP, UNIX, SHARED)
"""The transports that the tables of steps, workers and peers compare."""


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[tuple[Connection, int]]:
    """Runs `target` in another process with one end of a connection; yields the other end and the process id."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        assert child.pid is not None
        yield ours, child.pid
    finally:
        ours.close()
        child.join(5)
        if child.is_alive():
            child.terminate()
        child.join()


@contextmanager
def server(transport: Transport = TCP, device: DeviceKind = "cpu") -> Iterator[tuple[str, int]]:
    """Yields the address and the process id of a server."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="deltaserve-"))
        connection, pid = stack.enter_context(process(serve, transport.bind.format(folder=folder), device))
        yield connection.recv(), pid


def serve(connection: Connection, bind: str, device: DeviceKind) -> None:
    """Serves until the other end of the connection closes."""
    with Server(ServerConfig(bind=bind, device=device)) as serving:
        connection.send(serving.target)
        until_closed(connection)


def until_closed(connection: Connection) -> None:
    """Returns when the other end closes the connection."""
    try:
        connection.recv()
    except EOFError:
        return
