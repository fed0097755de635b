"""The implementations of the optimizers as pure functions: the arguments stay as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tests.support.optimizer_cases import torchs

from deltaserve._common.optimizers import Optimizer
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX
from deltaserve_server.optimizers import cpu, reference

Vector = NDArray[Any]


class State(NamedTuple):
    """The slots of an optimizer, and the weights."""

    slots: tuple[Vector, ...]
    weights: Vector

    def part(self, start: int, stop: int) -> "State":
        """Returns views of a range."""
        return State(tuple(slot[start:stop] for slot in self.slots), self.weights[start:stop])

    def bits(self) -> bytes:
        """Returns the bits of all vectors."""
        return b"".join(vector.tobytes() for vector in (*self.slots, self.weights))


Step = Callable[[Optimizer, Vector, State, int, float], State]
"""Optimizer, sum of the gradients, state, number of updates with this one, divisor -> new state."""


def start(optimizer: Optimizer, weights: Vector) -> State:
    """Returns the state before the first update."""
    return State(tuple(np.full_like(weights, slot.initial) for slot in optimizer.slots), weights)


def on_cpu(optimizer: Optimizer, gradient: Vector, state: State, updates: int, divisor: float = 1.0) -> State:
    """Runs the CPU kernel, and checks the sum of squares that it returns."""
    slots = tuple(slot.copy() for slot in state.slots)
    new_weights = np.full_like(state.weights, np.nan)
    count = optimizer.relevant_count(updates)
    squares = cpu.update(gradient, divisor, slots, state.weights, new_weights, optimizer, count)
    # A difference in float32 has a relative error of 2**-24, and its square twice that.
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(new_weights - state.weights).all():
            np.testing.assert_allclose(squares, reference.squared_change(state.weights, new_weights), rtol=1.3e-7)
    return State(slots, new_weights)


def in_reference(optimizer: Optimizer, gradient: Vector, state: State, updates: int, divisor: float = 1.0) -> State:
    """Runs the reference in float64."""
    return State(*reference.update(optimizer, gradient / np.float64(divisor), *state, updates))


def in_torch(optimizer: Optimizer, gradient: Vector, state: State, updates: int, divisor: float = 1.0) -> State:
    """Runs one step of torch's optimizer, in the vectors' precision."""
    import torch

    parameter = torch.nn.Parameter(torch.from_numpy(state.weights.copy()))
    parameter.grad = torch.from_numpy(gradient / gradient.dtype.type(divisor))
    stepping = torchs(optimizer, [parameter], foreach=False)
    slots = {
        slot.name: torch.from_numpy(vector.copy()) for slot, vector in zip(optimizer.slots, state.slots, strict=True)
    }
    # torch keeps SGD's first step by the absence of the buffer.
    if updates > 1 or optimizer.kind != "sgd":
        stepping.state[parameter] = {"step": torch.tensor(float(updates - 1)), **slots}
    stepping.step()
    after = stepping.state[parameter]
    return State(tuple(after[slot.name].numpy() for slot in optimizer.slots), parameter.detach().numpy())


def anything(optimizer: Optimizer, seed: int, size: int, largest_weight: float = FLOAT32_MAX) -> tuple[Vector, State]:
    """Returns a gradient and a state of finite values of every magnitude, with zeros of both signs and denormals."""
    rng = np.random.default_rng(seed)

    def values(largest: float, minimum: float) -> Vector:
        last = int(np.float32(largest).view(np.uint32))
        special = np.array([0, 1, 0x007FFFFF, 0x00800000, last], np.uint32)
        bits = np.where(rng.random(size) < 0.2, rng.choice(special, size), rng.integers(0, last + 1, size, np.uint32))
        signs = rng.choice(np.array([1 if minimum == 0 else -1, 1], np.float32), size)
        return signs * bits.astype(np.uint32).view(np.float32)

    slots = tuple(values(FLOAT32_MAX, slot.minimum) for slot in optimizer.slots)
    return values(MAGNITUDE_MAX, -1), State(slots, values(largest_weight, -1))


def usual(optimizer: Optimizer, seed: int, size: int) -> tuple[Vector, State]:
    """Returns a gradient and a state of many magnitudes, with zeros.

    Gradient, weight and negative slots of an element have one sign, so that no sum cancels, nor does a variance.
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1], np.float32), size)

    def values(low: float, high: float, zeros: float) -> Vector:
        return np.where(rng.random(size) < zeros, 0, 10 ** rng.uniform(low, high, size)).astype(np.float32)

    slots = {slot.name: (1 if slot.minimum == 0 else signs) * values(-10, 3, 0.1) for slot in optimizer.slots}
    if "grad_avg" in slots:
        slots["square_avg"] += 4 * slots["grad_avg"] ** 2
    direction = -signs if optimizer.maximize else signs
    return direction * values(-6, 4, 0.01), State(tuple(slots.values()), signs * values(-3, 3, 0.2))
