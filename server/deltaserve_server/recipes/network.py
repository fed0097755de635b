"""A network with one hidden layer in numpy: forward pass, loss and gradients.

For x of shape (n, inputs) and y of shape (n,), which holds class numbers:

    h = max(0, x W1 + b1),  z = h W2 + b2,  loss = mean(-log softmax(z)[y])
"""

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.recipes.recipe import Vector, Weights


def initial_weights(inputs: int, hidden: int, classes: int, seed: int) -> dict[str, Vector]:
    """Returns random weights of variance 2 / inputs, in the output layer 1 / hidden, and biases of 0."""
    random = np.random.default_rng(seed)

    def layer(rows: int, columns: int, variance: float) -> Vector:
        return np.float32(variance**0.5) * random.standard_normal((rows, columns), np.float32)

    # Half of the ReLU's inputs are negative: twice the variance keeps the scale of the activations (He et al., 2015).
    return {
        "hidden.weight": layer(inputs, hidden, 2 / inputs),
        "hidden.bias": np.zeros(hidden, np.float32),
        "output.weight": layer(hidden, classes, 1 / hidden),
        "output.bias": np.zeros(classes, np.float32),
    }


@np.errstate(invalid="ignore")  # OpenBLAS may set the flag for stale data in its buffers
def forward(weights: Weights, x: Vector) -> tuple[Vector, Vector]:
    """Returns the hidden activations (n, hidden) and the class scores (n, classes)."""
    h: Vector = np.maximum(x @ weights["hidden.weight"] + weights["hidden.bias"], 0)
    z: Vector = h @ weights["output.weight"] + weights["output.bias"]
    return h, z


def softmax(z: Vector) -> Vector:
    """Returns the probabilities of each row; subtracting the row's maximum first prevents overflow."""
    e: Vector = np.exp(z - z.max(axis=1, keepdims=True))
    probability: Vector = e / e.sum(axis=1, keepdims=True)
    return probability


@np.errstate(invalid="ignore")  # OpenBLAS may set the flag for stale data in its buffers
def gradients(weights: Weights, x: Vector, y: NDArray[np.int64]) -> dict[str, Vector]:
    """Returns the gradient of the loss by tensor name, float32, in the shapes of the weights; 0 without examples."""
    h, z = forward(weights, x)
    dz = softmax(z)
    dz[np.arange(len(y)), y] -= 1
    dz /= np.float32(max(len(y), 1))
    dh = (dz @ weights["output.weight"].T) * (h > 0)
    return {
        "hidden.weight": x.T @ dh,
        "hidden.bias": dh.sum(axis=0),
        "output.weight": h.T @ dz,
        "output.bias": dz.sum(axis=0),
    }


def loss(weights: Weights, x: Vector, y: NDArray[np.int64]) -> float:
    """Returns the mean cross-entropy, in nats."""
    probability = softmax(forward(weights, x)[1])[np.arange(len(y)), y]
    # A probability may underflow to 0, whose logarithm is infinite.
    return float(-np.log(np.maximum(probability, np.finfo(np.float32).tiny)).mean())


def accuracy(weights: Weights, x: Vector, y: NDArray[np.int64]) -> float:
    """Returns the fraction of examples whose highest score belongs to their class."""
    return float((forward(weights, x)[1].argmax(axis=1) == y).mean())
