"""Expected vectors of a model, bit for bit: the kernel applied to sums that numpy computes."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
from messages import Vector
from numpy.typing import ArrayLike
from wire import Snapshot

from deltaserve._common.optimizers import OPTIMIZERS, Adadelta, Optimizer
from deltaserve._common.optimizers.definition import described, hyperparameters
from deltaserve_server.optimizers import cpu


def _structures() -> Iterator[Optimizer]:
    """Yields each optimizer with all that a model fixes switched off, and with all of it switched on."""
    for kind in OPTIMIZERS.values():
        yield kind()
        options = [field.name for field in fields(kind) if field.metadata.get("structural")]
        momentum = {"momentum": 0.9} if "momentum" in hyperparameters(kind) else {}
        if options or momentum:
            yield kind(**momentum, **dict.fromkeys(options, True))


STRUCTURES = {described(optimizer): optimizer for optimizer in _structures()}
"""One optimizer of each kind and structure, by its description. The first is the default."""


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
    """A model's vectors, updated as the server must update them.

    Args:
        weights: The initial weights.
        optimizer: The model's optimizer.
    """

    def __init__(self, weights: Vector, optimizer: Optimizer | None = None) -> None:
        self.optimizer = optimizer or Adadelta()
        self.weights = np.asarray(weights, np.float32)
        self.slots = [np.full_like(self.weights, slot.initial) for slot in self.optimizer.slots]
        self.count = 0

    @property
    def vectors(self) -> list[Vector]:
        """The weights and the optimizer state."""
        return [self.weights, *self.slots]

    def update(self, total: Vector, divisor: float = 1.0, own: Optimizer | None = None) -> float:
        """Makes an update. Returns the L2 norm of the change of the weights."""
        before, self.weights = self.weights, np.empty_like(self.weights)
        used = own or self.optimizer
        self.count += 1
        cpu.update(total, divisor, self.slots, before, self.weights, used, used.relevant_count(self.count))
        return norm(self.weights.astype(np.float64) - before)

    def check(self, state: Snapshot) -> None:
        """Checks that a model has these vectors."""
        assert state.vectors == tuple(vector.tobytes() for vector in self.vectors)
