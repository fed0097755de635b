"""A worker's step over loopback TCP, beside what the bytes alone cost and what a local step costs."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import grpc
import torch

import deltaserve
from benchmarks.models import SIZE_A, Tensors, model_a, model_b
from benchmarks.timing import Timing, by_turns
from deltaserve_server import Server, ServerConfig
from deltaserve_server.config import DeviceKind

_BYTES_A = SIZE_A * 4


def large(rounds: int, device: DeviceKind) -> dict[str, Timing]:
    """Times a step of 25,000,000 elements in 60 tensors."""
    gradients = model_a(1)
    with ExitStack() as stack:
        step = stack.enter_context(worker_step(model_a(), gradients, device))
        there_and_back = stack.enter_context(_raw_tcp(_BYTES_A))
        contenders: dict[str, Callable[[], object]] = {
            "100 MB there and back, raw TCP": there_and_back,
            f"deltaserve step ({device})": step,
            "local torch.optim.Adadelta.step()": _local(gradients),
        }
        return by_turns(contenders, rounds)


def small(rounds: int) -> dict[str, Timing]:
    """Times a step of 6 elements."""
    gradients = model_b(1)
    with ExitStack() as stack:
        target = stack.enter_context(_server("cpu"))
        contenders: dict[str, Callable[[], object]] = {
            "unary gRPC call without work": stack.enter_context(_empty_call(target)),
            "deltaserve step": stack.enter_context(worker_step(model_b(), gradients, "cpu", target)),
        }
        return by_turns(contenders, rounds, warmups=100)


@contextmanager
def worker_step(
    weights: Tensors, gradients: Tensors, device: DeviceKind, target: str | None = None
) -> Iterator[Callable[[], object]]:
    """Gives a step of a worker against a server in a process of its own."""
    with ExitStack() as stack:
        where = target or stack.enter_context(_server(device))
        client = stack.enter_context(deltaserve.connect(where))
        worker = stack.enter_context(client.create_model("bench", weights).worker())
        yield lambda: worker.step(gradients)


@contextmanager
def _server(device: DeviceKind) -> Iterator[str]:
    with _process(_serve, device) as connection:
        yield connection.recv()


def _serve(connection: Connection, device: DeviceKind) -> None:
    with Server(ServerConfig(bind="127.0.0.1:0", device=device)) as server:
        connection.send(server.target)
        connection.recv()


@contextmanager
def _raw_tcp(size: int) -> Iterator[Callable[[], object]]:
    """Gives `size` bytes sent to another process, and then as many received from it."""
    with _process(_echo, size) as connection, socket.create_connection(("127.0.0.1", connection.recv())) as peer:
        outgoing, incoming = bytes(size), bytearray(size)

        def exchange() -> None:
            peer.sendall(outgoing)
            _receive(peer, incoming)

        yield exchange


def _echo(connection: Connection, size: int) -> None:
    buffer = bytearray(size)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection.send(listener.getsockname()[1])
        peer, _ = listener.accept()
        while _receive(peer, buffer):
            peer.sendall(buffer)


def _receive(peer: socket.socket, buffer: bytearray) -> bool:
    view = memoryview(buffer)
    while view:
        count = peer.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


@contextmanager
def _empty_call(target: str) -> Iterator[Callable[[], object]]:
    with grpc.insecure_channel(target) as channel:
        call: Callable[..., bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        yield lambda: call(b"", timeout=10)


def _local(gradients: Tensors) -> Callable[[], object]:
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in model_a().values()]
    for param, gradient in zip(params, gradients.values(), strict=True):
        param.grad = torch.from_numpy(gradient)
    return torch.optim.Adadelta(params).step


@contextmanager
def _process(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Runs `target` with a connection in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        ours.close()
        process.terminate()
        process.join()
