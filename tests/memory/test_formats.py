"""Pushes of 16 bits give the bits of their float32 values."""

import numpy as np
import pytest
from tests.memory.store_states import PLAIN, MakeStore, Stage, assert_same_state, fresh

from deltaserve._common.optimizers import Adadelta
from deltaserve_server.memory import Budget, Range
from deltaserve_server.memory.store import Vector
from deltaserve_server.optimizers.formats import HalfPrecision, widened

SIZE = 300_001
RANGES = [Range(0, 100_000, PLAIN, 0), Range(100_007, SIZE, Adadelta(lr=0.5, weight_decay=0.1), 0)]


def random(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def half_precision(seed: int, bfloat16: bool) -> HalfPrecision:
    if bfloat16:
        return (random(seed).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return random(seed).astype(np.float16)


@pytest.mark.parametrize("chunk", [1000, 1 << 18])
@pytest.mark.parametrize("pushes", [1, 3])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_a_sum(make_store: MakeStore, stage: Stage, bfloat16: bool, pushes: int, chunk: int) -> None:
    stores = [make_store(fresh(random(0)), Budget(1 << 30)) for _ in range(2)]
    for number in range(1, 3):
        for k in range(pushes):
            sent = half_precision(10 * number + k, bfloat16)
            for store, values in zip(stores, (sent, widened(sent)), strict=True):
                store.fold(stage(store, values, chunk=chunk), 0.3 * (k + 1))
        changes = [store.update(RANGES, 1.7, number) for store in stores]
        assert changes[0] == pytest.approx(changes[1], rel=1e-12)
    assert_same_state(*stores)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_a_trimmed_mean(make_store: MakeStore, stage: Stage, bfloat16: bool) -> None:
    stores = [make_store(fresh(random(0)), Budget(1 << 30)) for _ in range(2)]
    sent = [half_precision(k, bfloat16) for k in range(1, 4)]
    runs = [(5, 40_000), (150_000, SIZE)]
    stores[0].combine([(stage(stores[0], values, runs, 9999), 0.7) for values in sent], 1)
    stores[1].combine([(stage(stores[1], widened(values), runs, 9999), 0.7) for values in sent], 1)
    for store in stores:
        store.update(RANGES, 1.0, 1)
    assert_same_state(*stores)


def test_a_sum_of_different_element_types(make_store: MakeStore, stage: Stage) -> None:
    stores = [make_store(fresh(random(0)), Budget(1 << 30)) for _ in range(2)]
    for values in (half_precision(1, True), random(2), half_precision(3, False)):
        stores[0].fold(stage(stores[0], values), 1.0)
        stores[1].fold(stage(stores[1], widened(values)), 1.0)
    for store in stores:
        store.update(RANGES, 3.0, 1)
    assert_same_state(*stores)


def test_an_extension_before_the_update(make_store: MakeStore, stage: Stage) -> None:
    stores = [make_store(fresh(random(0)), Budget(1 << 30)) for _ in range(2)]
    for store, values in zip(stores, (half_precision(1, True), widened(half_precision(1, True))), strict=True):
        store.fold(stage(store, values), 1.0)
        store.extend(fresh(np.ones(1000, np.float32)))
        store.update(RANGES, 1.0, 1)
    assert_same_state(*stores)


def test_values_that_become_nan_after_admission_do_not_reach_the_state(make_store: MakeStore) -> None:
    """A worker that shares its gradient's memory with the server can change it after admission."""
    store, weights = make_store(fresh(random(0)), Budget(1 << 30)), random(0)
    for number, value in enumerate((np.nan, np.inf, -np.inf), 1):
        gradient = random(number)
        staging = store.stage()
        staging.add(0, gradient)
        gradient[::3] = value
        store.fold(staging, 1.0)
        assert np.isfinite(store.update(RANGES, 1.0, number))
        assert all(np.isfinite(vector).all() for vector in store.state().vectors)
    assert not np.array_equal(store.current.weights, weights)
