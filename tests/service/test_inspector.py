"""The value checker: on chunks as they arrive, or on a whole vector with several threads."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaserve_server.model import Layout, Refused, Tensor
from deltaserve_server.service.admission import ValueChecker

SIZE = 3_000_001
LAYOUT = Layout((Tensor("a", (700_000,)), Tensor("b", (1,)), Tensor("c", (SIZE - 700_001,))))
WHOLE = [(0, SIZE)]

Runs = Sequence[tuple[int, int]]


@cache
def gradient(dtype: Any = np.float32) -> NDArray[Any]:
    """Random values. Callers copy them before they change any."""
    values = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    made = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else values.astype(dtype)
    made.flags.writeable = False
    return made


def in_chunks(values: NDArray[Any], runs: Runs, chunk: int = 1 << 18) -> tuple[int, float]:
    inspector = ValueChecker(LAYOUT)
    for first, stop in runs:
        for start in range(first, stop, chunk):
            inspector.check(start, values[start : min(start + chunk, stop)])
    return inspector.fingerprint, inspector.norm


def as_a_whole(values: NDArray[Any], runs: Runs, threads: int) -> tuple[int, float]:
    inspector = ValueChecker(LAYOUT)
    with ThreadPoolExecutor(4) as executor:
        inspector.check_whole(values, runs, executor, threads)
    return inspector.fingerprint, inspector.norm


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_a_whole_vector_has_the_fingerprint_and_norm_of_its_chunks(dtype: Any, threads: int) -> None:
    values = gradient(dtype)
    for chunk in (1 << 18, 99_999):
        assert as_a_whole(values, WHOLE, threads) == in_chunks(values, WHOLE, chunk)


@settings(max_examples=10)
@given(edges=st.lists(st.integers(0, SIZE), max_size=9, unique=True), threads=st.integers(1, 4))
def test_only_the_given_ranges_are_checked(edges: list[int], threads: int) -> None:
    edges.sort()
    runs = list(zip(edges[::2], edges[1::2], strict=False))
    values = np.full(SIZE, np.nan, np.float32)
    for start, stop in runs:
        values[start:stop] = gradient()[start:stop]
    assert as_a_whole(values, runs, threads) == in_chunks(values, runs)


def test_without_ranges_nothing_is_checked() -> None:
    assert as_a_whole(np.full(SIZE, np.nan, np.float32), [], 2) == (0, 0.0)


def test_a_whole_vector_adds_to_the_chunks_before_it() -> None:
    values, inspector = gradient(), ValueChecker(LAYOUT)
    inspector.check(0, values[:1000])
    with ThreadPoolExecutor(2) as executor:
        inspector.check_whole(values, [(1000, SIZE)], executor, 2)
    assert (inspector.fingerprint, inspector.norm) == in_chunks(values, WHOLE)


@pytest.mark.parametrize(
    ("dtype", "bad", "reason"),
    [
        (np.float32, np.nan, "VALUE_NOT_FINITE"),
        (np.float32, 1e20, "VALUE_TOO_LARGE"),
        (np.float16, np.inf, "VALUE_NOT_FINITE"),
        (np.uint16, 0x7FC0, "VALUE_NOT_FINITE"),
        (np.uint16, 0xFF80, "VALUE_NOT_FINITE"),
        (np.uint16, 0x6F00, "VALUE_TOO_LARGE"),
    ],
)
def test_the_first_bad_value_is_named(dtype: Any, bad: float, reason: str) -> None:
    values = gradient(dtype).copy()
    values[[700_007, 1_400_000, SIZE - 1]] = bad
    with pytest.raises(Refused) as by_chunks:
        in_chunks(values, WHOLE)
    with pytest.raises(Refused) as by_threads:
        as_a_whole(values, WHOLE, 3)
    for refused in (by_chunks.value, by_threads.value):
        assert (refused.reason, refused.metadata) == (reason, {"tensor": "c", "index": "6"})
