"""The inspection of a gradient: invalid values and the fingerprint."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaserve._common.optimizers.definition import MAGNITUDE_MAX
from deltaserve_server.optimizers import values as kernel

Vector = NDArray[np.float32]

LARGEST = np.float32(MAGNITUDE_MAX)
BAD = {
    "nan": np.float32(np.nan),
    "negative nan": np.array(0xFFC00000, np.uint32).view(np.float32)[()],
    "signalling nan": np.array(0x7F800001, np.uint32).view(np.float32)[()],
    "infinity": np.float32(np.inf),
    "negative infinity": np.float32(-np.inf),
    "2**64": np.float32(2.0**64),
    "-2**64": np.float32(-(2.0**64)),
    "largest": np.finfo(np.float32).max,
}


def inspect(values: Vector, start: int, fingerprint: int) -> tuple[int, int]:
    return kernel.inspect(values, start, fingerprint, kernel.lanes(start + values.size))


def random_values(seed: int, size: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def stated_fingerprint(values: Vector, start: int) -> int:
    """Computes SplitMix64 of position and bits as published, in Python's integers."""
    total = 0
    for position, bits in enumerate(values.view(np.uint32).tolist(), start):
        z = (position * 0x9E3779B97F4A7C15 + bits) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total += z ^ z >> 31
    return total % 2**64


def stated_first_bad(values: Vector) -> int:
    with np.errstate(over="ignore", invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(values * values))
    return int(bad[0]) if bad.size else -1


def unaligned(values: Vector, shift: int) -> Vector:
    message = b"h" * shift + values.tobytes()
    return np.frombuffer(message, np.uint8)[shift:].view(np.float32)


def test_no_values() -> None:
    assert inspect(np.empty(0, np.float32), 5, 77) == (-1, 77)


def test_published_numbers() -> None:
    # The first outputs of SplitMix64 from seed 0 are the fingerprints of zeros at positions 1, 2, ...
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for position, expected in enumerate(published, 1):
        assert inspect(np.zeros(1, np.float32), position, 0) == (-1, expected)
    assert inspect(np.zeros(3, np.float32), 1, 0) == (-1, sum(published) % 2**64)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 300),
    start=st.one_of(st.integers(0, 2**20), st.integers(0, 2**36)),
    before=st.integers(0, 2**64 - 1),
)
def test_the_fingerprint_equals_the_plain_computation(seed: int, size: int, start: int, before: int) -> None:
    values = random_values(seed, size)
    assert inspect(values, start, before) == (-1, (before + stated_fingerprint(values, start)) % 2**64)


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), max_size=200),
    shift=st.integers(0, 7),
)
def test_any_bits_at_any_byte(bits: list[int], shift: int) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    assert inspect(unaligned(values, shift), 9, 0) == (stated_first_bad(values), stated_fingerprint(values, 9))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 10_000), max_size=6))
def test_chunks_do_not_change_the_fingerprint(seed: int, size: int, cuts: list[int]) -> None:
    values = random_values(seed, size)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    fingerprint = 0
    for begin, end in reversed(list(itertools.pairwise(edges))):
        _, fingerprint = inspect(values[begin:end], begin, fingerprint)
    assert fingerprint == inspect(values, 0, 0)[1]


def test_any_flipped_bit_changes_the_fingerprint() -> None:
    values = random_values(1, 67)
    original = inspect(values, 0, 0)[1]
    seen = {original}
    for element in range(values.size):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
            seen.add(inspect(flipped, 0, 0)[1])
    assert len(seen) == 1 + 67 * 32


def test_any_flipped_bit_of_a_long_push_changes_the_fingerprint() -> None:
    values = random_values(2, 1_000_000)
    original = inspect(values, 0, 0)[1]
    rng = np.random.default_rng(3)
    for element, bit in zip(rng.integers(0, values.size, 100), rng.integers(0, 32, 100), strict=True):
        values.view(np.uint32)[element] ^= np.uint32(1 << bit)
        assert inspect(values, 0, 0)[1] != original
        values.view(np.uint32)[element] ^= np.uint32(1 << bit)
    assert inspect(values, 0, 0)[1] == original


def test_changes_of_order_and_sign_change_the_fingerprint() -> None:
    """A weak checksum would miss changes with such a structure."""
    values = random_values(4, 4096)
    others = [values[::-1], np.roll(values, 1), -values, values * 2, np.zeros_like(values)]
    for first in range(0, 256, 4):
        other = values.copy()
        other[first : first + 4] *= -1
        others.append(other)
        other = values.copy()
        other[[first, first + 1]] = other[[first + 1, first]]
        others.append(other)
    fingerprints = {inspect(np.ascontiguousarray(other), 0, 0)[1] for other in [values, *others]}
    assert len(fingerprints) == 1 + len(others)


@pytest.mark.parametrize("kind", BAD)
def test_each_invalid_value_at_each_position(kind: str) -> None:
    for size in (1, 7, 8, 9, 33, 130):
        for position in range(size):
            values = random_values(5, size)
            values[position] = BAD[kind]
            assert inspect(values, 0, 0)[0] == position
            values[-1] = BAD["nan"]
            assert inspect(values, 0, 0)[0] == position


def test_the_largest_values_are_valid() -> None:
    values = np.full(100, LARGEST)
    values[::2] *= -1
    values[::3] = np.float32(1e-45)
    values[::5] = np.float32(-0.0)
    assert inspect(values, 0, 0)[0] == -1
    values[90] = BAD["2**64"]
    assert inspect(values, 0, 0)[0] == 90


@pytest.mark.parametrize(
    "wrong",
    [np.zeros(4, np.float64), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2], np.zeros(4, np.int32)],
)
def test_wrong_arrays_are_refused(wrong: Vector) -> None:
    with pytest.raises(TypeError):
        inspect(wrong, 0, 0)
