"""One conformance suite for every kind of store, and for optimizers of 0 to 3 slots.

A store's bits are those of the kernel, called once for each range; that the kernel is right is shown elsewhere.
"""

from itertools import pairwise

import numpy as np
import pytest
from tests.memory.store_states import (
    OPTIMIZERS,
    PLAIN,
    MakeStore,
    Stage,
    assert_same_state,
    bits,
    for_each_optimizer,
    fresh,
    named,
    other,
    random,
    whole,
)

from deltaserve._common.optimizers import SGD, Adagrad, Adam, Optimizer
from deltaserve_server.memory import Budget, BudgetExceeded, Range, State, Store, initial_state
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import Layout, Tensor
from deltaserve_server.optimizers import cpu


class Oracle:
    """The expected state, from one call of the CPU kernel for each range."""

    def __init__(self, state: State) -> None:
        self.state = state

    def update(self, gradient: Vector, divisor: float, ranges: list[Range]) -> None:
        for part in ranges:
            at = slice(part.start, part.stop)
            slots, weights = [slot[at] for slot in self.state.slots], self.state.weights[at]
            cpu.update(gradient[at], divisor, slots, weights.copy(), weights, part.optimizer, part.count)

    def check(self, store: Store) -> None:
        assert bits(store.state()) == bits(self.state)
        np.testing.assert_array_equal(store.current.weights, self.state.weights)


@for_each_optimizer
@pytest.mark.parametrize("size", [1, 5, 1000, 300_001])
def test_an_update_is_the_kernels(make_store: MakeStore, stage: Stage, size: int, optimizer: Optimizer) -> None:
    state, half, second = fresh(random(size, 0), optimizer), size // 2, other(optimizer)
    store, oracle = make_store(state.copy(), Budget(1 << 30)), Oracle(state)
    for step in range(1, 4):
        first = Range(0, half or size, optimizer, optimizer.relevant_count(step))
        ranges = [first, Range(half, size, second, second.relevant_count(step + 7))] if half else [first]
        gradient = random(size, step)
        store.fold(stage(store, gradient, [(0, size)]), 1.0)
        store.update(ranges, 1.0, step)
        oracle.update(gradient, 1.0, ranges)
        assert store.current.number == step
    oracle.check(store)


def test_a_round_applies_the_mean_summed_in_the_order_of_folds(make_store: MakeStore, stage: Stage) -> None:
    size = 70_000
    state, gradients = fresh(random(size, 0)), [random(size, k) * 10.0**k for k in range(1, 4)]
    store, oracle = make_store(state.copy(), Budget(1 << 30)), Oracle(state)
    for gradient in gradients:
        store.fold(stage(store, gradient, [(0, size)]), 1.0)
    store.update(whole(size), 3.0, 1)
    total = (gradients[0] + gradients[1]) + gradients[2]  # float32, in this order: the expected bits
    oracle.update(total, 3.0, whole(size))
    oracle.check(store)


@for_each_optimizer
def test_elements_outside_the_ranges_do_not_change(make_store: MakeStore, stage: Stage, optimizer: Optimizer) -> None:
    size, kept = 300_000, slice(100, 200_000)
    state, gradient = fresh(random(size, 0), optimizer), random(size, 1)
    store = make_store(state.copy(), Budget(1 << 30))
    ranges = [Range(0, 100, optimizer, 1), Range(200_000, size, optimizer, 1)]
    store.fold(stage(store, gradient, [(0, 100), (200_000, size)]), 1.0)
    store.update(ranges, 1.0, 1)
    for before, after in zip(state.vectors, store.state().vectors, strict=True):
        np.testing.assert_array_equal(after[kept], before[kept])
        for changed in slice(0, 100), slice(200_000, size):  # a step may be too small for a few
            assert np.mean(after[changed] != before[changed]) > 0.9


