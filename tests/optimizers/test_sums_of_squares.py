"""Sums of squares: the norm of a gradient, and of an update's change."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support import kernel_runs
from tests.support.optimizer_cases import STRUCTURES, over

from deltaserve._common.optimizers import SGD, Adadelta, Optimizer
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX
from deltaserve_server.optimizers import cpu, values

Vector = NDArray[np.float32]


def any_magnitude(seed: int, size: int) -> Vector:
    """Any values that admission accepts: zeros of both signs, denormals, the largest."""
    rng = np.random.default_rng(seed)
    last = int(np.float32(MAGNITUDE_MAX).view(np.uint32))
    special = np.array([0, 1, 0x007FFFFF, 0x00800000, last], np.uint32)
    bits = np.where(rng.random(size) < 0.2, rng.choice(special, size), rng.integers(0, last + 1, size, np.uint32))
    made: Vector = bits.astype(np.uint32).view(np.float32) * rng.choice(np.array([-1, 1], np.float32), size)
    return made


def unaligned(chunk: Vector, shift: int) -> Vector:
    message = b"h" * shift + chunk.tobytes()
    return np.frombuffer(message, np.uint8)[shift:].view(np.float32)


def lanes(chunk: Vector, start: int, squares: NDArray[np.float64]) -> NDArray[np.float64]:
    assert values.inspect(chunk, start, 0, squares)[0] == -1
    return squares


def stated_lanes(vector: Vector, start: int) -> list[list[float]]:
    """Computes the lanes in Python's floats, one element after the other."""
    sums: list[list[float]] = values.lanes(start + vector.size).tolist()
    for position, value in enumerate(vector.tolist(), start):
        sums[position // 2**18][position % 16] += value * value
    return sums


def test_numbers_worked_by_hand() -> None:
    squares = lanes(np.array([3, -4, 12], np.float32), 15, values.lanes(20))
    assert squares.tolist() == [[16, 144, *[0] * 13, 9]]
    assert values.norm(squares) == 13
    lanes(np.array([84], np.float32), 18, squares)
    assert values.norm(squares) == 85


def test_each_block_of_2_to_the_18_elements_has_its_own_lanes() -> None:
    squares = lanes(np.array([3, -4, 12], np.float32), 2 * 2**18 - 1, values.lanes(5 * 2**18))
    assert squares.shape == (5, 16)
    assert squares[1].tolist() == [*[0] * 15, 9]
    assert squares[2].tolist() == [16, 144, *[0] * 14]
    assert not squares[[0, 3, 4]].any()
    assert values.norm(squares) == 13


def test_the_norm_of_no_elements_is_0() -> None:
    assert values.norm(lanes(np.empty(0, np.float32), 7, values.lanes(7))) == 0
    assert values.norm(lanes(np.empty(0, np.float32), 0, values.lanes(0))) == 0


@given(
    seed=st.integers(0, 2**32),
    size=st.one_of(st.integers(0, 700), st.sampled_from([4095, 4096, 4097, 9000])),
    start=st.one_of(st.integers(0, 100), st.integers(2**18 - 5000, 2**18 + 10)),
    shift=st.integers(0, 7),
)
def test_lanes_equal_the_plain_computation(seed: int, size: int, start: int, shift: int) -> None:
    vector = any_magnitude(seed, size)
    made = lanes(unaligned(vector, shift), start, values.lanes(start + size))
    assert made.tolist() == stated_lanes(vector, start)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 10_000),
    start=st.one_of(st.integers(0, 100), st.integers(2**18 - 5000, 2**18)),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    shift=st.integers(0, 7),
)
def test_chunks_do_not_change_a_bit(seed: int, size: int, start: int, cuts: list[int], shift: int) -> None:
    vector = any_magnitude(seed, size)
    whole = lanes(vector, start, values.lanes(start + size))
    squares = np.zeros_like(whole)
    for begin, end in itertools.pairwise([0, *sorted(min(cut, size) for cut in cuts), size]):
        lanes(unaligned(vector[begin:end], shift), start + begin, squares)
    assert squares.tobytes() == whole.tobytes()


@settings(max_examples=10)
@given(order=st.permutations(range(4)), start=st.integers(0, 20), size=st.integers(700_000, 1_000_000))
def test_the_order_of_the_blocks_does_not_change_a_bit(order: list[int], start: int, size: int) -> None:
    vector = any_magnitude(start, size)
    whole = lanes(vector, start, values.lanes(start + size))
    squares = np.zeros_like(whole)
    for block in order:
        begin, end = max(block * 2**18 - start, 0), (block + 1) * 2**18 - start
        lanes(vector[begin:end], start + begin, squares)
    assert squares.tobytes() == whole.tobytes()


