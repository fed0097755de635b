"""The recipes' arithmetic: what a process has computed before does not show in it."""

import numpy as np
import pytest

from deltaserve_server.recipes import linear, network


def fill_buffers() -> None:
    """Leaves signalling NaNs in the buffers of numpy's BLAS."""
    numbers = np.empty((150, 150), np.float32)
    numbers.view(np.uint32)[:] = 0x7FA00000
    with np.errstate(all="ignore"):
        for product in (numbers @ numbers, numbers @ numbers[:, 0], numbers.T @ numbers[:, :1]):
            assert np.isnan(product).all()


@pytest.mark.parametrize("count", range(1, 20))
def test_finite_numbers_are_no_invalid_operation(count: int) -> None:
    random = np.random.default_rng(count)
    x, y = random.standard_normal((count, 5)).astype(np.float32), random.standard_normal(count).astype(np.float32)
    scratch, hidden = linear.initial_weights(5, 1), network.initial_weights(5, 7, 3, 1)
    with np.errstate(all="raise", under="ignore"):
        fill_buffers()
        found = [*linear.gradients(**scratch, x=x, y=y).values(), linear.errors(**scratch, x=x, y=y)]
        fill_buffers()
        found += [*network.gradients(hidden, x, np.arange(count) % 3).values(), *network.forward(hidden, x)]
    assert all(np.isfinite(values).all() for values in found)
