"""G6: the same pushes in any order of arrival give the same reduction, and the same bits of weights and state."""

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
from planted_defects import FoldedByArrival

from deltaserve._common.optimizers import OPTIMIZERS, Adadelta, Optimizer
from deltaserve_server.memory import Budget, Range, Staging, initial_state
from deltaserve_server.memory.host import HostStore
from deltaserve_server.model import (
    Combine,
    Decision,
    Fold,
    Key,
    Layout,
    Machine,
    Push,
    Sync,
    Tensor,
    Update,
    versioned_model,
)

ORDERS = [range(1, 60), pytest.param(range(60, 1000), marks=pytest.mark.deep)]
"""Seeds of orders, by test."""

NAMES = ("a10", "B", "a9", "c", "zz", "a", "é")
LAYOUT = Layout((Tensor("w", (11, 3)), Tensor("b", (5,), 1), Tensor("x", (2,))))
NORMAL = np.random.default_rng(3)
WEIGHTS = [32.0, 0.1, 1.0, 7.0, 1e-9, 1e6, 3.3]

POLICIES = {
    "mean": Sync(),
    "mean, clipped": Sync(clip_norm=5.0),
    "mean, min_workers": Sync(min_workers=5),
    "mean, quorum": Sync(min_workers=3, quorum=len(NAMES), grace_seconds=2.0),
    "mean, quorum, never waiting": Sync(min_workers=len(NAMES), quorum=len(NAMES)),
    "mean, timeout": Sync(min_workers=2, round_timeout_seconds=60.0, clip_norm=3.0),
    "median": Sync(min_workers=3, reduction="median"),
    "median, clipped": Sync(reduction="median", clip_norm=5.0),
    "trimmed_mean": Sync(min_workers=5, reduction="trimmed_mean", trim=2, clip_norm=5.0),
    "trimmed_mean, quorum": Sync(min_workers=3, reduction="trimmed_mean", trim=1, quorum=7, grace_seconds=1.0),
}

CHOSEN = dict(zip(POLICIES, cycle([kind() for kind in OPTIMIZERS.values()]), strict=False))
"""The optimizer of each policy's test: an order must not show in the state of any."""

Gradients = dict[str, list[np.ndarray[tuple[int], np.dtype[np.float32]]]]


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def gradients() -> Gradients:
    """Two rounds' gradients by worker, of very different sizes: another order of summation gives other bits."""
    scale = dict(zip(NAMES, (1.0, 1e-4, 3e3, 0.3, 10.0, 1e4, 1.0), strict=True))
    return {name: [(NORMAL.standard_normal(40) * scale[name]).astype(np.float32) for _ in range(2)] for name in NAMES}


class Model:
    """A machine, and a store that carries out its decisions."""

    def __init__(self, policy: Sync, optimizer: Optimizer, executor: ThreadPoolExecutor) -> None:
        groups = (optimizer, replace(optimizer, lr=0.5, weight_decay=0.01))
        self.machine = Machine("m", LAYOUT, groups, policy)
        weights = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
        self.store = HostStore(initial_state(weights, LAYOUT, groups), 0, Budget(1 << 30), executor, 1)
        self._carried = (replace(optimizer, lr=0.75),) * 2
        self.reduction: list[tuple[Key, float]] = []
        self._staged: dict[Key, Staging] = {}

    def push(self, worker: str, sequence: int, gradient: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> None:
        session = self.machine.sessions.named(worker)
        assert session
        index = NAMES.index(worker)
        push = Push(
            session_id=session.id,
            epoch=session.epoch,
            sequence=sequence,
            base_version=sequence - 1,
            hyperparameters=self._carried if index % 3 == sequence else None,
            weight=WEIGHTS[index],
            fingerprint=index,
            norm=float(np.linalg.norm(gradient)),
        )
        staging = self.store.stage()
        staging.add(0, gradient)
        self._staged[push.key] = staging
        self.carry_out(self.machine.push(push, float(sequence)))

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Fold(key, factor):
                    self.reduction.append((key, factor))
                    self.store.fold(self._staged.pop(key), factor)
                case Combine(pushes, trim):
                    self.reduction += pushes
                    self.store.combine([(self._staged.pop(key), factor) for key, factor in pushes], trim)
                case Update(summary, weight, absent, counts):
                    ranges = LAYOUT.ranges(absent, summary.hyperparameters, counts)
                    self.store.update([Range(*part) for part in ranges], weight, summary.version)

    def bits(self) -> str:
        return hashlib.sha256(b"".join(vector.tobytes() for vector in self.store.state().vectors)).hexdigest()


def _train(
    policy: Sync, optimizer: Optimizer, gradients: Gradients, seed: int, executor: ThreadPoolExecutor
) -> tuple[str, list[object]]:
    """Runs two rounds. The seed gives the orders in which workers join and push. Returns bits and reductions."""
    chance = random.Random(seed)
    model = Model(policy, optimizer, executor)
    for name in chance.sample(NAMES, len(NAMES)):
        session_id = NAMES.index(name).to_bytes(16, "big")
        model.carry_out(model.machine.open_session(name, session_id, 1e6, 0.0)[1])
    for sequence in (1, 2):
        for name in chance.sample(NAMES, len(NAMES)):
            model.push(name, sequence, gradients[name][sequence - 1])
            if chance.random() < 0.2:
                model.carry_out(model.machine.tick(float(sequence))[1])
    assert model.machine.version == 2
    return model.bits(), list(model.reduction)


@pytest.mark.parametrize("orders", ORDERS, ids=len)
@pytest.mark.parametrize("name", POLICIES)
def test_any_order_of_arrival_gives_the_same_bits(
    name: str, orders: range, gradients: Gradients, executor: ThreadPoolExecutor
) -> None:
    policy, optimizer = POLICIES[name], CHOSEN[name]
    bits, reduction = _train(policy, optimizer, gradients, 0, executor)
    assert len(reduction) == 2 * len(NAMES)
    for seed in orders:
        assert _train(policy, optimizer, gradients, seed, executor) == (bits, reduction), f"seed {seed}"


def test_folds_in_the_order_of_arrival_would_give_other_bits(
    gradients: Gradients, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above can fail."""
    monkeypatch.setattr(versioned_model, "Round", FoldedByArrival)
    assert len({_train(Sync(), Adadelta(), gradients, seed, executor)[0] for seed in range(20)}) > 1
