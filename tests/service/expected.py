"""What a model's vectors are to be, bit for bit: the kernel run on sums that numpy has made."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from wire import Snapshot, Vector

from deltaserve_server.adadelta import Hyperparameters, cpu


def gradient(seed: int, size: int) -> Vector:
    """Values of very different magnitudes, so that the order of a sum shows."""
    source = np.random.default_rng(seed)
    return (source.standard_normal(size) * 10.0 ** source.integers(-4, 5, size)).astype(np.float32)


def norm(vector: ArrayLike) -> float:
    """The L2 norm, in float64."""
    return float(np.linalg.norm(np.asarray(vector, np.float64)))


def weighted_sum(gradients: Sequence[Vector], factors: Sequence[float]) -> Vector:
    """Adds up in the order given; factors, products and sums are each rounded to float32."""
    total = np.zeros_like(gradients[0])
    for values, factor in zip(gradients, factors, strict=True):
        total = total + np.float32(factor) * values
    return total


class Twin:
    """A model's three vectors, updated as the server is to update them.

    Args:
        weights: The initial weights.
    """

    def __init__(self, weights: Vector) -> None:
        self.weights = np.asarray(weights, np.float32)
        self.square_avg = np.zeros_like(self.weights)
        self.acc_delta = np.zeros_like(self.weights)

    def update(self, total: Vector, divisor: float = 1.0, own: Hyperparameters | None = None) -> float:
        """Makes an update; returns the L2 norm of the change of the weights."""
        before, self.weights = self.weights, np.empty_like(self.weights)
        cpu.update(total, divisor, self.square_avg, self.acc_delta, before, self.weights, own or Hyperparameters())
        return norm(self.weights.astype(np.float64) - before)

    def check(self, state: Snapshot) -> None:
        """Holds a model to it."""
        vectors = (self.weights, self.square_avg, self.acc_delta)
        assert state.vectors == tuple(vector.tobytes() for vector in vectors)
