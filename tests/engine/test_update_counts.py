"""What the engine does with the number of updates of each tensor: several updates in one event, and extensions."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from deltaserve._common.optimizers import SGD, Adagrad, Adam, Optimizer
from deltaserve_server.config import ServerConfig
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.engine.quotas import Quotas
from deltaserve_server.memory import Budget, State, initial_state
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import Async, Layout, Machine, Policy, Push, Session, Sync, Tensor
from deltaserve_server.optimizers import cpu

LAYOUT = Layout((Tensor("a", (3,)), Tensor("b", (2, 2))))
BUDGET = Budget(1 << 20)
COUNTING = pytest.mark.parametrize(
    "optimizer",
    [Adam(), SGD(momentum=0.9, dampening=0.5), Adagrad(lr_decay=0.1, initial_accumulator_value=0.5)],
    ids=lambda optimizer: optimizer.kind,
)


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def values(seed: int, size: int = LAYOUT.size) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


class Model:
    """An engine without a server, and what its state should be: the kernel's work on one tensor at a time."""

    def __init__(self, optimizer: Optimizer, policy: Policy, executor: ThreadPoolExecutor) -> None:
        self.optimizer, self.layout = optimizer, LAYOUT
        self.state = initial_state(values(0), LAYOUT, [optimizer])
        self.counts = [0] * len(LAYOUT.tensors)
        machine = Machine("m", LAYOUT, [optimizer], policy)
        store = HostStore(self.state.copy(), 0, BUDGET, executor, 1)
        self.engine = ModelEngine(machine, store, BUDGET.reserve(0), "incarnation", lambda _: None)

    def push(self, session: Session, gradient: Vector, absent: frozenset[int] = frozenset()) -> None:
        staging = self.engine.stage()
        for index, (start, stop) in enumerate(pairwise(self.layout.offsets)):
            if index not in absent:
                staging.add(start, gradient[start:stop])
        push = Push(
            session_id=session.id,
            epoch=session.epoch,
            sequence=session.last_accepted + 1,
            absent=absent,
            fingerprint=session.last_accepted,
        )
        self.engine.push(push, staging, BUDGET.reserve(0))

    def expect(self, gradient: Vector, absent: frozenset[int] = frozenset()) -> None:
        for index in {*range(len(self.layout.tensors))} - absent:
            self.counts[index] += 1
            at = slice(self.layout.offsets[index], self.layout.offsets[index + 1])
            weights, slots = self.state.weights[at], [slot[at] for slot in self.state.slots]
            count = self.optimizer.relevant_count(self.counts[index])
            cpu.update(gradient[at], 1.0, slots, weights.copy(), weights, self.optimizer, count)

    def check(self) -> None:
        with self.engine.lock:
            state = self.engine.state()
        assert self.engine.machine.update_counts == tuple(self.counts)
        for expected, got in zip(self.state.vectors, state.vectors, strict=True):
            np.testing.assert_array_equal(got, expected)


@COUNTING
def test_each_update_of_an_event_has_its_own_counts(optimizer: Optimizer, executor: ThreadPoolExecutor) -> None:
    """Pushes that wait in a round become updates of their own when the rounds end, all of them in one event."""
    model, absent = Model(optimizer, Sync(), executor), frozenset({1})
    b, c, *_ = (model.engine.open_session(name, 30.0) for name in "bca")
    model.push(c, values(1))
    model.push(b, values(2), absent)
    assert model.engine.machine.version == 0
    model.engine.change((optimizer,), Async())
    assert model.engine.machine.version == 2
    model.expect(values(2), absent)
    model.expect(values(1))
    model.check()


@COUNTING
def test_counts_that_are_put_or_begin_with_an_extension(optimizer: Optimizer, executor: ThreadPoolExecutor) -> None:
    model = Model(optimizer, Async(), executor)
    worker = model.engine.open_session("w", 30.0)
    for number in range(1, 3):
        model.push(worker, values(number))
        model.expect(values(number))
    model.check()
    state = State(values(3), tuple(values(4) ** 2 for _ in optimizer.slots))
    model.engine.put_state(state.copy(), [7, 0])
    model.state, model.counts = state, [7, 0]
    model.push(worker, values(5), frozenset({0}))
    model.expect(values(5), frozenset({0}))
    model.check()
    added = (Tensor("c", (5,), 1),)
    model.engine.extend(added, [optimizer], values(6, 5), BUDGET.reserve(0))
    model.layout = LAYOUT.extended(added)
    begins = [np.full(5, slot.initial, np.float32) for slot in optimizer.slots]
    new = (values(6, 5), *begins)
    weights, *slots = (np.concatenate(pair) for pair in zip(model.state.vectors, new, strict=True))
    model.state, model.counts = State(weights, tuple(slots)), [7, 1, 0]
    model.check()
    model.push(model.engine.open_session("w", 30.0), values(7, 12))
    model.expect(values(7, 12))
    model.check()


def test_memory_is_reserved_for_the_slots_that_there_are(tmp_path: Path) -> None:
    plain, durable = (Quotas(config, 1 << 20) for config in (ServerConfig(), ServerConfig(data_dir=tmp_path)))
    assert [plain.model_bytes(10, slots) for slots in range(4)] == [160, 200, 240, 280]
    assert [durable.model_bytes(10, slots) for slots in range(4)] == [160, 240, 320, 400]
    reservation = plain.reserve_model(10, 2)
    assert plain.memory.available == (1 << 20) - 240
    reservation.release()
