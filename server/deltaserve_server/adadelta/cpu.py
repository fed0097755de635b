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
from deltaserve_server.adadelta.hyperparameters import FLOAT32_MAX, MAGNITUDE_MAX, Hyperparameters, Scalars, scalars

Vector = NDArray[np.float32]

_FLOAT32_MAX, _MAGNITUDE_MAX = np.float32(FLOAT32_MAX), np.float32(MAGNITUDE_MAX)
_ZERO = np.float32(0)


def update(
    gradient: Vector,
    divisor: float,
    square_avg: Vector,
    acc_delta: Vector,
    weights: Vector,
    new_weights: Vector,
    hyperparameters: Hyperparameters,
) -> None:
    """Makes one update of a range, on the calling thread and without the GIL.

    Where gradient / divisor and the weights are finite, the averages stay finite, whatever the hyperparameters. Weights
    do as long as lr times `MAGNITUDE_MAX`, added to them, is finite. Denormal numbers are numbers.

    Args:
        gradient: The sum of a round's gradients, float32 [n], contiguous; may be read-only and start at any byte.
        divisor: How many gradients make the sum, 1 to 2**24.
        square_avg: The leaky average of squared gradients, float32 [n], >= 0 and finite; updated in place.
        acc_delta: The leaky average of squared steps, float32 [n], >= 0 and finite; updated in place.
        weights: The parameters, float32 [n]; only read.
        new_weights: Where the new parameters go, float32 [n].
        hyperparameters: Without a `problem`.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector is not a contiguous one of float32, or one to be written is read-only or not aligned.
    """
    if not gradient.size == square_avg.size == acc_delta.size == weights.size == new_weights.size:
        sizes = [vector.size for vector in (gradient, square_avg, acc_delta, weights, new_weights)]
        raise ValueError(f"expected five vectors of one length, got lengths {sizes}")
    _update(gradient, divisor, square_avg, acc_delta, weights, new_weights, *scalars(hyperparameters))


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


def _update_range(
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


_number = types.float32
_update = compiled(
    types.void(
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
