"""Adadelta in numba, float32, for vectors in host memory: one fused pass, 28 bytes an element, bound by memory.

The arithmetic is that of `torch.optim.Adadelta`, operation for operation: a product that is added to something is fused
with the addition, that is, rounded once, as in torch's own vector code. This is written out below and never left to the
compiler, so an element gets the same bits in a loop's vector part and in its rest, in any split of a vector into
ranges, on any processor, and from `cuda`. Square roots are correctly rounded, which torch's are not everywhere.

The averages stay finite, whatever finite values come. To that end a gradient, after division and weight decay, and a
step are cut off at `MAGNITUDE_MAX`, where torch's square would be infinite and its coordinate dead; so no average can
pass the largest float32, even where rho and 1 - rho as rounded add up to more than 1. Two more cuts keep an eps near
the largest float32, and one near 0, from making infinities of the roots.

A processor without fused multiply-add (x86 from before 2013) gets the same bits from the C library, several times
slower. Importing this takes as long as importing numba, and the first time as long as compiling.
"""

import math
from typing import Any

import numpy as np
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from deltaserve_server.adadelta._compiled import compiled, readable, received, types, writable
from deltaserve_server.adadelta._squares import squared_distance
from deltaserve_server.adadelta.hyperparameters import FLOAT32_MAX, MAGNITUDE_MAX, Hyperparameters, Scalars, scalars

Vector = NDArray[np.float32]

_FLOAT32_MAX, _MAGNITUDE_MAX = np.float32(FLOAT32_MAX), np.float32(MAGNITUDE_MAX)
_ZERO = np.float32(0)

_BLOCK = 1 << 15
"""Elements that are updated before their change is added up: both weights are still in a near cache then. In shorter
blocks, a processor keeps losing sight of what it is to fetch next."""


def update(
    gradient: Vector,
    divisor: float,
    square_avg: Vector,
    acc_delta: Vector,
    weights: Vector,
    new_weights: Vector,
    hyperparameters: Hyperparameters,
) -> float:
    """Makes one update of a range, on the calling thread and without the GIL.

    Where gradient / divisor and the weights are finite, the averages stay finite, whatever the hyperparameters. Weights
    do as long as lr times `MAGNITUDE_MAX`, added to them, is finite. Denormal numbers are numbers.

    Args:
        gradient: The sum of a round's gradients, float32 [n], contiguous; may be read-only and start at any byte.
        divisor: The sum of the gradients' weights, > 0; rounded to float32.
        square_avg: The leaky average of squared gradients, float32 [n], >= 0 and finite; updated in place.
        acc_delta: The leaky average of squared steps, float32 [n], >= 0 and finite; updated in place.
        weights: The parameters, float32 [n]; only read.
        new_weights: Where the new parameters go, float32 [n].
        hyperparameters: Without a `problem`.

    Returns:
        The sum of (new_weights - weights)**2: differences in float32, squares and sum in float64. Infinite only where a
        weight moved by more than the largest float32, which takes an lr above 1e19. It has the same bits on any
        processor; but how a vector was split into ranges may show in its last ones.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector is not a contiguous one of float32, or one to be written is read-only or not aligned.
    """
    if not gradient.size == square_avg.size == acc_delta.size == weights.size == new_weights.size:
        sizes = [vector.size for vector in (gradient, square_avg, acc_delta, weights, new_weights)]
        raise ValueError(f"expected five vectors of one length, got lengths {sizes}")
    squares: float = _update(gradient, divisor, square_avg, acc_delta, weights, new_weights, *scalars(hyperparameters))
    return squares


def add(total: Vector, values: Vector, factor: float) -> None:
    """Adds factor times the values to a sum, without the GIL: product and sum are each rounded to float32.

    Args:
        total: The sum, float32 [n]; added to in place.
        values: What is added, float32 [n], contiguous; may be read-only and start at any byte.
        factor: > 0; rounded to float32. 1 adds the values as they are.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector is not a contiguous one of float32, or the sum is read-only or not aligned.
    """
    if total.size != values.size:
        raise ValueError(f"expected two vectors of one length, got lengths {[total.size, values.size]}")
    _add(total, values, factor)


def _type_multiply_add(_context: Any, factor: Any, other_factor: Any, summand: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(factor, other_factor, summand), generate


# factor * other_factor + summand, rounded once.
_multiply_add: Any = intrinsic(_type_multiply_add)


@register_jitable
def _at_most(limit: Any, value: Any) -> Any:
    # Unlike min, this says what becomes of a NaN: the comparison is false, it stays.
    return limit if value > limit else value  # noqa: FURB136


@register_jitable
def _bounded(value: Any) -> Any:
    return -_at_most(_MAGNITUDE_MAX, -_at_most(_MAGNITUDE_MAX, value))


@register_jitable
def _update_block(
    gradient: Any, divisor: Any, square_avg: Any, acc_delta: Any, weights: Any, new_weights: Any,
    minus_lr: Any, rho: Any, one_minus_rho: Any, eps: Any, weight_decay: Any, sign: Any,
) -> None:  # fmt: skip
    for i in range(gradient.size):
        g = sign * (gradient[i] / divisor)
        if weight_decay != _ZERO:
            g = _multiply_add(weight_decay, weights[i], g)
        g = _bounded(g)
        s = _multiply_add(one_minus_rho * g, g, square_avg[i] * rho)
        rate = _at_most(_FLOAT32_MAX, math.sqrt(acc_delta[i] + eps) / math.sqrt(_at_most(_FLOAT32_MAX, s + eps)))
        step = _bounded(rate * g)
        acc_delta[i] = _multiply_add(one_minus_rho * step, step, acc_delta[i] * rho)
        square_avg[i] = s
        new_weights[i] = -_at_most(_FLOAT32_MAX, -_at_most(_FLOAT32_MAX, _multiply_add(minus_lr, step, weights[i])))


def _update_range(
    gradient: Any, divisor: Any, square_avg: Any, acc_delta: Any, weights: Any, new_weights: Any,
    minus_lr: Any, rho: Any, one_minus_rho: Any, eps: Any, weight_decay: Any, sign: Any,
) -> Any:  # fmt: skip
    squares = 0.0
    for first in range(0, gradient.size, _BLOCK):
        last = min(first + _BLOCK, gradient.size)
        old, new = weights[first:last], new_weights[first:last]
        _update_block(
            gradient[first:last], divisor, square_avg[first:last], acc_delta[first:last], old, new,
            minus_lr, rho, one_minus_rho, eps, weight_decay, sign,
        )  # fmt: skip
        squares += squared_distance(new, old)
    return squares


def _add_scaled(total: Any, values: Any, factor: Any) -> None:
    for i in range(values.size):
        total[i] += factor * values[i]


_number = types.float32
_add = compiled(types.void(writable(_number), received(_number), _number), _add_scaled)
_update = compiled(
    types.float64(
        received(_number),
        _number,
        writable(_number),
        writable(_number),
        readable(_number),
        writable(_number),
        *[_number] * len(Scalars._fields),
    ),
    _update_range,
)
