"""Every RPC of the contract has a method of the client that calls it."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltaserve
from deltaserve.v1 import model_service_pb2, system_service_pb2, worker_service_pb2
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.service.servicers.model_service import ModelServicer
from deltaserve_server.service.servicers.system_service import SystemServicer
from deltaserve_server.service.servicers.worker_service import WorkerServicer

SERVICERS = {"ModelService": ModelServicer, "WorkerService": WorkerServicer, "SystemService": SystemServicer}
SERVICES = [
    service
    for module in (model_service_pb2, worker_service_pb2, system_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS = [(service.name, method.name) for service in SERVICES for method in service.methods]

SMALL = {"w": np.ones(4, np.float32)}
LARGE = {"w": np.ones(300_000, np.float32)}


class Scene:
    """A model that fits into one message, a larger one, and a worker of each."""

    def __init__(self, client: deltaserve.Client) -> None:
        self.client = client
        self.model = client.create_model("small", SMALL)
        self.worker = self.model.worker("a")
        self.worker.step(SMALL)
        self.large = client.create_model("large", LARGE).worker("a")
        self.large.pull()


CALLS: dict[str, Callable[[Scene], object]] = {
    "CreateModel": lambda scene: scene.client.create_model("new", SMALL),
    "ExtendModel": lambda scene: scene.model.extend({"more": np.zeros(2, np.float32)}),
    "GetModel": lambda scene: scene.model.info(),
    "ListModels": lambda scene: scene.client.models(),
    "UpdateModel": lambda scene: scene.model.update(policy=deltaserve.Bounded(slack=1)),
    "WatchModel": lambda scene: next(scene.model.watch()),
    "DeleteModel": lambda scene: scene.model.delete(),
    "PullState": lambda scene: scene.model.pull_state(),
    "PutState": lambda scene: scene.model.put_state(scene.model.pull_state()),
    "OpenSession": lambda scene: scene.model.worker("b"),
    "KeepSession": lambda scene: scene.worker._session.keep(),
    "CloseSession": lambda scene: scene.worker.close(),
    "Step": lambda scene: scene.worker.step(SMALL),
    "StreamStep": lambda scene: scene.large.step(LARGE),
    "OpenSharedMemory": lambda scene: scene.client.model("large").worker("b", transport="shared"),
    "Pull": lambda scene: scene.worker.pull(),
    "GetPush": lambda scene: scene.worker.get_push(),
    "SaveSnapshot": lambda scene: scene.model.save_snapshot(),
    "ListSnapshots": lambda scene: scene.model.snapshots(),
    "GetServerInfo": lambda scene: scene.client.server_info(),
}
"""By RPC, the client method that calls it. test_leases.py tests KeepSession, which a background thread calls."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the RPCs that reached any server started after this fixture."""
    names: list[str] = []

    def traced(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def trace(*arguments: Any) -> Any:
            names.append(name)
            return method(*arguments)

        return trace

    for service, name in METHODS:
        monkeypatch.setattr(SERVICERS[service], name, traced(name, getattr(SERVICERS[service], name)))
    return names


def test_the_table_has_every_rpc() -> None:
    assert sorted(CALLS) == sorted(name for _, name in METHODS)


@pytest.mark.parametrize("name", [name for _, name in METHODS])
def test_a_client_method_calls_the_rpc(name: str, reached: list[str], tmp_path: Path) -> None:
    config = ServerConfig(device="cpu", data_dir=tmp_path)
    with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=20) as client:
        scene = Scene(client)
        reached.clear()
        CALLS[name](scene)
        assert name in reached
