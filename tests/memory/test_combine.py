"""Trimmed means of whole pushes, in every kind of store."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from tests.memory.store_states import MakeStore, Stage, assert_same_state, fresh, random, whole

from deltaserve._common.optimizers import Adadelta
from deltaserve._common.optimizers.definition import MAGNITUDE_MAX
from deltaserve_server.memory import Budget, Store
from deltaserve_server.memory.store import Vector

SIZE = 100_000
WHOLE = whole(SIZE)


def stated(gradients: Sequence[Vector], trim: int) -> Vector:
    """Computes the trimmed mean with numpy's sort."""
    ascending = np.sort(np.stack(gradients).astype(np.float64), axis=0)[trim : len(gradients) - trim]
    total = np.zeros(ascending.shape[1])
    for row in ascending:
        total = total + row
    mean: Vector = (total / len(ascending)).astype(np.float32)
    return mean


def assert_updated_with(
    store: Store, gradient: Vector, weights: Vector, make_store: MakeStore, stage: Stage, weight: float = 1.0
) -> None:
    """Updates `store` and compares its bits with a store that gets `gradient` as its only push."""
    single = make_store(fresh(weights), Budget(1 << 30))
    single.fold(stage(single, gradient), 1.0)
    ranges = whole(weights.size)
    changes = [store.update(ranges, weight, 1), single.update(ranges, 1.0, 1)]
    assert changes[0] == pytest.approx(changes[1], rel=1e-12)
    assert_same_state(store, single)


@pytest.mark.parametrize(("count", "trim"), [(1, 0), (3, 0), (3, 1), (4, 1), (9, 4), (67, 1)])
def test_a_trimmed_mean(make_store: MakeStore, stage: Stage, count: int, trim: int) -> None:
    weights, gradients = random(SIZE, 0), [random(SIZE, k) for k in range(1, 1 + count)]
    store = make_store(fresh(weights), Budget(1 << 30))
    store.combine([(stage(store, gradient), 1.0) for gradient in gradients], trim)
    # The update ignores the weight.
    assert_updated_with(store, stated(gradients, trim), weights, make_store, stage, weight=3.0)


def test_each_push_is_multiplied_first(make_store: MakeStore, stage: Stage) -> None:
    weights, gradients, factors = random(SIZE, 0), [random(SIZE, k) for k in range(1, 6)], (0.1, 1.0, 1e9, 1e-9, 0.7)
    store = make_store(fresh(weights), Budget(1 << 30))
    pushes = list(zip(gradients, factors, strict=True))
    store.combine([(stage(store, gradient), factor) for gradient, factor in pushes], 1)
    scaled = [gradient * np.float32(factor) for gradient, factor in pushes]
    assert_updated_with(store, stated(scaled, 1), weights, make_store, stage)


def test_the_order_of_the_pushes_does_not_change_a_bit(make_store: MakeStore, stage: Stage) -> None:
    weights, gradients = random(1000, 0), [random(1000, k) * 10.0 ** np.float32(k) for k in range(1, 5)]
    for gradient in gradients:
        gradient[::7] = 0.0
        gradient[::13] *= -1
    for order in itertools.permutations(gradients):
        store = make_store(fresh(weights), Budget(1 << 20))
        store.combine([(stage(store, gradient), 1.0) for gradient in order], 1)
        assert_updated_with(store, stated(gradients, 1), weights, make_store, stage)


@pytest.mark.parametrize("chunk", [1, 37, 4096, 33_333])
def test_chunks_do_not_change_a_bit(make_store: MakeStore, stage: Stage, chunk: int) -> None:
    size = 3000 if chunk == 1 else SIZE
    weights, gradients = random(size, 0), [random(size, k) for k in range(1, 5)]
    store = make_store(fresh(weights), Budget(1 << 30))
    chunks = (chunk, 1 << 18, chunk + 1, 2 * chunk)
    store.combine([(stage(store, g, chunk=length), 1.0) for g, length in zip(gradients, chunks, strict=True)], 1)
    assert_updated_with(store, stated(gradients, 1), weights, make_store, stage)


