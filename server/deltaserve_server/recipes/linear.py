"""Linear regression in numpy: prediction error, gradients and loss.

For x of shape (n, d), w (d, 1), b (1,) and y (n,):

    loss = mean((x w + b - y)^2 / 2)
"""

import numpy as np

from deltaserve_server.recipes.recipe import Vector


def initial_weights(inputs: int, seed: int) -> dict[str, Vector]:
    """Returns w, drawn from a normal distribution with standard deviation 0.01, and b = 0."""
    w = np.random.default_rng(seed).normal(0.0, 0.01, (inputs, 1)).astype(np.float32)
    return {"w": w, "b": np.zeros(1, np.float32)}


@np.errstate(invalid="ignore")  # OpenBLAS may set the flag for stale data in its buffers
def errors(w: Vector, b: Vector, x: Vector, y: Vector) -> Vector:
    """Returns prediction minus label, shape (n,)."""
    return (x @ w + b).ravel() - y


@np.errstate(invalid="ignore")  # OpenBLAS may set the flag for stale data in its buffers
def gradients(w: Vector, b: Vector, x: Vector, y: Vector) -> dict[str, Vector]:
    """Returns the gradient of the loss: `w`, shape (d, 1), and `b`, shape (1,); 0 without examples."""
    error = errors(w, b, x, y) / np.float32(max(len(y), 1))  # a worker of a synchronous run may have no examples
    return {"w": (x.T @ error).reshape(w.shape), "b": error.sum(keepdims=True)}


def loss(w: Vector, b: Vector, x: Vector, y: Vector) -> float:
    """Returns half the mean squared error."""
    return float(np.square(errors(w, b, x, y)).mean() / 2)
