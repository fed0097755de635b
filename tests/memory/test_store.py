"""One conformance suite for every kind of store."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaserve_server.memory import Budget, BudgetExceeded, Range, Staging, State, Store
from deltaserve_server.memory.store import Vector
from deltaserve_server.optimizers import Hyperparameters, reference

MakeStore = Callable[[Vector, Budget], Store]
Stage = Callable[..., Staging]

PLAIN = Hyperparameters()
OTHER = Hyperparameters(lr=0.5, rho=0.8, eps=1e-3, weight_decay=0.1, maximize=True)


def random(size: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


class Oracle:
    """The expected state, in float64 by the reference."""

    def __init__(self, weights: Vector) -> None:
        self.weights = weights.astype(np.float64)
        self.square_avg = np.zeros(weights.size)
        self.acc_delta = np.zeros(weights.size)

    def update(self, gradient: NDArray[np.float64], ranges: list[Range]) -> None:
        for part in ranges:
            at = slice(part.start, part.stop)
            self.square_avg[at], self.acc_delta[at], self.weights[at] = reference.update(
                gradient[at], self.square_avg[at], self.acc_delta[at], self.weights[at], part.hyperparameters
            )

    def check(self, store: Store) -> None:
        state = store.state()
        np.testing.assert_array_equal(state.weights, store.current.weights)
        np.testing.assert_allclose(state.weights, self.weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.square_avg, self.square_avg, rtol=1e-5)
        np.testing.assert_allclose(state.acc_delta, self.acc_delta, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 1000, 300_001])
def test_an_update_is_adadelta(make_store: MakeStore, stage: Stage, size: int) -> None:
    weights = random(size, 0)
    store, oracle = make_store(weights.copy(), Budget(1 << 30)), Oracle(weights)
    half = size // 2
    ranges = [Range(0, half, PLAIN), Range(half, size, OTHER)] if half else [Range(0, size, PLAIN)]
    for step in range(1, 4):
        gradient = random(size, step)
        store.fold(stage(store, gradient, [(0, size)]), 1.0)
        store.update(ranges, 1.0, step)
        oracle.update(gradient.astype(np.float64), ranges)
        assert store.current.number == step
    oracle.check(store)


def test_a_round_applies_the_mean_summed_in_the_order_of_folds(make_store: MakeStore, stage: Stage) -> None:
    size = 70_000
    weights, gradients = random(size, 0), [random(size, k) * 10.0**k for k in range(1, 4)]
    store, oracle = make_store(weights.copy(), Budget(1 << 30)), Oracle(weights)
    ranges = [Range(0, size, PLAIN)]
    for gradient in gradients:
        store.fold(stage(store, gradient, [(0, size)]), 1.0)
    store.update(ranges, 3.0, 1)
    total = (gradients[0] + gradients[1]) + gradients[2]  # float32, in this order: the expected bits
    oracle.update(total.astype(np.float64) / 3, ranges)
    oracle.check(store)
    single = make_store(weights.copy(), Budget(1 << 30))
    single.fold(stage(single, total, [(0, size)]), 1.0)
    single.update(ranges, 3.0, 1)
    np.testing.assert_array_equal(single.current.weights, store.current.weights)


def test_elements_outside_the_ranges_do_not_change(make_store: MakeStore, stage: Stage) -> None:
    size, kept = 300_000, slice(100, 200_000)
    weights, gradient = random(size, 0), random(size, 1)
    store = make_store(weights.copy(), Budget(1 << 30))
    ranges = [Range(0, 100, PLAIN), Range(200_000, size, PLAIN)]
    store.fold(stage(store, gradient, [(0, 100), (200_000, size)]), 1.0)
    store.update(ranges, 1.0, 1)
    state = store.state()
    np.testing.assert_array_equal(state.weights[kept], weights[kept])
    assert not state.square_avg[kept].any()
    assert state.square_avg[:100].all()
    assert state.square_avg[200_000:].all()


def test_missing_values_of_one_push_count_as_zero(make_store: MakeStore, stage: Stage) -> None:
    size = 1000
    weights, first, second = random(size, 0), random(size, 1), random(size, 2)
    store, oracle = make_store(weights.copy(), Budget(1 << 30)), Oracle(weights)
    store.fold(stage(store, first, [(0, 400)]), 1.0)
    store.fold(stage(store, second, [(100, 900)]), 1.0)
    ranges = [Range(0, 900, PLAIN)]
    store.update(ranges, 2.0, 1)
    total = np.zeros(size, np.float32)
    total[:400] += first[:400]
    total[100:900] += second[100:900]
    oracle.update(total.astype(np.float64) / 2, ranges)
    oracle.check(store)


@pytest.mark.parametrize("chunk", [1, 7, 262_144])
def test_chunks_do_not_change_a_bit(make_store: MakeStore, stage: Stage, chunk: int) -> None:
    size = 3_000 if chunk < 10 else 600_000
    weights, gradient = random(size, 0), random(size, 1)
    stores = [make_store(weights.copy(), Budget(1 << 30)) for _ in range(2)]
    for store, length in zip(stores, (chunk, size), strict=True):
        store.fold(stage(store, gradient, [(0, size)], length), 1.0)
        store.update([Range(0, size, OTHER)], 1.0, 1)
    np.testing.assert_array_equal(stores[0].current.weights, stores[1].current.weights)


def test_an_update_of_nothing_is_a_version(make_store: MakeStore, stage: Stage) -> None:
    weights = random(10, 0)
    store = make_store(weights.copy(), Budget(1 << 30))
    store.fold(stage(store, weights, []), 1.0)
    store.update([], 1.0, 1)
    assert store.current.number == 1
    np.testing.assert_array_equal(store.current.weights, weights)


def test_an_acquired_version_does_not_change(make_store: MakeStore, stage: Stage) -> None:
    size = 1000
    store = make_store(random(size, 0), Budget(1 << 20))
    read = store.current
    weights = read.acquire()
    before = weights.copy()
    for step in range(1, 5):
        store.fold(stage(store, random(size, step), [(0, size)]), 1.0)
        store.update([Range(0, size, PLAIN)], 1.0, step)
    np.testing.assert_array_equal(weights, before)
    read.release()


def test_a_second_acquired_version_is_reserved_once(make_store: MakeStore, stage: Stage) -> None:
    budget = Budget(4000)
    store = make_store(random(1000, 0), budget)
    read = []
    for number in range(1, 3):
        read += [store.current, store.current]
        for version in read[-2:]:
            version.acquire()
        store.fold(stage(store, random(1000, number), [(0, 1000)]), 1.0)
        store.update([Range(0, 1000, PLAIN)], 1.0, number)
    assert budget.available == 0
    with pytest.raises(BudgetExceeded) as refused:
        store.current.acquire()
    assert (refused.value.needed, refused.value.available, refused.value.is_temporary) == (4000, 0, True)
    for version in read:
        version.release()
    assert budget.available == 4000


def test_put_replaces_all_vectors(make_store: MakeStore, stage: Stage) -> None:
    store = make_store(random(100, 0), Budget(1 << 20))
    state = State(random(100, 1), random(100, 2) ** 2, random(100, 3) ** 2)
    store.put(State(*(vector.copy() for vector in (state.weights, state.square_avg, state.acc_delta))), 7)
    assert store.current.number == 7
    got = store.state()
    for name in ("weights", "square_avg", "acc_delta"):
        np.testing.assert_array_equal(getattr(got, name), getattr(state, name))


def test_extend_keeps_the_state_and_the_pending_sum(make_store: MakeStore, stage: Stage) -> None:
    size, more = 1000, 500
    weights, gradients = random(size, 0), [random(size, 1), random(size, 2), random(size + more, 3)]
    store, oracle = make_store(weights.copy(), Budget(1 << 20)), Oracle(np.concatenate([weights, random(more, 4)]))
    for gradient in gradients[:2]:
        store.fold(stage(store, gradient, [(0, size)]), 1.0)
    store.extend(random(more, 4))
    assert store.current.number == 0
    store.fold(stage(store, gradients[2], [(0, size + more)]), 1.0)
    ranges = [Range(0, size + more, PLAIN)]
    store.update(ranges, 3.0, 1)
    total = np.zeros(size + more, np.float32)
    for gradient in gradients:
        total[: gradient.size] += gradient
    oracle.update(total.astype(np.float64) / 3, ranges)
    oracle.check(store)


def test_new_versions_are_aligned_for_streaming_stores_and_reused(make_store: MakeStore, stage: Stage) -> None:
    size = 2_000_003
    weights = random(size, 0)
    store = make_store(unaligned(weights), Budget(1 << 30))
    addresses = set()
    for number in range(1, 8):
        store.fold(stage(store, random(size, number)), 1.0)
        store.update([Range(0, size, PLAIN)], 1.0, number)
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
