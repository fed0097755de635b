"""Adadelta in numpy and float64: the reference that the fast implementations are tested against."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltaserve_server.optimizers.hyperparameters import Hyperparameters

Vector = NDArray[np.float64]


def update(
    gradient: ArrayLike,
    square_avg: ArrayLike,
    acc_delta: ArrayLike,
    weights: ArrayLike,
    hyperparameters: Hyperparameters,
) -> tuple[Vector, Vector, Vector]:
    """Computes one update (Zeiler, 2012, arXiv:1212.5701).

    With s and dx as the leaky averages and x as the weights:

        s_t  = rho s_{t-1} + (1 - rho) g_t^2                       (1)  square_avg
        x_t  = x_{t-1} - lr g'_t                                   (2)  weights
        g'_t = sqrt(dx_{t-1} + eps) / sqrt(s_t + eps) * g_t        (3)  the step
        dx_t = rho dx_{t-1} + (1 - rho) g'_t^2                     (4)  acc_delta

    `lr` is torch's addition and is 1 in the paper. As in torch, `maximize` negates the gradient before weight decay is
    added to it.

    Infinities and NaN propagate as in numpy. The float32 implementations keep them out of the state: they treat a NaN
    in the gradient as 0 and clip values that are too large (see `cpu`).

    Args:
        gradient: The mean gradient, any shape.
        square_avg: The leaky average of squared gradients, >= 0, of that shape.
        acc_delta: The leaky average of squared steps, >= 0, of that shape.
        weights: The parameters, of that shape.
        hyperparameters: Hyperparameters in range, whose `problem()` is None.

    Returns:
        The new square_avg, acc_delta and weights, float64. The arguments are not modified.
    """
    lr, rho, eps = hyperparameters.lr, hyperparameters.rho, hyperparameters.eps
    g, s, dx, x = (np.asarray(vector, np.float64) for vector in (gradient, square_avg, acc_delta, weights))
    if hyperparameters.maximize:
        g = -g
    if hyperparameters.weight_decay != 0:
        g = g + hyperparameters.weight_decay * x
    s = rho * s + (1 - rho) * g**2
    step = np.sqrt(dx + eps) / np.sqrt(s + eps) * g
    x = x - lr * step
    dx = rho * dx + (1 - rho) * step**2
    return s, dx, x


def squared_change(weights: ArrayLike, new_weights: ArrayLike) -> float:
    """Returns the sum of (new_weights - weights)**2 in float64, the square of an update's L2 norm.

    Args:
        weights: The parameters before the update, any shape.
        new_weights: The parameters after the update, of that shape.
    """
    return float(np.sum((np.asarray(new_weights, np.float64) - np.asarray(weights, np.float64)) ** 2))
