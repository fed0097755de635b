"""Adadelta in numba, float32, for vectors in host memory: one fused pass, 28 bytes an element, bound by memory.

The arithmetic is that of `torch.optim.Adadelta`, operation for operation: a product that is added to something is fused
with the addition, that is, rounded once, as in torch's own vector code. This is written out below and never left to the
compiler, so an element gets the same bits in any place of a vector, in any split of a vector into ranges, on any
processor, and from `cuda`. Square roots are correctly rounded, which torch's are not everywhere.

The averages stay finite, whatever values come. A gradient that is NaN after division counts as 0: admission lets none
in, but one that lies in memory shared with its worker may change after that. And a gradient, after division and weight
decay, and a step are cut off at `MAGNITUDE_MAX`, where torch's square would be infinite and its coordinate dead; so no
average can pass the largest float32, even where rho and 1 - rho as rounded add up to more than 1. Two more cuts keep an
eps near the largest float32, and one near 0, from making infinities of the roots.

A processor without fused multiply-add (x86 from before 2013) gets the same bits from the C library, several times
slower. Importing this takes as long as importing numba, and the first time as long as compiling.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.adadelta._compiled import cgutils, compiled, intrinsic, readable, received, types, writable
from deltaserve_server.adadelta._vectors import DOUBLES, Floats, Memory, StoredModel, each_group, splat, zeros
from deltaserve_server.adadelta.float16 import FORMATS, as_bits
from deltaserve_server.adadelta.formats import Values
from deltaserve_server.adadelta.hyperparameters import FLOAT32_MAX, MAGNITUDE_MAX, Hyperparameters, Scalars, scalars

Vector = NDArray[np.float32]


def update(
    gradient: Values,
    divisor: float,
    square_avg: Vector,
    acc_delta: Vector,
    weights: Vector,
    new_weights: Vector,
    hyperparameters: Hyperparameters,
    *,
    streaming: bool = False,
) -> float:
    """Makes one update of a range, on the calling thread and without the GIL.

    Where the weights are finite, the averages stay finite, whatever the gradient and the hyperparameters. Weights do as
    long as lr times `MAGNITUDE_MAX`, added to them, is finite. Denormal numbers are numbers.

    Args:
        gradient: The sum of a round's gradients, float32 or of 16 bits (`formats`), [n], contiguous; may be
            read-only and start at any byte. A NaN in it counts as 0.
        divisor: The sum of the gradients' weights, > 0; rounded to float32.
        square_avg: The leaky average of squared gradients, float32 [n], >= 0 and finite; updated in place.
        acc_delta: The leaky average of squared steps, float32 [n], >= 0 and finite; updated in place.
        weights: The parameters, float32 [n]; only read.
        new_weights: Where the new parameters go, float32 [n].
        hyperparameters: Without a `problem`.
        streaming: Whether the new weights go around the caches, which is faster where they are too many to stay there.
            Needs them to begin at a multiple of 64 bytes; elsewhere it changes nothing. The bits are the same.

    Returns:
        The sum of (new_weights - weights)**2: differences in float32, squares and sums in float64, of every sixteenth
        element by itself first. Infinite only where a weight moved by more than the largest float32, which takes an lr
        above 1e19. It has the same bits on any processor, and depends on the length of the range and its values alone;
        but how a vector was split into ranges may show in its last ones.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector is not a contiguous one of its type, or one to be written is read-only or not aligned.
    """
    if not gradient.size == square_avg.size == acc_delta.size == weights.size == new_weights.size:
        sizes = [vector.size for vector in (gradient, square_avg, acc_delta, weights, new_weights)]
        raise ValueError(f"expected five vectors of one length, got lengths {sizes}")
    squares: float = _update(
        as_bits(gradient), square_avg, acc_delta, weights, new_weights, streaming, divisor, *scalars(hyperparameters)
    )
    return squares


def add(total: Vector, values: Values, factor: float) -> None:
    """Adds factor times the values to a sum, without the GIL: product and sum are each rounded to float32.

    Args:
        total: The sum, float32 [n]; added to in place.
        values: What is added, float32 or of 16 bits (`formats`), [n], contiguous; may be read-only and
            start at any byte.
        factor: > 0; rounded to float32. 1 adds the values as they are.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector is not a contiguous one of its type, or the sum is read-only or not aligned.
    """
    if total.size != values.size:
        raise ValueError(f"expected two vectors of one length, got lengths {[total.size, values.size]}")
    _add(total, as_bits(values), factor)


def _updated(g: Floats, s: Floats, acc: Floats, w: Floats, numbers: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """Makes the code of one update; returns square_avg, acc_delta and the new weights."""
    divisor, minus_lr, rho, one_minus_rho, eps, weight_decay, sign = numbers
    g = (sign * (g / divisor)).numbers()
    g = weight_decay.fused(w, g).where(weight_decay.compared("!=", 0.0), g)
    g = g.bounded(MAGNITUDE_MAX)
    s = (one_minus_rho * g).fused(g, s * rho)
    rate = ((acc + eps).root() / (s + eps).at_most(FLOAT32_MAX).root()).at_most(FLOAT32_MAX)
    step = (rate * g).bounded(MAGNITUDE_MAX)
    acc = (one_minus_rho * step).fused(step, acc * rho)
    return s, acc, minus_lr.fused(step, w).bounded(FLOAT32_MAX)


def _type_update(_context: Any, vectors: Any, streaming: Any, numbers: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = zip(signature.args[0], cgutils.unpack_tuple(builder, arguments[0]), strict=True)
        gradient, square_avg, acc_delta, weights, new_weights = (Memory(context, builder, *array) for array in arrays)
        lanes = [Floats(builder, splat(builder, x)) for x in cgutils.unpack_tuple(builder, arguments[2])]
        squares = StoredModel(Floats(builder, zeros(DOUBLES)))
        streamed = builder.and_(arguments[1], new_weights.at_line())

        def step(at: Any, mask: Any) -> None:
            g, s, acc, old = (memory.load(at, mask) for memory in (gradient, square_avg, acc_delta, weights))
            s, acc, new = _updated(g, s, acc, old, lanes)
            square_avg.store(at, s, mask)
            acc_delta.store(at, acc, mask)
            # Where the mask does not hold, everything is 0. A square is exact: it is rounded but once, with the sum.
            change = (new - old).doubles()
            squares.lanes = change.fused(change, squares.lanes)
            if mask is not None:
                new_weights.store(at, new, mask)
                return
            for memory in (gradient, square_avg, acc_delta, weights):
                memory.fetch(at)
            with builder.if_else(streamed) as (then, otherwise):
                with then:
                    new_weights.stream(at, new)
                with otherwise:
                    new_weights.store(at, new, None)

        each_group(builder, gradient.size, step)
        # What went around the caches is there for all before whatever this thread does next.
        with builder.if_then(streamed):
            builder.fence("seq_cst")
        return squares.lanes.total()

    return types.float64(vectors, streaming, numbers), generate


def _type_add(_context: Any, total: Any, values: Any, factor: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, added = (Memory(context, builder, signature.args[k], arguments[k]) for k in range(2))
        times = Floats(builder, splat(builder, arguments[2]))

        def step(at: Any, mask: Any) -> None:
            sums.store(at, sums.load(at, mask) + times * added.load(at, mask), mask)

        each_group(builder, sums.size, step)
        return context.get_dummy_value()

    return types.void(total, values, factor), generate


_update_vectors: Any = intrinsic(_type_update)
_add_vectors: Any = intrinsic(_type_add)


def _update_range(
    gradient: Any, square_avg: Any, acc_delta: Any, weights: Any, new_weights: Any, streaming: Any, divisor: Any,
    minus_lr: Any, rho: Any, one_minus_rho: Any, eps: Any, weight_decay: Any, sign: Any,
) -> Any:  # fmt: skip
    return _update_vectors(
        (gradient, square_avg, acc_delta, weights, new_weights),
        streaming,
        (divisor, minus_lr, rho, one_minus_rho, eps, weight_decay, sign),
    )


def _add_scaled(total: Any, values: Any, factor: Any) -> None:
    _add_vectors(total, values, factor)


_number = types.float32
_add = compiled([types.void(writable(_number), received(kind), _number) for kind in FORMATS], _add_scaled)
_update = compiled(
    [
        types.float64(
            received(kind),
            writable(_number),
            writable(_number),
            readable(_number),
            writable(_number),
            types.boolean,
            _number,
            *[_number] * len(Scalars._fields),
        )
        for kind in FORMATS
    ],
    _update_range,
)
