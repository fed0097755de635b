"""The trimmed mean: its value, and that malicious rows cannot move it out of the honest range."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaserve._common.optimizers.definition import MAGNITUDE_MAX
from deltaserve_server.optimizers.robust import comparators, trimmed_mean

Rows = NDArray[np.float32]

LAST = int(np.float32(MAGNITUDE_MAX).view(np.uint32))
SPECIAL = np.array([0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, LAST - 1, LAST], np.uint32)


def mean(rows: Rows, trim: int) -> Rows:
    made = np.full(rows.shape[1], np.nan, np.float32)
    trimmed_mean(rows.copy(), trim, made)
    return made


def anything(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """Any values that admission accepts, half of them special: zeros of both signs, denormals and the largest."""
    bits = np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), rng.integers(0, LAST + 1, shape, np.uint32))
    made: Rows = bits.astype(np.uint32).view(np.float32) * rng.choice(np.array([-1, 1], np.float32), shape)
    return made


def test_numbers_worked_by_hand() -> None:
    column = np.array([[7], [-100], [1], [3], [50]], np.float32)
    assert mean(column, 0) == np.float32(-39 / 5)
    assert mean(column, 1) == np.float32(11 / 3)
    assert mean(column, 2) == 3
    assert mean(column[1:], 1) == 2  # the median of an even number is the mean of the two in the middle


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts(count: int) -> None:
    """A network that sorts all sequences of zeros and ones sorts everything (Knuth, volume 3, section 5.3.4)."""
    columns = np.array(list(itertools.product([0, 1], repeat=count)), np.float32).T
    rows = list(columns)
    for low, high in comparators(count):
        assert low < high
        rows[low], rows[high] = np.minimum(rows[low], rows[high]), np.maximum(rows[low], rows[high])
    assert np.array_equal(rows, np.sort(columns, axis=0))


@given(seed=st.integers(0, 2**32), count=st.integers(1, 80), size=st.integers(1, 50), data=st.data())
def test_the_mean_equals_the_plain_computation(seed: int, count: int, size: int, data: st.DataObject) -> None:
    trim = data.draw(st.integers(0, (count - 1) // 2))
    rows = anything(np.random.default_rng(seed), (count, size))
    expected = []
    for column in rows.T.tolist():
        total = 0.0
        for value in sorted(column)[trim : count - trim]:
            total += value
        expected.append(total / (count - 2 * trim))
    assert mean(rows, trim).tobytes() == np.array(expected).astype(np.float32).tobytes()


@given(seed=st.integers(0, 2**32), count=st.integers(1, 80), data=st.data())
def test_neither_the_order_of_the_rows_nor_the_split_changes_a_bit(seed: int, count: int, data: st.DataObject) -> None:
    trim, cut = data.draw(st.integers(0, (count - 1) // 2)), data.draw(st.integers(0, 40))
    rng = np.random.default_rng(seed)
    rows = anything(rng, (count, 40))
    made = mean(rows, trim)
    assert mean(rng.permutation(rows), trim).tobytes() == made.tobytes()
    assert np.concatenate([mean(rows[:, :cut], trim), mean(rows[:, cut:], trim)]).tobytes() == made.tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 65])
def test_with_at_most_f_liars_every_coordinate_stays_within_the_honest_range(count: int) -> None:
    """Promise G13: each column is a case, 100,000 of them for each number of pushes."""
    rng = np.random.default_rng(count)
    trims = range((count - 1) // 2 + 1)
    cases = math.ceil(100_000 / len(trims))
    for trim in trims:
        liars = int(rng.integers(0, trim + 1)) if trim > 1 else trim
        rows = anything(rng, (count, cases))
        honest = rows[liars:]
        # In a third of the columns the honest rows almost agree, so that a rounding in the wrong direction shows.
        close = honest[:, ::3]
        close[:] = np.nextafter(close[0], rng.choice(np.array([-1, 1], np.float32), close.shape) * np.float32(1e30))
        # In a third of the columns all liars pull in one direction, as far as admission allows.
        rows[:liars, ::3] = rng.choice(np.array([-1, 1], np.float32), cases)[::3] * np.float32(MAGNITUDE_MAX)
        made = mean(rng.permutation(rows), trim)
        assert (made >= honest.min(axis=0)).all(), (count, trim, liars)
        assert (made <= honest.max(axis=0)).all(), (count, trim, liars)


def test_the_largest_values_do_not_overflow() -> None:
    rows = np.full((70, 3), MAGNITUDE_MAX * 1e9, np.float32)
    assert (mean(rows, 0) == rows[0]).all()


@pytest.mark.parametrize(("count", "trim"), [(1, 1), (2, 1), (4, 2), (5, -1)])
def test_too_few_vectors_are_refused(count: int, trim: int) -> None:
    with pytest.raises(ValueError, match="vectors"):
        mean(np.zeros((count, 5), np.float32), trim)
