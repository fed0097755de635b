"""The bytes on the wire, gRPC's framing included, counted by a TCP proxy between worker and server."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Thread

import deltaserve
from benchmarks.models import SHAPES_A, Shape, elements, gradients_of, named, weights_of
from benchmarks.processes import TCP, server
from benchmarks.results import Figures

OVERHEAD = "more than the tensors' bytes, %"

_READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Proxy:
    """Bytes that have passed, by direction."""

    target: str
    up: int = 0
    down: int = 0
    sockets: list[socket.socket] = field(default_factory=list)

    def accept(self, listener: socket.socket) -> None:
        """Takes connections until the listener is closed."""
        host, _, port = self.target.rpartition(":")
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection((host, int(port)))
            self.sockets += [near, far]
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                Thread(target=self.relay, args=(source, sink, way), daemon=True).start()

    def relay(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        """Forwards the bytes of one direction and counts them."""
        try:
            while data := source.recv(_READ_BYTES):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other side closed its connection
            return


def wire(steps: int, shapes: Sequence[Shape] = SHAPES_A) -> Figures:
    """Counts the bytes of a step over TCP."""
    tensors, gradients = named(weights_of(shapes)), named(gradients_of(shapes))
    size = 4 * elements(shapes)
    with ExitStack() as stack:
        target, _ = stack.enter_context(server(TCP))
        proxy, near = stack.enter_context(_proxy(target))
        client = stack.enter_context(deltaserve.connect(near))
        worker = stack.enter_context(client.create_model("bench", tensors).worker(**TCP.worker))
        worker.step(gradients)
        before = proxy.up, proxy.down
        for _ in range(steps):
            worker.step(gradients)
        up, down = ((after - start) / steps for after, start in zip((proxy.up, proxy.down), before, strict=True))
    ways = {"gradient, to the server": up, "weights, to the worker": down}
    rows: dict[str, tuple[float | None, ...]] = {
        way: (sent / 1e6, 100 * (sent / size - 1)) for way, sent in ways.items()
    }
    return Figures(f"wire: a step of {size / 1e6:.3g} MB each way, TCP", ("MB", OVERHEAD), rows)


@contextmanager
def _proxy(target: str) -> Iterator[tuple[_Proxy, str]]:
    proxy = _Proxy(target)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=proxy.accept, args=(listener,), daemon=True).start()
        yield proxy, f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in proxy.sockets:
        connection.close()
