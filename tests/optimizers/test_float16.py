"""float16 and bfloat16: their conversion to float32 in the kernels, and the rounding of float32 to them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaserve_server.optimizers import cpu, float16, values
from deltaserve_server.optimizers.formats import HalfPrecision, Values, widened

TORCHS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": np.uint16}
EVERY = np.arange(1 << 16).astype(np.uint16)

over_formats = pytest.mark.parametrize("name", TORCHS)


def unaligned(vector: Values, shift: int) -> Values:
    message = b"h" * shift + vector.tobytes()
    return np.frombuffer(message, np.uint8)[shift:].view(vector.dtype)


def torchs(vector: NDArray[np.float32], name: str) -> HalfPrecision:
    """Rounds with torch."""
    made: HalfPrecision = torch.from_numpy(vector.copy()).to(TORCHS[name]).view(torch.uint16).numpy().view(DTYPES[name])
    return made


def assert_rounded_as_by_torch(vector: NDArray[np.float32], name: str) -> None:
    out = np.full(vector.size, 0x1234, np.uint16).view(DTYPES[name])
    float16.narrow(vector, out)
    nan = np.isnan(vector)
    assert np.isnan(widened(out)[nan]).all()
    np.testing.assert_array_equal(out.view(np.uint16)[~nan], torchs(vector, name).view(np.uint16)[~nan])


@over_formats
def test_every_value_widens_as_in_torch(name: str) -> None:
    every = EVERY.view(DTYPES[name])
    expected = torch.from_numpy(EVERY.copy()).view(TORCHS[name]).float().numpy()
    np.testing.assert_array_equal(widened(every), expected)
    np.testing.assert_array_equal(np.signbit(widened(every)), np.signbit(expected))
    finite = np.isfinite(expected)
    total = np.full(int(finite.sum()), -0.0, np.float32)
    cpu.add(total, every[finite], 1)
    assert total.tobytes() == expected[finite].tobytes()


@over_formats
def test_rounding_at_every_value_and_around_every_midpoint(name: str) -> None:
    """Every value, its neighbours in float32, and values around the midpoint to the next one."""
    exact = widened(EVERY.view(DTYPES[name])).view(np.uint32).astype(np.int64)
    last = np.uint32(1 << (13 if name == "float16" else 16)).astype(np.int64)
    for step in (0, last // 2, last // 4, 3 * last // 4):
        for more in (-1, 0, 1):
            bits = np.clip(exact + step + more, 0, 2**32 - 1).astype(np.uint32)
            assert_rounded_as_by_torch(bits.view(np.float32), name)


@over_formats
def test_the_midpoints_of_denormals(name: str) -> None:
    """Odd multiples of half the smallest value are midpoints between two denormals."""
    smallest = float(widened(np.array([1], np.uint16).view(DTYPES[name]))[0])
    middles = (np.arange(4096) * (smallest / 2)).astype(np.float32)
    for vector in (middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1))):
        assert_rounded_as_by_torch(vector, name)
        assert_rounded_as_by_torch(-vector, name)


@over_formats
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_any_bits(name: str, bits: list[int]) -> None:
    assert_rounded_as_by_torch(np.array(bits, np.uint32).view(np.float32), name)


@over_formats
def test_many_bits(name: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 3_000_017, np.uint32)
    assert_rounded_as_by_torch(bits.view(np.float32), name)


@over_formats
def test_the_ends_of_the_range(name: str) -> None:
    largest = {"float16": 65504.0, "bfloat16": float(torch.finfo(torch.bfloat16).max)}[name]
    vector = np.array([largest, np.nextafter(np.float32(largest), np.float32(0)), 3.4028235e38, np.inf, 65520], "f4")
    vector = np.concatenate([vector, -vector, np.nextafter(vector, np.float32(0))])
    assert_rounded_as_by_torch(vector, name)
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000):
        assert_rounded_as_by_torch(np.full(33, bits, np.uint32).view(np.float32), name)


def test_wrong_vectors_are_refused_and_nothing_changes() -> None:
    source, kept = np.ones(5, np.float32), np.zeros(5, np.float16)
    read_only = kept.copy()
    read_only.flags.writeable = False
    for out in (np.zeros(5, np.float32), np.zeros(5, np.int16), np.zeros(10, np.uint16)[::2], read_only):
        with pytest.raises(TypeError):
            float16.narrow(source, out)  # type: ignore[arg-type]
        assert not out.any()
    for vector in (np.ones(6, np.float32), np.ones(5), np.ones(10, np.float32)[::2]):
        with pytest.raises((TypeError, ValueError)):
            float16.narrow(vector, kept)  # type: ignore[arg-type]
    assert not kept.any()


@over_formats
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 300),
    factor=st.sampled_from([1.0, 0.1, 1e9]),
    shift=st.integers(0, 7),
)
def test_values_are_added_as_their_float32_values(name: str, seed: int, size: int, factor: float, shift: int) -> None:
    rng = np.random.default_rng(seed)
    added = torchs(rng.standard_normal(size, dtype=np.float32), name)
    start = rng.standard_normal(size, dtype=np.float32)
    total = start.copy()
    cpu.add(total, unaligned(added, shift), factor)
    assert total.tobytes() == (start + widened(added) * np.float32(factor)).tobytes()


@over_formats
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 300),
    start=st.one_of(st.integers(0, 50), st.integers(2**18 - 300, 2**18)),
    shift=st.integers(0, 7),
)
def test_values_are_inspected_as_their_float32_values(name: str, seed: int, size: int, start: int, shift: int) -> None:
    """With any bits, so infinities and NaN too."""
    given = np.random.default_rng(seed).integers(0, 1 << 16, size, np.uint16).view(DTYPES[name])
    ours, theirs = values.lanes(start + size), values.lanes(start + size)
    bad, fingerprint = values.inspect(unaligned(given, shift), start, 5, ours)
    expected = values.inspect(widened(given), start, 5, theirs)
    assert bad == expected[0]
    if bad < 0:
        assert (fingerprint, ours.tobytes()) == (expected[1], theirs.tobytes())


@over_formats
def test_a_long_push_has_one_fingerprint_and_one_norm_in_either_width(name: str) -> None:
    sent = torchs(np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32), name)
    seen = []
    for vector in (sent, widened(sent)):
        squares = values.lanes(vector.size)
        seen.append((values.inspect(vector, 0, 0, squares), values.norm(squares)))
    assert seen[0] == seen[1]
    assert seen[0][0][0] == -1


@over_formats
@pytest.mark.parametrize("size", [1, 16, 17, 100])
def test_each_bad_value_at_each_position(name: str, size: int) -> None:
    for position in range(size):
        for bits in (0x7F80, 0xFF80, 0x7FC1) if name == "bfloat16" else (0x7C00, 0xFC00, 0x7E00, 0x7C01):
            vector = np.zeros(size, np.uint16)
            vector[position:] = bits
            assert values.inspect(vector.view(DTYPES[name]), 3, 0, values.lanes(3 + size))[0] == position
