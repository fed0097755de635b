"""The kernel that adds a push to a sum."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve_server.optimizers import cpu


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 300),
    factor=st.one_of(st.sampled_from([1.0, 0.1, 3.0, 1e-9, 1e9]), st.floats(1e-9, 1e9)),
    shift=st.integers(0, 7),
)
def test_the_product_and_the_sum_are_each_rounded(seed: int, size: int, factor: float, shift: int) -> None:
    rng = np.random.default_rng(seed)
    total, values = (rng.standard_normal(size, dtype=np.float32) for _ in range(2))
    expected = total + values * np.float32(factor)
    message = b"h" * shift + values.tobytes()
    cpu.add(total, np.frombuffer(message, np.uint8)[shift:].view(np.float32), factor)
    assert total.tobytes() == expected.tobytes()


def test_a_factor_of_1_adds_the_values_unchanged() -> None:
    values = np.array([1, -1e-45, 1e-39, 3e38, -0.0, 0.1], np.float32)
    total = np.full(6, -0.0, np.float32)
    cpu.add(total, values, 1)
    assert total.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "wrong",
    [np.ones(6, np.float32), np.ones(5), np.ones(10, np.float32)[::2], np.ones((5, 1), np.float32)],
)
def test_wrong_vectors_are_refused_and_nothing_changes(wrong: Any) -> None:
    good = np.full(5, 2, np.float32)
    for total, values in ((good, wrong), (wrong, good)):
        with pytest.raises((TypeError, ValueError)):
            cpu.add(total, values, 1)
    assert (good == 2).all()
    assert (wrong == 1).all()
