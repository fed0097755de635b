"""The adapter of PyTorch RPC (TensorPipe), after its tutorial: a call takes gradients and returns parameters.

Variant "default" is PyTorch's choice on one host, shared memory for tensors. "tcp" is what two hosts would use.
"""

import os
import threading
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import rpc

from benchmarks.models import gradients_of, shapes_of, weights_of
from benchmarks.peers.common import EPS, LR, RHO, Client, free_port, main, run_processes


class _ParameterServer:
    def __init__(self, workload: str) -> None:
        weights = weights_of(shapes_of(workload))
        self.params = [torch.nn.Parameter(torch.from_numpy(array)) for array in weights]
        self.optimizer = torch.optim.Adadelta(self.params, lr=LR, rho=RHO, eps=EPS)
        self.lock = threading.Lock()
        self.count = 0

    def step(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        with self.lock:
            for param, gradient in zip(self.params, gradients, strict=True):
                param.grad = gradient
            self.optimizer.step()
            self.count += 1
            return [param.detach() for param in self.params]


_servers: list[_ParameterServer] = []


def update_and_fetch(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Applies gradients and returns the parameters, in the server process."""
    return _servers[0].step(gradients)


def _start(name: str, rank: int, workers: int, port: int, variant: str) -> None:
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    settings: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if variant == "tcp" else {}
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", **settings)
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)


def serve(connection: Connection, workload: str, variant: str, workers: int) -> None:
    """Runs the server."""
    _servers.append(_ParameterServer(workload))
    port = free_port()
    connection.send(("ready", port))
    _start("server", 0, workers, port, variant)
    while connection.recv() == "count":
        connection.send(("count", _servers[0].count))
    rpc.shutdown(graceful=False)


def connect(address: int, workload: str, variant: str, rank: int, workers: int) -> Client:
    """Starts a worker."""
    _start(f"worker{rank}", rank + 1, workers, address, variant)
    gradients = [torch.from_numpy(array) for array in gradients_of(shapes_of(workload))]
    weights = [torch.zeros_like(gradient) for gradient in gradients]

    def step() -> None:
        for own, received in zip(weights, rpc.rpc_sync("server", update_and_fetch, args=(gradients,)), strict=True):
            own.copy_(received)

    return Client(step, lambda: weights, partial(rpc.shutdown, graceful=False))


if __name__ == "__main__":
    main(("default", "tcp"), partial(run_processes, "benchmarks.peers.torch_rpc"))
