"""Linear regression in plain numpy, as in the book's code from scratch: half the squared error.

x is (n, d), w is (d, 1), b is (1,), y is (n,):

    loss = mean((x w + b - y)^2 / 2)
"""

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def initial_weights(inputs: int, seed: int) -> dict[str, Vector]:
    """Draws w from a normal distribution with standard deviation 0.01; b is 0."""
    w = np.random.default_rng(seed).normal(0.0, 0.01, (inputs, 1)).astype(np.float32)
    return {"w": w, "b": np.zeros(1, np.float32)}


@np.errstate(invalid="ignore")  # OpenBLAS may raise that flag for what its buffers held before, not for these numbers
def errors(w: Vector, b: Vector, x: Vector, y: Vector) -> Vector:
    """Returns what the prediction is off by, (n,)."""
    return (x @ w + b).ravel() - y


@np.errstate(invalid="ignore")  # OpenBLAS may raise that flag for what its buffers held before, not for these numbers
def gradients(w: Vector, b: Vector, x: Vector, y: Vector) -> dict[str, Vector]:
    """Returns the gradient of the loss: `w` (d, 1) and `b` (1,); 0 where there are no examples."""
    off = errors(w, b, x, y) / np.float32(max(len(y), 1))
    return {"w": (x.T @ off).reshape(w.shape), "b": off.sum(keepdims=True)}


def loss(w: Vector, b: Vector, x: Vector, y: Vector) -> float:
    """Returns the mean of half the squared error."""
    return float(np.square(errors(w, b, x, y)).mean() / 2)
