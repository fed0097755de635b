"""Expected vectors of a model, bit for bit: the kernel applied to sums that numpy computes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from wire import Snapshot, Vector

from deltaserve_server.optimizers import Hyperparameters, cpu


def gradient(seed: int, size: int) -> Vector:
    """Returns values of very different magnitudes, so that another order of summation gives other bits."""
    source = np.random.default_rng(seed)
    return (source.standard_normal(size) * 10.0 ** source.integers(-4, 5, size)).astype(np.float32)


def norm(vector: ArrayLike) -> float:
    """The L2 norm, in float64."""
    return float(np.linalg.norm(np.asarray(vector, np.float64)))


def weighted_sum(gradients: Sequence[Vector], factors: Sequence[float]) -> Vector:
    """Adds in the order given. Rounds factors, products and sums to float32 each."""
    total = np.zeros_like(gradients[0])
    for values, factor in zip(gradients, factors, strict=True):
        total = total + np.float32(factor) * values
    return total


class Twin:
    """A model's three vectors, updated as the server must update them.

    Args:
        weights: The initial weights.
    """

    def __init__(self, weights: Vector) -> None:
        self.weights = np.asarray(weights, np.float32)
        self.square_avg = np.zeros_like(self.weights)
        self.acc_delta = np.zeros_like(self.weights)

    def update(self, total: Vector, divisor: float = 1.0, own: Hyperparameters | None = None) -> float:
        """Makes an update. Returns the L2 norm of the change of the weights."""
        before, self.weights = self.weights, np.empty_like(self.weights)
        cpu.update(total, divisor, self.square_avg, self.acc_delta, before, self.weights, own or Hyperparameters())
        return norm(self.weights.astype(np.float64) - before)

    def check(self, state: Snapshot) -> None:
        """Checks that a model has these vectors."""
        vectors = (self.weights, self.square_avg, self.acc_delta)
        assert state.vectors == tuple(vector.tobytes() for vector in vectors)
