"""Baselines: raw TCP, plain gRPC, copies in memory."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from threading import Thread

import grpc
import numpy as np

from benchmarks.processes import process, until_closed
from deltaserve_server.config import MIB

Run = Callable[[], object]

THERE_AND_BACK = "raw TCP, there and back"
BOTH_AT_ONCE = "raw TCP, both ways at once"
ECHO = "gRPC echo, messages of 1 MiB"
EMPTY_CALL = "unary gRPC call without work"

_PATIENCE_SECONDS = 120.0


@contextmanager
def raw_tcp(size: int) -> Iterator[tuple[Run, Run]]:
    """Yields two exchanges of `size` bytes with another process: one way after the other, and both ways at once."""
    with ExitStack() as stack:
        connection, _ = stack.enter_context(process(_tcp_peer, size))
        first, second = (stack.enter_context(socket.create_connection(connection.recv())) for _ in range(2))
        outgoing, incoming = bytes(size), bytearray(size)
        for peer in first, second:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def there_and_back() -> None:
            first.sendall(outgoing)
            _receive(first, incoming)

        yield there_and_back, lambda: _both_at_once(second, outgoing, incoming)


def _tcp_peer(connection: Connection, size: int) -> None:
    outgoing, incoming = bytes(size), bytearray(size)

    def reply(peer: socket.socket) -> None:
        _receive(peer, incoming)
        peer.sendall(outgoing)

    with ExitStack() as stack:
        for exchange in reply, lambda peer: _both_at_once(peer, outgoing, incoming):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            connection.send(listener.getsockname())
            Thread(target=_serve_tcp, args=(listener, exchange), daemon=True).start()
        until_closed(connection)


def _serve_tcp(listener: socket.socket, exchange: Callable[[socket.socket], None]) -> None:
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while peer.recv(1, socket.MSG_PEEK):  # the other end starts each exchange, and closes the connection after the last
        exchange(peer)


def _both_at_once(peer: socket.socket, outgoing: bytes, incoming: bytearray) -> None:
    receiver = Thread(target=_receive, args=(peer, incoming))
    receiver.start()
    peer.sendall(outgoing)
    receiver.join()


def _receive(peer: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        count = peer.recv_into(view)
        if not count:
            raise ConnectionError("the other end closed the connection")
        view = view[count:]


@contextmanager
def grpc_server() -> Iterator[grpc.Channel]:
    """Yields a channel to a plain gRPC server in another process; neither has any option set."""
    with process(_grpc_peer) as (connection, _), grpc.insecure_channel(connection.recv()) as channel:
        yield channel


def empty_call(channel: grpc.Channel) -> Run:
    """Returns a unary call with empty messages."""
    call = channel.unary_unary("/bench/empty", bytes, bytes)
    return lambda: call(b"", timeout=_PATIENCE_SECONDS)


def echo(channel: grpc.Channel, size: int) -> Run:
    """Returns a stream of `size` bytes in messages of 1 MiB, which the server echoes one by one."""
    call = channel.stream_stream("/bench/echo", bytes, bytes)
    message = bytes(MIB)
    messages = [message] * (size // MIB)
    messages += [message[: size % MIB]] if size % MIB else []

    def run() -> None:
        received = sum(map(len, call(iter(messages), timeout=_PATIENCE_SECONDS)))
        assert received == size

    return run


def _grpc_peer(connection: Connection) -> None:
    server = grpc.server(ThreadPoolExecutor(8))
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "empty": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        "echo": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(f"127.0.0.1:{port}")
    until_closed(connection)
    server.stop(0).wait()


def copy(size: int, executor: ThreadPoolExecutor, threads: int) -> Run:
    """Returns a copy of `size` bytes in memory, divided among threads."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    pieces = [slice(size * part // threads, size * (part + 1) // threads) for part in range(threads)]

    def run() -> None:
        for done in [executor.submit(np.copyto, target[piece], source[piece]) for piece in pieces]:
            done.result()

    return run if threads > 1 else lambda: np.copyto(target, source)