def test_missing_values_of_one_push_count_as_zero(make_store: MakeStore, stage: Stage) -> None:
    size = 1000
    state, first, second = fresh(random(size, 0)), random(size, 1), random(size, 2)
    store, oracle = make_store(state.copy(), Budget(1 << 30)), Oracle(state)
    store.fold(stage(store, first, [(0, 400)]), 1.0)
    store.fold(stage(store, second, [(100, 900)]), 1.0)
    store.update(whole(900), 2.0, 1)
    total = np.zeros(size, np.float32)
    total[:400] += first[:400]
    total[100:900] += second[100:900]
    oracle.update(total, 2.0, whole(900))
    oracle.check(store)


@for_each_optimizer
@pytest.mark.parametrize("chunk", [1, 7, 262_144])
def test_chunks_do_not_change_a_bit(make_store: MakeStore, stage: Stage, chunk: int, optimizer: Optimizer) -> None:
    size = 3_000 if chunk < 10 else 600_000
    weights, gradient = random(size, 0), random(size, 1)
    stores = [make_store(fresh(weights, optimizer), Budget(1 << 30)) for _ in range(2)]
    for store, length in zip(stores, (chunk, size), strict=True):
        store.fold(stage(store, gradient, [(0, size)], length), 1.0)
        store.update(whole(size, optimizer), 1.0, 1)
    assert_same_state(*stores)


@for_each_optimizer
def test_any_split_into_ranges_gives_the_same_bits(make_store: MakeStore, stage: Stage, optimizer: Optimizer) -> None:
    size = 300_001
    weights, cuts = random(size, 0), [0, 1, 17, 1000, 262_144, 262_145, 300_000, size]
    stores = [make_store(fresh(weights, optimizer), Budget(1 << 30)) for _ in range(2)]
    for number in range(1, 3):
        count = optimizer.relevant_count(number)
        split = [Range(low, high, optimizer, count) for low, high in pairwise(cuts)]
        for store, ranges in zip(stores, (split, whole(size, optimizer, number)), strict=True):
            store.fold(stage(store, random(size, number)), 1.0)
            store.update(ranges, 1.0, number)
    assert_same_state(*stores)


def test_an_update_of_nothing_is_a_version(make_store: MakeStore, stage: Stage) -> None:
    weights = random(10, 0)
    store = make_store(fresh(weights), Budget(1 << 30))
    store.fold(stage(store, weights, []), 1.0)
    store.update([], 1.0, 1)
    assert store.current.number == 1
    np.testing.assert_array_equal(store.current.weights, weights)


def test_an_acquired_version_does_not_change(make_store: MakeStore, stage: Stage) -> None:
    size = 1000
    store = make_store(fresh(random(size, 0)), Budget(1 << 20))
    read = store.current
    weights = read.acquire()
    before = weights.copy()
    for step in range(1, 5):
        store.fold(stage(store, random(size, step), [(0, size)]), 1.0)
        store.update(whole(size), 1.0, step)
    np.testing.assert_array_equal(weights, before)
    read.release()


def test_a_second_acquired_version_is_reserved_once(make_store: MakeStore, stage: Stage) -> None:
    budget = Budget(4000)
    store = make_store(fresh(random(1000, 0)), budget)
    read = []
    for number in range(1, 3):
        read += [store.current, store.current]
        for version in read[-2:]:
            version.acquire()
        store.fold(stage(store, random(1000, number), [(0, 1000)]), 1.0)
        store.update(whole(1000), 1.0, number)
    assert budget.available == 0
    with pytest.raises(BudgetExceeded) as refused:
        store.current.acquire()
    assert (refused.value.needed, refused.value.available, refused.value.is_temporary) == (4000, 0, True)
    for version in read:
        version.release()
    assert budget.available == 4000