@given(seed=st.integers(0, 2**32), size=st.integers(1, 3000))
def test_the_norm_is_numpys(seed: int, size: int) -> None:
    vector = any_magnitude(seed, size)
    made = values.norm(lanes(vector, 0, values.lanes(size)))
    assert made == pytest.approx(np.linalg.norm(vector.astype(np.float64)), rel=1e-6)


def test_the_largest_values_do_not_overflow() -> None:
    squares = values.lanes(1_000_000)
    chunk = np.full(100_000, -MAGNITUDE_MAX, np.float32)
    for start in range(0, 1_000_000, chunk.size):
        lanes(chunk, start, squares)
    assert values.norm(squares) == pytest.approx(MAGNITUDE_MAX * 1000, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, FLOAT32_MAX])
def test_an_invalid_value_is_found(bad: float) -> None:
    chunk = np.ones(300, np.float32)
    chunk[217] = bad
    assert values.inspect(chunk, 3, 0, values.lanes(303))[0] == 217


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (np.zeros((1, 15)), ValueError),
        (np.zeros((1, 17)), ValueError),
        (np.zeros(16), ValueError),
        (np.zeros((0, 16)), ValueError),
        (np.zeros((1, 16), np.float32), TypeError),
        (np.zeros((1, 32))[:, ::2], TypeError),
        (np.frombuffer(bytes(128), np.float64).reshape(1, 16), TypeError),
    ],
)
def test_lanes_of_another_shape_or_type_are_refused(wrong: NDArray[np.float64], error: type[Exception]) -> None:
    with pytest.raises(error):
        values.inspect(np.ones(100, np.float32), 0, 0, wrong)
    assert not wrong.any()


@pytest.mark.parametrize("start", [-1, 2**18 - 99, 2**18, 2**62, 2**63])
def test_elements_without_lanes_are_refused(start: int) -> None:
    squares = values.lanes(2**18)
    values.inspect(np.zeros(100, np.float32), 2**18 - 100, 0, squares)
    with pytest.raises(ValueError, match="sums of squares"):
        values.inspect(np.ones(100, np.float32), start, 0, squares)
    assert not squares.any()


def updated(optimizer: Optimizer, size: int) -> tuple[Vector, Vector, float]:
    gradient, state = kernel_runs.usual(optimizer, 0, size)
    new_weights, slots = np.full_like(state.weights, np.nan), [slot.copy() for slot in state.slots]
    squares = cpu.update(gradient, 1, slots, state.weights, new_weights, optimizer, optimizer.relevant_count(1))
    return state.weights, new_weights, squares


def stated_change(weights: Vector, new_weights: Vector) -> float:
    """Computes the sum in Python's floats: 16 lanes first, then the upper half onto the lower half."""
    sums = [0.0] * 16
    for i, difference in enumerate((new_weights - weights).tolist()):
        sums[i % 16] += difference * difference
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [low + high for low, high in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


@over(STRUCTURES)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 255, 256, 257, 10_003])
def test_the_change_equals_the_plain_computation(optimizer: Optimizer, size: int) -> None:
    weights, new_weights, squares = updated(optimizer, size)
    assert squares == stated_change(weights, new_weights)
    assert squares == pytest.approx(np.sum((new_weights.astype(np.float64) - weights) ** 2), rel=1e-6)
    assert updated(optimizer, size)[2] == squares


def test_every_element_counts_once_in_the_change() -> None:
    """Each case changes one weight."""
    for at in range(300):
        gradient, square_avg, acc_delta, weights, new_weights = (np.zeros(300, np.float32) for _ in range(5))
        gradient[at] = 1
        squares = cpu.update(gradient, 1, [square_avg, acc_delta], weights, new_weights, Adadelta(), 0)
        assert squares == np.float64(new_weights[at]) ** 2 > 0


def test_the_largest_change_is_finite() -> None:
    size = 1000
    gradient, weights, new_weights = (np.full(size, x, np.float32) for x in (MAGNITUDE_MAX, 0, 0))
    squares = cpu.update(gradient, 1, [], weights, new_weights, SGD(lr=FLOAT32_MAX), 2)
    assert (new_weights == -FLOAT32_MAX).all()
    assert squares == pytest.approx(size * FLOAT32_MAX**2, rel=1e-12)
