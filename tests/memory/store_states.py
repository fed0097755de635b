"""States for the tests of stores: optimizers by number of slots, random vectors, and bits."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from deltaserve._common.optimizers import SGD, Adadelta, Adam, Optimizer
from deltaserve_server.memory import Budget, Range, Staging, State, Store, initial_state
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import Layout, Tensor

MakeStore = Callable[[State, Budget], Store]
Stage = Callable[..., Staging]

PLAIN = Adadelta()

OPTIMIZERS: tuple[Optimizer, ...] = (SGD(), SGD(momentum=0.9), PLAIN, Adam(amsgrad=True))
"""An optimizer for each number of slots, from none on."""


def named(optimizer: Optimizer) -> str:
    """Returns the name of a test's parameter."""
    return f"{optimizer.kind}-{len(optimizer.slots)}"


for_each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=named)


def random(size: int, seed: int) -> Vector:
    """Returns standard normal values."""
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def other(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer with other hyperparameters."""
    return replace(optimizer, lr=0.5, weight_decay=0.1, maximize=True)


def whole(size: int, optimizer: Optimizer = PLAIN, count: int = 1) -> list[Range]:
    """Returns the range of all elements, in an update that is the count-th of each."""
    return [Range(0, size, optimizer, optimizer.relevant_count(count))]


def fresh(weights: Vector, optimizer: Optimizer = PLAIN) -> State:
    """Returns a copy of the weights, with the optimizer state before the first update."""
    return initial_state(weights.copy(), Layout((Tensor("w", weights.shape),)), [optimizer])


def bits(state: State) -> tuple[bytes, ...]:
    """Returns the bits of each vector."""
    return tuple(vector.tobytes() for vector in state.vectors)


def assert_same_state(one: Store, two: Store) -> None:
    """Compares the bits of two stores."""
    states = one.state(), two.state()
    for left, right in zip(*(state.vectors for state in states), strict=True):
        np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))