@for_each_optimizer
def test_put_replaces_all_vectors(make_store: MakeStore, stage: Stage, optimizer: Optimizer) -> None:
    store = make_store(fresh(random(100, 0), optimizer), Budget(1 << 20))
    state = State(random(100, 1), tuple(random(100, 2 + k) ** 2 for k in range(len(optimizer.slots))))
    store.put(state.copy(), 7)
    assert store.current.number == 7
    assert bits(store.state()) == bits(state)
    oracle = Oracle(state)
    store.fold(stage(store, random(100, 9)), 1.0)
    store.update(whole(100, optimizer, 8), 1.0, 8)
    oracle.update(random(100, 9), 1.0, whole(100, optimizer, 8))
    oracle.check(store)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, Adagrad(initial_accumulator_value=0.5)], ids=named)
def test_extend_keeps_the_state_and_the_pending_sum(make_store: MakeStore, stage: Stage, optimizer: Optimizer) -> None:
    size, more = 1000, 500
    weights, gradients = random(size, 0), [random(size, 1), random(size, 2), random(size + more, 3)]
    store = make_store(fresh(weights, optimizer), Budget(1 << 20))
    oracle = Oracle(fresh(np.concatenate([weights, random(more, 4)]), optimizer))
    store.fold(stage(store, random(size, 5)), 1.0)
    store.update(whole(size, optimizer), 1.0, 1)
    oracle.update(random(size, 5), 1.0, whole(size, optimizer))
    for gradient in gradients[:2]:
        store.fold(stage(store, gradient, [(0, size)]), 1.0)
    store.extend(fresh(random(more, 4), optimizer))
    assert store.current.number == 1
    store.fold(stage(store, gradients[2], [(0, size + more)]), 1.0)
    old, new = optimizer.relevant_count(2), optimizer.relevant_count(1)
    ranges = [Range(0, size, optimizer, old), Range(size, size + more, optimizer, new)]
    store.update(ranges, 3.0, 2)
    total = np.zeros(size + more, np.float32)
    for gradient in gradients:
        total[: gradient.size] += gradient
    oracle.update(total, 3.0, ranges)
    oracle.check(store)


def test_new_versions_are_aligned_for_streaming_stores_and_reused(make_store: MakeStore, stage: Stage) -> None:
    size = 2_000_003
    store = make_store(State(unaligned(random(size, 0)), fresh(random(size, 0)).slots), Budget(1 << 30))
    addresses = set()
    for number in range(1, 8):
        store.fold(stage(store, random(size, number)), 1.0)
        store.update(whole(size), 1.0, number)
        addresses.add(store.current.weights.ctypes.data)
    assert {address % 64 for address in addresses} == {0}
    assert len(addresses) <= 3, "the pool reuses vectors"


def unaligned(vector: Vector) -> Vector:
    """Returns a copy at an address that is a multiple of 4 only."""
    room = np.empty(vector.size + 32, np.float32)
    first = (-room.ctypes.data % 64) // 4 + 1
    made = room[first : first + vector.size]
    made[:] = vector
    return made


# --- the state before the first update


@for_each_optimizer
def test_slots_begin_with_zeros(optimizer: Optimizer) -> None:
    weights = random(10, 0)
    state = initial_state(weights, Layout((Tensor("w", (10,)),)), [optimizer])
    assert state.weights is weights
    assert [slot.tolist() for slot in state.slots] == [[0.0] * 10] * len(optimizer.slots)


def test_each_group_has_its_own_initial_value() -> None:
    layout = Layout((Tensor("a", (2,), 1), Tensor("b", (3,)), Tensor("none", (0,), 2), Tensor("c", (1, 1), 2)))
    groups = [Adagrad(), Adagrad(initial_accumulator_value=0.5), Adagrad(initial_accumulator_value=2)]
    (total,) = initial_state(random(6, 0), layout, groups).slots
    assert total.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0, 2.0]


def test_a_state_names_no_slot_that_is_not_there() -> None:
    state = fresh(random(3, 0), SGD())
    assert (state.slots, len(state.pieces()), state.copy().slots) == ((), 1, ())
    assert [offset for offset, _ in fresh(random(3, 0), Adam(amsgrad=True)).pieces()] == [0] * 4
    assert len(fresh(random(3, 0), PLAIN).vectors) == 3
