"""The optimizers in numpy and float64, in the letters of their papers: what fast implementations are tested against.

They are written by hand, not derived from the definitions that the kernels evaluate, because they judge those.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, Lion, Optimizer, RMSprop

Vector = NDArray[np.float64]


def update(
    optimizer: Optimizer, gradient: ArrayLike, slots: Sequence[ArrayLike], weights: ArrayLike, count: int
) -> tuple[tuple[Vector, ...], Vector]:
    """Computes one update.

    As in torch, `maximize` negates the gradient before weight decay is added to it. Infinities and NaN propagate as in
    numpy. The float32 implementations keep them out of the state: they treat a NaN in the gradient as 0 and clip values
    that are too large (see `cpu`).

    Args:
        optimizer: An optimizer whose `problem()` is None.
        gradient: The mean gradient, any shape.
        slots: The optimizer's state in the order of `optimizer.slots`, each of that shape.
        weights: The parameters, of that shape.
        count: The number of updates t, this one included.

    Returns:
        The new slots and the new weights, float64. The arguments are not modified.
    """
    g, x, *state = (np.asarray(vector, np.float64) for vector in (gradient, weights, *slots))
    if optimizer.maximize:
        g = -g
    if optimizer.decoupled:
        x = x - optimizer.lr * optimizer.weight_decay * x
    elif optimizer.weight_decay != 0:
        g = g + optimizer.weight_decay * x
    return _FUNCTIONS[optimizer.kind](optimizer, g, state, x, count)


def squared_change(weights: ArrayLike, new_weights: ArrayLike) -> float:
    """Returns the sum of (new_weights - weights)**2 in float64, the square of an update's L2 norm.

    Args:
        weights: The parameters before the update, any shape.
        new_weights: The parameters after the update, of that shape.
    """
    return float(np.sum((np.asarray(new_weights, np.float64) - np.asarray(weights, np.float64)) ** 2))


_New = tuple[tuple[Vector, ...], Vector]
"""The new slots and weights."""


def _adadelta(optimizer: Adadelta, g: Vector, slots: list[Vector], x: Vector, t: int) -> _New:
    """Computes Adadelta (Zeiler, 2012, arXiv:1212.5701), with s and dx as the leaky averages.

    `lr` is torch's addition and is 1 in the paper.

        s_t  = rho s_{t-1} + (1 - rho) g_t^2                       (1)
        x_t  = x_{t-1} - lr g'_t                                   (2)
        g'_t = sqrt(dx_{t-1} + eps) / sqrt(s_t + eps) * g_t        (3)
        dx_t = rho dx_{t-1} + (1 - rho) g'_t^2                     (4)
    """
    s, dx = slots
    rho, eps = optimizer.rho, optimizer.eps
    s = rho * s + (1 - rho) * g**2
    step = np.sqrt(dx + eps) / np.sqrt(s + eps) * g
    dx = rho * dx + (1 - rho) * step**2
    return (s, dx), x - optimizer.lr * step


def _sgd(optimizer: SGD, g: Vector, slots: list[Vector], x: Vector, t: int) -> _New:
    """Computes SGD with the momentum of Sutskever et al. (2013) as in torch, with b as the buffer and d as dampening.

    b_1 = g_1                                                  the first update
    b_t = momentum b_{t-1} + (1 - d) g_t                       later ones
    x_t = x_{t-1} - lr b_t
    x_t = x_{t-1} - lr (g_t + momentum b_t)                    with nesterov
    x_t = x_{t-1} - lr g_t                                     without momentum
    """
    if optimizer.momentum == 0:
        return (), x - optimizer.lr * g
    b = g if t == 1 else optimizer.momentum * slots[0] + (1 - optimizer.dampening) * g
    direction = g + optimizer.momentum * b if optimizer.nesterov else b
    return (b,), x - optimizer.lr * direction


def _adagrad(optimizer: Adagrad, g: Vector, slots: list[Vector], x: Vector, t: int) -> _New:
    """Computes Adagrad (Duchi et al., 2011, JMLR 12), with s as the sum. `lr_decay` is torch's addition.

    s_t = s_{t-1} + g_t^2
    x_t = x_{t-1} - lr / (1 + (t - 1) lr_decay) g_t / (sqrt(s_t) + eps)
    """
    s = slots[0] + g**2
    rate = optimizer.lr / (1 + (t - 1) * optimizer.lr_decay)
    return (s,), x - rate * g / (np.sqrt(s) + optimizer.eps)


def _rmsprop(optimizer: RMSprop, g: Vector, slots: list[Vector], x: Vector, t: int) -> _New:
    """Computes RMSprop (Tieleman and Hinton, 2012), with s and a as the leaky averages and b as the buffer.

    The centered form is that of Graves (2013, arXiv:1308.0850). Its variance is at least 0 but for rounding.

        s_t = alpha s_{t-1} + (1 - alpha) g_t^2
        a_t = alpha a_{t-1} + (1 - alpha) g_t                      if centered
        v_t = max(s_t - a_t^2, 0), or s_t if not centered
        b_t = momentum b_{t-1} + g_t / (sqrt(v_t) + eps)           b_{t-1} = 0 without momentum
        x_t = x_{t-1} - lr b_t
    """
    alpha = optimizer.alpha
    s = alpha * slots[0] + (1 - alpha) * g**2
    new, v = [s], s
    if optimizer.centered:
        a = alpha * slots[1] + (1 - alpha) * g
        v = np.maximum(s - a**2, 0)
        new.append(a)
    b = g / (np.sqrt(v) + optimizer.eps)
    if optimizer.momentum != 0:
        b = optimizer.momentum * slots[-1] + b
        new.append(b)
    return tuple(new), x - optimizer.lr * b


def _adam(optimizer: Adam, g: Vector, slots: list[Vector], x: Vector, t: int) -> _New:
    """Computes Adam (Kingma and Ba, 2014, arXiv:1412.6980, Algorithm 1), with m and v as the moments.

    With amsgrad (Reddi et al., 2018, arXiv:1904.09237) u is the largest v so far, before its correction.

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        u_t = max(u_{t-1}, v_t), or v_t without amsgrad
        x_t = x_{t-1} - lr (m_t / (1 - beta1^t)) / (sqrt(u_t / (1 - beta2^t)) + eps)
    """
    beta1, beta2 = optimizer.beta1, optimizer.beta2
    m = beta1 * slots[0] + (1 - beta1) * g
    v = beta2 * slots[1] + (1 - beta2) * g**2
    u = np.maximum(slots[2], v) if optimizer.amsgrad else v
    new = (m, v, u) if optimizer.amsgrad else (m, v)
    return new, x - optimizer.lr * (m / (1 - beta1**t)) / (np.sqrt(u / (1 - beta2**t)) + optimizer.eps)


def _lion(optimizer: Lion, g: Vector, slots: list[Vector], x: Vector, t: int) -> _New:
    """Computes Lion (Chen et al., 2023, arXiv:2302.06675, Algorithm 2), with m as the momentum and c as the direction.

    c_t = beta1 m_{t-1} + (1 - beta1) g_t
    x_t = x_{t-1} - lr sign(c_t)
    m_t = beta2 m_{t-1} + (1 - beta2) g_t
    """
    beta1, beta2 = optimizer.beta1, optimizer.beta2
    c = beta1 * slots[0] + (1 - beta1) * g
    return (beta2 * slots[0] + (1 - beta2) * g,), x - optimizer.lr * np.sign(c)


_FUNCTIONS: dict[str, Callable[[Any, Vector, list[Vector], Vector, int], _New]] = {
    "adadelta": _adadelta,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adam,
    "lion": _lion,
}
