"""The gradients against finite differences in float64, and what stale memory must not change."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaserve_server.recipes import linear, network

Arrays = Mapping[str, NDArray[np.float64]]


def differences(loss: Callable[[Arrays], float], weights: Arrays) -> dict[str, NDArray[np.float64]]:
    """Central differences, element by element."""
    step, found = 1e-6, {}
    for name, array in weights.items():
        slope = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            around = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in weights.items()}
                moved[name][index] += sign * step
                around.append(loss(moved))
            slope[index] = (around[0] - around[1]) / (2 * step)
        found[name] = slope
    return found


def test_network() -> None:
    random = np.random.default_rng(1)
    x, y = random.standard_normal((7, 4)), random.integers(0, 3, 7)
    weights = {name: array.astype(np.float64) for name, array in network.initial_weights(4, 5, 3, seed=2).items()}
    weights["hidden.bias"] += 0.1
    by_hand = network.gradients(weights, x, y)  # type: ignore[arg-type]  # float64, to tell errors from rounding
    by_difference = differences(lambda w: network.loss(w, x, y), weights)  # type: ignore[arg-type]
    assert by_hand.keys() == weights.keys()
    for name, slope in by_difference.items():
        np.testing.assert_allclose(by_hand[name], slope, atol=1e-8, rtol=1e-6)


def test_linear() -> None:
    random = np.random.default_rng(1)
    x, y = random.standard_normal((7, 5)), random.standard_normal(7)
    weights = {"w": random.standard_normal((5, 1)), "b": random.standard_normal(1)}
    by_hand = linear.gradients(weights["w"], weights["b"], x, y)  # type: ignore[arg-type]
    by_difference = differences(lambda v: linear.loss(v["w"], v["b"], x, y), weights)  # type: ignore[arg-type]
    for name, slope in by_difference.items():
        np.testing.assert_allclose(by_hand[name], slope, atol=1e-8, rtol=1e-6)


def test_softmax_of_huge_scores_is_finite() -> None:
    probability = network.softmax(np.array([[1e30, 0.0, -1e30]], np.float32))
    assert probability.tolist() == [[1.0, 0.0, 0.0]]


def test_a_batch_without_examples_has_no_gradient() -> None:
    weights = network.initial_weights(4, 5, 3, seed=0)
    none = network.gradients(weights, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert all(not array.any() and array.shape == weights[name].shape for name, array in none.items())


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_weights_are_float32_and_of_the_seed(seed: int) -> None:
    first, again = network.initial_weights(64, 128, 10, seed), network.initial_weights(64, 128, 10, seed)
    other = network.initial_weights(64, 128, 10, seed + 10)
    assert all(array.dtype == np.float32 for array in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["hidden.weight"], other["hidden.weight"])


def fill_blas_buffers() -> None:
    """Leaves signalling NaNs in the buffers of numpy's BLAS."""
    numbers = np.empty((150, 150), np.float32)
    numbers.view(np.uint32)[:] = 0x7FA00000
    with np.errstate(all="ignore"):
        for product in (numbers @ numbers, numbers @ numbers[:, 0], numbers.T @ numbers[:, :1]):
            assert np.isnan(product).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 19])
def test_stale_memory_of_blas_causes_no_floating_point_error(count: int) -> None:
    random = np.random.default_rng(count)
    x, y = random.standard_normal((count, 5)).astype(np.float32), random.standard_normal(count).astype(np.float32)
    scratch, hidden = linear.initial_weights(5, 1), network.initial_weights(5, 7, 3, 1)
    with np.errstate(all="raise", under="ignore"):
        fill_blas_buffers()
        found = [*linear.gradients(**scratch, x=x, y=y).values(), linear.errors(**scratch, x=x, y=y)]
        fill_blas_buffers()
        found += [*network.gradients(hidden, x, np.arange(count) % 3).values(), *network.forward(hidden, x)]
    assert all(np.isfinite(values).all() for values in found)
