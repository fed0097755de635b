"""The weights of pushes in a sum, and the norm of an update's change."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.memory.store_states import (
    PLAIN,
    MakeStore,
    Stage,
    assert_same_state,
    for_each_optimizer,
    fresh,
    random,
    whole,
)

from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve_server.memory import Budget, Range
from deltaserve_server.memory.host import HostStore
from deltaserve_server.optimizers import reference

SIZE = 70_000
WHOLE = whole(SIZE)


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.1, 3.0, 1.0), (1e-9, 1e9), (1e-9, 3e-9, 1e-9), (1e9, 5e8, 7e8)])
def test_a_weighted_mean_is_close_to_float64(make_store: MakeStore, stage: Stage, factors: tuple[float, ...]) -> None:
    weights, gradients = random(SIZE, 0), [random(SIZE, k) for k in range(1, 1 + len(factors))]
    store = make_store(fresh(weights), Budget(1 << 30))
    for gradient, factor in zip(gradients, factors, strict=True):
        store.fold(stage(store, gradient), factor)
    store.update(WHOLE, sum(factors), 1)
    terms = [np.float64(factor) * gradient for gradient, factor in zip(gradients, factors, strict=True)]
    mean = np.add.reduce(terms) / sum(factors)
    (square_avg, _), expected = reference.update(PLAIN, mean, (np.zeros(SIZE),) * 2, weights, 1)
    # Where large terms cancel, the result has the error of the terms.
    largest = np.max(np.abs(terms), axis=0) / sum(factors)
    made = store.state()
    assert (np.abs(np.sqrt(made.slots[0] / 0.1) - np.sqrt(square_avg / 0.1)) <= 1e-6 * largest).all()
    near = np.abs(mean) > 0.1 * largest
    np.testing.assert_allclose(made.weights[near], expected[near], rtol=1e-5, atol=1e-6)


def test_the_bits_are_those_of_float32_products_and_sums_in_order(make_store: MakeStore, stage: Stage) -> None:
    factors = (0.1, 3.0, 1.0, 1e-3)
    weights, gradients = random(SIZE, 0), [random(SIZE, k) for k in range(1, 5)]
    store, single = (make_store(fresh(weights), Budget(1 << 30)) for _ in range(2))
    total = np.zeros(SIZE, np.float32)
    for gradient, factor in zip(gradients, factors, strict=True):
        store.fold(stage(store, gradient, chunk=1000), factor)
        total = total + np.float32(factor) * gradient
    single.fold(stage(single, total), 1.0)
    assert store.update(WHOLE, 4.101, 1) == pytest.approx(single.update(WHOLE, 4.101, 1), rel=1e-12)
    assert_same_state(store, single)


def test_a_single_push_is_divided_by_weight_over_factor(make_store: MakeStore, stage: Stage) -> None:
    weights, gradient = random(SIZE, 0), random(SIZE, 1)
    stores = [make_store(fresh(weights), Budget(1 << 30)) for _ in range(3)]
    cases = ((0.3, 0.9), (1.0, 0.9 / 0.3), (1.0, float(np.float32(0.9 / 0.3))))
    for store, (factor, weight) in zip(stores, cases, strict=True):
        store.fold(stage(store, gradient), factor)
        store.update(WHOLE, weight, 1)
    assert_same_state(stores[0], stores[1])
    assert_same_state(stores[0], stores[2])


@pytest.mark.parametrize("factor", [1e-9, 0.3, 7.0, 1e9])
def test_a_single_push_does_not_depend_on_its_factor(make_store: MakeStore, stage: Stage, factor: float) -> None:
    weights, gradient = random(SIZE, 0), random(SIZE, 1)
    stores = [make_store(fresh(weights), Budget(1 << 30)) for _ in range(2)]
    for store, own in zip(stores, (factor, 1.0), strict=True):
        store.fold(stage(store, gradient), own)
        store.update(WHOLE, own, 1)
    assert_same_state(*stores)


def test_zeros_in_a_sum_lose_their_sign(make_store: MakeStore, stage: Stage) -> None:
    """The host's sum starts at 0, and the GPU's as the first push, so the GPU must add 0."""
    negative = np.full(1000, -0.0, np.float32)
    store = make_store(fresh(negative), Budget(1 << 20))
    for _ in range(2):
        store.fold(stage(store, negative), 1.0)
    store.update(whole(1000), 2.0, 1)
    # -0 - lr * (+0) is -0, and -0 - lr * (-0) is 0.
    assert np.signbit(store.current.weights).all()


@for_each_optimizer
@pytest.mark.parametrize("weight", [1e-9, 1.0, 65536e9])
def test_any_weight_keeps_the_state_finite(
    make_store: MakeStore, stage: Stage, weight: float, optimizer: Optimizer
) -> None:
    largest = np.full(1000, (2.0 - 2.0**-23) * 2.0**63, np.float32)
    store = make_store(fresh(random(1000, 0), optimizer), Budget(1 << 20))
    for number in range(1, 4):
        for _ in range(number):
            store.fold(stage(store, largest), 1e9)
        assert np.isfinite(store.update(whole(1000, optimizer, number), weight, number))
        assert all(np.isfinite(vector).all() for vector in store.state().vectors)


@pytest.mark.parametrize("size", [1, 17, 1000, 300_001, 600_000])
def test_an_update_returns_the_norm_of_the_change(make_store: MakeStore, stage: Stage, size: int) -> None:
    weights = random(size, 0)
    store = make_store(fresh(weights), Budget(1 << 30))
    third = size // 3
    ranges = [Range(0, third, PLAIN, 0), Range(2 * third, size, Adadelta(lr=0.5, weight_decay=0.1), 0)]
    ranges = [part for part in ranges if part.start < part.stop]
    for number in range(1, 3):
        before = store.current.weights.astype(np.float64)
        store.fold(stage(store, random(size, number)), 1.0)
        change = store.update(ranges, 1.0, number)
        assert change == pytest.approx(np.linalg.norm(store.current.weights - before), rel=1e-6)
        assert change > 0


def test_an_update_without_ranges_changes_nothing(make_store: MakeStore, stage: Stage) -> None:
    store = make_store(fresh(random(10, 0)), Budget(1 << 20))
    store.fold(stage(store, random(10, 1), []), 2.0)
    assert store.update([], 2.0, 1) == 0


def test_the_norm_does_not_depend_on_the_threads(stage: Stage) -> None:
    size = 2_000_000
    weights, gradient = random(size, 0), random(size, 1)
    changes = set()
    for threads in (1, 2, 3, 5):
        with ThreadPoolExecutor(threads) as executor:
            store = HostStore(fresh(weights), 0, Budget(1 << 30), executor, threads)
            store.fold(stage(store, gradient), 1.0)
            changes.add(store.update(whole(size), 1.0, 1))
    assert len(changes) == 1
