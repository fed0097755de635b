"""The adapter of plain grpcio: a unary call with the whole model in one message each way, and torch's optimizer."""

import importlib
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from benchmarks.models import Array, gradients_of, shapes_of, weights_of
from benchmarks.peers.common import EPS, LR, RHO, Client, copies, main, run_processes

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def _stubs() -> tuple[Any, Any]:
    """Compiles the .proto file, with grpcio-tools."""
    return grpc.protos_and_services("benchmarks/peers/grpc_naive.proto")


def _encode(messages: Any, arrays: Sequence[Array]) -> Any:
    return messages.Tensors(tensors=[messages.Tensor(shape=array.shape, data=array.tobytes()) for array in arrays])


def _decode(message: Any) -> list[Array]:
    return [np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape)) for tensor in message.tensors]


def serve(connection: Connection, workload: str, variant: str, workers: int) -> None:
    """Runs the server."""
    torch = importlib.import_module("torch")
    warnings.filterwarnings("ignore", message=".*non-writable.*")
    messages, services = _stubs()
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in weights_of(shapes_of(workload))]
    optimizer = torch.optim.Adadelta(params, lr=LR, rho=RHO, eps=EPS)
    lock = threading.Lock()
    count = 0

    class Servicer(services.ParameterServerServicer):  # type: ignore[name-defined,misc]
        def PushPull(self, request: Any, context: Any) -> Any:  # noqa: N802
            nonlocal count
            gradients = [torch.from_numpy(array) for array in _decode(request)]
            with lock:
                for param, gradient in zip(params, gradients, strict=True):
                    param.grad = gradient
                optimizer.step()
                count += 1
                return _encode(messages, [param.detach().numpy() for param in params])

    server = grpc.server(ThreadPoolExecutor(8), options=_OPTIONS)
    services.add_ParameterServerServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(("ready", port))
    while connection.recv() == "count":
        connection.send(("count", count))
    server.stop(0)


def connect(address: int, workload: str, variant: str, rank: int, workers: int) -> Client:
    """Opens a channel."""
    messages, services = _stubs()
    channel = grpc.insecure_channel(f"127.0.0.1:{address}", options=_OPTIONS)
    stub = services.ParameterServerStub(channel)
    gradients = gradients_of(shapes_of(workload))
    weights = copies(gradients)

    def step() -> None:
        for own, received in zip(weights, _decode(stub.PushPull(_encode(messages, gradients))), strict=True):
            np.copyto(own, received)

    return Client(step, lambda: weights, channel.close)


if __name__ == "__main__":
    main(("bytes",), partial(run_processes, "benchmarks.peers.grpc_naive"))