def test_missing_values_count_as_zero(make_store: MakeStore, stage: Stage) -> None:
    weights, gradients = random(SIZE, 0), [random(SIZE, k) for k in range(1, 6)]
    runs = [
        [(0, SIZE)],
        [(0, 10), (40_000, 90_000)],
        [(7, 70_000)],
        [],
        [(32_767, 32_769), (65_536, 65_537), (99_999, SIZE)],
    ]
    store = make_store(fresh(weights), Budget(1 << 30))
    filled = []
    for gradient, held in zip(gradients, runs, strict=True):
        filled.append(np.zeros(SIZE, np.float32))
        for start, stop in held:
            filled[-1][start:stop] = gradient[start:stop]
    pushes = [(stage(store, g, held, 9999), 1.0) for g, held in zip(gradients, runs, strict=True)]
    store.combine(pushes, 1)
    assert_updated_with(store, stated(filled, 1), weights, make_store, stage)


@pytest.mark.parametrize("combined_before", [False, True])
def test_an_extension_in_between(make_store: MakeStore, stage: Stage, combined_before: bool) -> None:
    more = 5000
    weights, gradients = random(SIZE, 0), [random(SIZE, k) for k in range(1, 6)]
    store = make_store(fresh(weights), Budget(1 << 30))
    pushes = [(stage(store, gradient), 1.0) for gradient in gradients]
    if combined_before:
        store.combine(pushes, 2)
    store.extend(fresh(random(more, 9)))
    if not combined_before:
        store.combine(pushes, 2)
    mean = np.concatenate([stated(gradients, 2), np.zeros(more, np.float32)])
    assert_updated_with(store, mean, np.concatenate([weights, random(more, 9)]), make_store, stage)


@pytest.mark.parametrize(("count", "trim"), [(0, 0), (1, 1), (2, 1), (4, 2), (3, -1)])
def test_too_few_pushes_are_refused_and_nothing_changes(
    make_store: MakeStore, stage: Stage, count: int, trim: int
) -> None:
    weights, gradient = random(SIZE, 0), random(SIZE, 1)
    store = make_store(fresh(weights), Budget(1 << 30))
    with pytest.raises(ValueError, match="pushes"):
        store.combine([(stage(store, gradient), 1.0)] * count, trim)
    store.fold(stage(store, gradient), 1.0)
    assert_updated_with(store, gradient, weights, make_store, stage)


def test_an_update_has_only_one_gradient(make_store: MakeStore, stage: Stage) -> None:
    store = make_store(fresh(random(SIZE, 0)), Budget(1 << 30))
    pushes = [(stage(store, random(SIZE, k)), 1.0) for k in range(3)]
    for before in (1, 2):
        for k in range(before):
            store.fold(stage(store, random(SIZE, k)), 1.0)
        with pytest.raises(ValueError, match="already"):
            store.combine(pushes, 1)
        store.update(WHOLE, before, before)
    store.combine(pushes, 1)
    with pytest.raises(ValueError, match="already"):
        store.combine(pushes, 1)


def test_sums_and_means_may_alternate(make_store: MakeStore, stage: Stage) -> None:
    weights, gradients = random(SIZE, 0), [random(SIZE, k) for k in range(1, 5)]
    store, single = (make_store(fresh(weights), Budget(1 << 30)) for _ in range(2))
    for number in range(1, 5):
        if number % 2:
            store.combine([(stage(store, gradient), 1.0) for gradient in gradients], 1)
            single.fold(stage(single, stated(gradients, 1)), 1.0)
        else:
            for each in (store, single):
                each.fold(stage(each, gradients[0]), 2.0)
                each.fold(stage(each, gradients[1]), 1.0)
        store.update(WHOLE, 3.0, number)
        single.update(WHOLE, 1.0 if number % 2 else 3.0, number)
        np.testing.assert_array_equal(store.current.weights, single.current.weights)


def test_a_liar_cannot_move_a_weight_out_of_the_honest_range(make_store: MakeStore, stage: Stage) -> None:
    honest = [random(SIZE, k) for k in range(1, 4)]
    lie = np.where(random(SIZE, 9) > 0, MAGNITUDE_MAX, -MAGNITUDE_MAX).astype(np.float32)
    # With weights of 0 and rho = 1 each step equals the gradient.
    itself = whole(SIZE, Adadelta(rho=1.0))
    for place in range(4):
        store = make_store(fresh(np.zeros(SIZE, np.float32)), Budget(1 << 30))
        gradients = [*honest[:place], lie, *honest[place:]]
        store.combine([(stage(store, gradient), 1.0) for gradient in gradients], 1)
        store.update(itself, 1.0, 1)
        assert (-store.current.weights >= np.min(honest, axis=0)).all()
        assert (-store.current.weights <= np.max(honest, axis=0)).all()
