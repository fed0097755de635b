"""A TCP proxy between workers and a server that delays, cuts and half-closes connections, from a seed."""

import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import sleep

from deck import Deck

_BLOCK = 1 << 16
_SLOW_BLOCKS = 20
_KINDS = ("cut", "cut", "hold", "delay")


@dataclass(frozen=True)
class _Plan:
    """The fault of a connection: its direction, and the number of bytes before it."""

    kind: str
    up: bool
    after: int
    seconds: float

    @property
    def text(self) -> str:
        return f"tcp {self.kind} {'up' if self.up else 'down'}"


class TcpProxy:
    """Listens on a port of its own and forwards bytes in both directions.

    Args:
        upstream: HOST:PORT of the server.
        seed: Seed of the faults.
        mean_bytes: Mean number of bytes of a connection before its fault.
        note: Called with the name of each fault when it happens.
    """

    def __init__(self, upstream: str, seed: int, mean_bytes: float, note: Callable[[str], None]) -> None:
        host, port = upstream.split(":")
        self._upstream = host, int(port)
        self._random = random.Random(seed)
        self._deck = Deck(self._random, [(kind, up) for kind in _KINDS for up in (True, False)])
        self._mean_bytes = mean_bytes
        self._note = note
        self._lock = threading.Lock()
        self._calm = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def calm(self) -> None:
        """Stops all further faults."""
        self._calm = True

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._upstream)
                except OSError:
                    client.close()
                    continue
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                plan = self._plan()
                for arguments in ((client, server, True, plan), (server, client, False, plan)):
                    threading.Thread(target=self._forward, args=arguments, daemon=True).start()

    def _plan(self) -> _Plan:
        with self._lock:
            kind, up = self._deck.draw()
            seconds = self._random.uniform(0.005, 0.04) if kind == "delay" else self._random.choice((0.3, 1.0, 2.0))
            after = round(self._random.expovariate(1 / self._mean_bytes))
            return _Plan(kind, up, after, seconds)

    def _forward(self, source: socket.socket, sink: socket.socket, up: bool, plan: _Plan) -> None:
        left, slow = plan.after if plan.up == up else 1 << 62, 0
        with suppress(OSError):
            while data := source.recv(_BLOCK):
                left -= len(data)
                if left <= 0 and not self._calm and not slow:
                    self._note(plan.text)
                    if plan.kind != "delay":
                        sink.sendall(data[: len(data) + left])
                        sleep(plan.seconds if plan.kind == "hold" else 0)
                        break
                    slow = _SLOW_BLOCKS
                if slow:
                    sleep(plan.seconds)
                    slow -= 1
                    if not slow:
                        left = plan.after + 1
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()
