"""The adapter of Ray, after its documented parameter server: an actor takes a list of arrays and returns one.

Variant "local" is one node, whose processes exchange arrays through shared memory. "two-nodes" is two nodes on this
host, which exchange arrays over loopback TCP, as two hosts would.
"""

import importlib
import os
import warnings
from time import monotonic
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.models import Array, gradients_of, shapes_of, weights_of
from benchmarks.peers.common import (
    EPS,
    LR,
    RHO,
    Client,
    Meter,
    Record,
    copies,
    judge,
    main,
    plan,
    timed,
    together,
    work,
)

_STORE_BYTES = 2 << 30


class _ParameterServer:
    def __init__(self, workload: str) -> None:
        self._torch = torch = importlib.import_module("torch")
        warnings.filterwarnings("ignore", message=".*non-writable.*")
        self._params = [torch.nn.Parameter(torch.from_numpy(array)) for array in weights_of(shapes_of(workload))]
        self._optimizer = torch.optim.Adadelta(self._params, lr=LR, rho=RHO, eps=EPS)
        self._count = 0

    def step(self, gradients: list[Array]) -> list[Array]:
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = self._torch.from_numpy(gradient)
        self._optimizer.step()
        self._count += 1
        return [param.detach().numpy() for param in self._params]

    def look(self) -> tuple[int, int]:
        """Returns the number of updates and the peak of memory."""
        return self._count, machine.peak_bytes(os.getpid())


class _Worker:
    def __init__(self, server: Any, workload: str, quick: bool, root: int) -> None:
        self._ray = importlib.import_module("ray")
        self._server, self._workload, self._quick, self._root = server, workload, quick, root
        self._gradients = gradients_of(shapes_of(workload))
        self._weights = copies(self._gradients)

    def _step(self) -> None:
        received = self._ray.get(self._server.step.remote(self._gradients))
        for own, new in zip(self._weights, received, strict=True):
            np.copyto(own, new)

    def _client(self) -> Client:
        return Client(self._step, lambda: self._weights, lambda: None)

    def timed(self) -> Record:
        return timed(self._client(), self._workload, self._quick, self._root)

    def steps(self, count: int) -> list[Array]:
        for _ in range(count):
            self._step()
        return self._weights

    def work(self, deadline: float) -> tuple[int, float, int]:
        return (*work(self._client(), deadline), machine.peak_bytes(os.getpid()))


def run(workload: str, variant: str, quick: bool) -> Record:
    """Starts Ray, runs the workload, and stops Ray."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    ray = importlib.import_module("ray")
    todo = plan(workload, quick)
    cluster = None
    at_server: dict[str, Any] = {"num_cpus": 1}
    at_worker: dict[str, Any] = {"num_cpus": 1}
    if variant == "local":
        ray.init(
            num_cpus=todo.workers + 1,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )
    else:
        cluster = importlib.import_module("ray.cluster_utils").Cluster()
        cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, resources={"server": 1}, include_dashboard=False)
        cluster.add_node(num_cpus=todo.workers, object_store_memory=_STORE_BYTES, resources={"worker": todo.workers})
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        at_server["resources"], at_worker["resources"] = {"server": 1}, {"worker": 1}
    try:
        server = ray.remote(_ParameterServer).options(**at_server).remote(workload)
        ray.get(server.look.remote())
        kind = ray.remote(_Worker).options(**at_worker)
        workers = [kind.remote(server, workload, quick, os.getpid()) for _ in range(todo.workers)]
        record = _workload_c(ray, server, workers, quick) if workload == "c" else ray.get(workers[0].timed.remote())
        return {**record, "server_bytes": ray.get(server.look.remote())[1]}
    finally:
        ray.shutdown()
        if cluster:
            cluster.shutdown()


def _workload_c(ray: Any, server: Any, workers: list[Any], quick: bool) -> Record:
    todo = plan("c", quick)
    ray.get([worker.steps.remote(todo.warmups) for worker in workers])
    meter, started = Meter(os.getpid()), monotonic()
    answers = ray.get([worker.work.remote(started + todo.seconds) for worker in workers])
    record = together([answer[:2] for answer in answers], started)
    steps = sum(record["steps_by_worker"])
    record |= meter.per_step(steps)
    weights = ray.get(workers[0].steps.remote(1))
    record |= judge("c", weights, todo.workers * todo.warmups + steps + 1, ray.get(server.look.remote())[0])
    return {**record, "worker_bytes": max(answer[2] for answer in answers)}


if __name__ == "__main__":
    main(("local", "two-nodes"), run)
