"""Every transport gives the same bits and the same results."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.support.states import assert_same_state

import deltaserve
from deltaserve import Adadelta, Async, Bounded, Client, ModelState, Sync
from deltaserve._common.policies import Policy
from deltaserve._transport.protocol import TransportName
from deltaserve_server import LocalServer, ServerConfig

if TYPE_CHECKING:
    from tests.client.conftest import Eventually


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[Client]:
    """A client of a server on a Unix socket."""
    config = ServerConfig(bind=f"unix:{tmp_path}/server.sock", device="cpu")
    with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=30) as connected:
        yield connected


POLICIES: dict[str, Policy] = {
    "async": Async(),
    "bounded": Bounded(slack=3),
    "sync": Sync(min_workers=3),
    "median": Sync(min_workers=3, reduction="median"),
    "clipped": Sync(min_workers=3, clip_norm=2.0),
}

Gradients = dict[str, Any]


def _gradients(seed: int, shapes: dict[str, tuple[int, ...]]) -> Gradients:
    source = np.random.default_rng(seed)
    return {name: source.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _gradients_of(seed: int, k: int) -> Gradients:
    return _gradients(seed + k, SHAPES)


SHAPES: dict[str, tuple[int, ...]] = {"a": (263, 1001), "none": (0, 3), "b": (17,), "c": ()}
MORE: dict[str, tuple[int, ...]] = {"d": (33, 1000)}


class Run:
    """Three workers, a few rounds of everything that a worker can do, the same on every server.

    Args:
        client: To the server.
        policy: The model's.
        transports: The workers'.
        wait: Waits for a condition.
    """

    def __init__(
        self, client: Client, policy: Policy, transports: tuple[TransportName, ...], wait: "Eventually"
    ) -> None:
        groups = [Adadelta(lr=0.7), Adadelta(rho=0.8, weight_decay=0.01)]
        self.client, self._wait, self._transports = client, wait, transports
        self.sync = isinstance(policy, Sync)
        self.model = client.create_model(
            "m", _gradients(0, SHAPES), groups=groups, group_of={"a": 0, "none": 0, "b": 1, "c": 1}, policy=policy
        )
        self.workers = [self.model.worker(f"w{k}", transport=transport) for k, transport in enumerate(transports)]
        self.results: list[Any] = []
        self.pool = ThreadPoolExecutor(3)

    def round(self, gradients: Callable[[int], Gradients], **fields: Any) -> None:
        """Lets every worker step, one after the other unless they wait for each other."""
        for worker in self.workers:
            if self.sync:
                worker.pull(out=fields.get("out"))
        steps = []
        for k, worker in enumerate(self.workers):
            accepted = worker._session.sequence
            steps.append(self.pool.submit(worker.step, gradients(k), weight=k + 0.5, **fields))
            self._wait(partial(self._has, k, accepted))
        for step, worker in zip(steps, self.workers, strict=True):
            step.result()
            self.results.append(worker.last_result)

    def _has(self, k: int, number: int) -> bool:
        return self.workers[k]._session.keep().last_accepted_sequence >= number

    def all(self) -> tuple[ModelState, list[Any], list[Any]]:
        """Runs all rounds. Returns the state, the results and the workers' weights."""
        for seed in (10, 20):
            self.round(partial(_gradients_of, seed))
        self.round(lambda k: _gradients(30 + k, SHAPES) | ({"b": None} if k != 1 else {"a": None, "b": None}))
        own = [Adadelta(lr=0.1), Adadelta(lr=0.2, eps=1e-4)]
        out = {name: np.empty(shape, np.float32) for name, shape in SHAPES.items()}
        self.round(lambda k: _gradients(40 + k, SHAPES), hyperparameters=own)
        state = self.model.pull_state()
        self.model.put_state(state)
        self.round(lambda k: _gradients(50 + k, SHAPES))
        self.model.extend(_gradients(1, MORE), group_of={"d": 1})
        self.round(lambda k: _gradients(60 + k, SHAPES))
        last = self.workers[2]
        last.close()
        self.workers[2] = self.model.worker("w2", transport=self._transports[2])
        self.round(lambda k: _gradients(70 + k, SHAPES | MORE if k == 2 else SHAPES))
        if not self.sync:
            written = self.workers[0].step(_gradients(80, SHAPES), out=out)
            assert all(written[name] is out[name] for name in SHAPES)
        weights = [{name: array.copy() for name, array in worker.weights.items()} for worker in self.workers]
        self.pool.shutdown()
        return self.model.pull_state(), self.results, weights


def _check_equal(left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> None:
    assert left is not None
    assert right is not None
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize(
    "policy",
    ["async", "sync", *(pytest.param(name, marks=pytest.mark.deep) for name in ("bounded", "median", "clipped"))],
)
def test_every_transport_gives_the_same_bits_and_results(
    client: Client, unix: Client, policy: str, eventually: "Eventually"
) -> None:
    ways: list[tuple[Client, tuple[TransportName, ...]]] = [
        (client, ("stream",) * 3),
        (client, ("shared",) * 3),
        (client, ("stream", "shared", "auto")),
        (unix, ("stream", "stream", "auto")),
    ]
    runs = []
    for connected, transports in ways:
        with ExitStack() as stack:
            run = Run(connected, POLICIES[policy], transports, eventually)
            for k, transport in enumerate(transports):
                shared = getattr(run.workers[k]._membership.transport(), "memory", None) is not None
                assert shared == (transport != "stream")
                stack.callback(run.workers[k].close)
            runs.append(run.all())
        run.model.delete()
    expected, results, weights = runs[0]
    assert len(results) == 21
    for state, given, held in runs[1:]:
        assert state.version == expected.version
        assert_same_state(expected, state)
        assert given == results
        for left, right in zip(weights, held, strict=True):
            _check_equal(left, right)
