"""No call exceeds its timeout when the server is stopped (SIGSTOP): it accepts connections but never answers."""

import inspect
import signal
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
import pytest

import deltaserve
from deltaserve import Client, Model, Worker

if TYPE_CHECKING:
    from tests.client.conftest import ServerProcess

pytestmark = pytest.mark.deep

TIMEOUT = 0.3
SLACK = 10.0
"""Tolerance for a busy machine, in seconds. The default timeout is a minute."""

SMALL = {"w": np.ones(3, np.float32)}
LARGE = {"w": np.ones(1_000_000, np.float32)}


class Scene:
    """Objects of every public class, connected to a server that then stops."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.model = client.create_model("small", SMALL)
        self.large = client.create_model("large", LARGE)
        self.state, self.large_state = self.model.pull_state(), self.large.pull_state()
        self.worker, self.fresh, self.closing = (self.model.worker(name) for name in ("a", "b", "c"))
        self.large_worker = self.large.worker("a")
        self.worker.step(SMALL)
        self.large_worker.pull()


CALLS: dict[str, Callable[[Scene], object]] = {
    "Client.server_info": lambda scene: scene.client.server_info(),
    "Client.models": lambda scene: scene.client.models(),
    "Client.model": lambda scene: scene.client.model("small"),
    "Client.create_model": lambda scene: scene.client.create_model("new", SMALL),
    "Client.create_model of many chunks": lambda scene: scene.client.create_model("new", LARGE),
    "Client.delete_model": lambda scene: scene.client.delete_model("small"),
    "Model.info": lambda scene: scene.model.info(),
    "Model.worker": lambda scene: scene.model.worker("d"),
    "Model.pull_state": lambda scene: scene.model.pull_state(),
    "Model.put_state": lambda scene: scene.model.put_state(scene.state),
    "Model.put_state of many chunks": lambda scene: scene.large.put_state(scene.large_state),
    "Model.update": lambda scene: scene.model.update(policy=deltaserve.Bounded(slack=1)),
    "Model.save_snapshot": lambda scene: scene.model.save_snapshot(),
    "Model.snapshots": lambda scene: scene.model.snapshots(),
    "Model.extend": lambda scene: scene.model.extend({"x": np.zeros(3)}),
    "Model.delete": lambda scene: scene.model.delete(),
    "Worker.pull": lambda scene: scene.worker.pull(),
    "Worker.step": lambda scene: scene.worker.step(SMALL),
    "Worker.step of many chunks": lambda scene: scene.large_worker.step(LARGE),
    "Worker.get_push": lambda scene: scene.worker.get_push(),
    "Worker.weights": lambda scene: scene.fresh.weights,
    "Model.watch": lambda scene: next(scene.model.watch()),
}

AT_ONCE = {"Client.target", "Client.close", "Worker.close", "Worker.last_result", "Worker.rank", "Worker.version"}
"""Members that make no call, or whose call cannot fail."""


@pytest.fixture(scope="module")
def stopped(server_for_all: "ServerProcess") -> Iterator[Scene]:
    server = server_for_all
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        scene = Scene(client)
        client._connection.timeout_seconds = TIMEOUT
        server.signal(signal.SIGSTOP)
        yield scene
        server.signal(signal.SIGCONT)


def test_the_table_has_every_public_method() -> None:
    public = {
        f"{kind.__name__}.{name}"
        for kind in (Client, Model, Worker)
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }
    assert public == {name.partition(" of ")[0] for name in CALLS} | AT_ONCE


@pytest.mark.parametrize("name", CALLS)
def test_a_call_raises_within_its_timeout(name: str, stopped: Scene) -> None:
    began = monotonic()
    with pytest.raises(deltaserve.UnavailableError, match=rf"did not answer within {TIMEOUT:g} s"):
        CALLS[name](stopped)
    assert TIMEOUT * 0.9 < monotonic() - began < TIMEOUT + SLACK


def test_closing_a_worker_is_quick_and_raises_nothing(stopped: Scene) -> None:
    began = monotonic()
    stopped.closing.close()
    assert monotonic() - began < 2 + SLACK


def test_the_timeout_of_the_caller_applies(stopped: Scene) -> None:
    with deltaserve.connect(stopped.client.target, timeout_seconds=0.05) as client:
        began = monotonic()
        with pytest.raises(deltaserve.UnavailableError):
            client.models()
        assert monotonic() - began < SLACK
