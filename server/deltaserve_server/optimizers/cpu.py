"""Adadelta in numba, float32, for vectors in host memory: one fused pass of 28 bytes an element, limited by memory.

The arithmetic is that of `torch.optim.Adadelta`, operation for operation: a product and the addition that follows it
are fused, that is, rounded once, as in torch's own vector code. The code below states each operation and leaves none to
the compiler, so an element gets the same bits at any position of a vector, in any split of a vector into ranges, on any
processor, and from `cuda`. Square roots are correctly rounded, which torch's are not everywhere.

The averages stay finite for any input:

- A gradient that is NaN after the division counts as 0. Admission refuses NaN, but a gradient in memory shared with its
  worker may change after that check.
- A gradient, after division and weight decay, and a step are clipped at `MAGNITUDE_MAX`. Beyond it torch's square is
  infinite, and its coordinate never moves again. With the clip no average exceeds the largest float32, even where the
  rounded rho and 1 - rho add up to more than 1.
- Two more clips keep an eps near the largest float32, or near 0, from making the roots infinite.

A processor without fused multiply-add (x86 from before 2013) gets the same bits from the C library, several times
slower. Importing this module imports numba, and compiles the kernels the first time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.optimizers._compiled import cgutils, compiled, intrinsic, readable, received, types, writable
from deltaserve_server.optimizers._vectors import DOUBLES, Accumulator, Floats, Memory, each_group, splat, zeros
from deltaserve_server.optimizers.float16 import FORMATS, as_bits
from deltaserve_server.optimizers.formats import Values
from deltaserve_server.optimizers.hyperparameters import FLOAT32_MAX, MAGNITUDE_MAX, Hyperparameters, Scalars, scalars

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
    """Applies one update to a range, on the calling thread and without the GIL.

    If the weights are finite, the averages stay finite for any gradient and hyperparameters. The weights stay finite as
    long as their sum with lr times `MAGNITUDE_MAX` is finite. Denormal numbers are not flushed to zero.

    Args:
        gradient: The sum of a round's gradients, [n], contiguous, of any type in `formats`. It may be read-only and
            start at any byte. A NaN in it counts as 0.
        divisor: The sum of the gradients' weights, > 0; rounded to float32.
        square_avg: The leaky average of squared gradients, float32 [n], >= 0 and finite; updated in place.
        acc_delta: The leaky average of squared steps, float32 [n], >= 0 and finite; updated in place.
        weights: The parameters, float32 [n]; read only.
        new_weights: Output, the new parameters, float32 [n].
        hyperparameters: Hyperparameters in range, whose `problem()` is None.
        streaming: Store the new weights around the caches, which is faster where the vector does not fit in them. It
            takes effect if they start at a multiple of 64 bytes, and never changes the bits.

    Returns:
        The sum of (new_weights - weights)**2, with differences in float32 and squares and sums in float64. It is
        infinite only where a weight moved by more than the largest float32, which takes an lr above 1e19. Each of the
        16 lanes has its own sum first, so the bits are the same on any processor and depend only on the range's values.
        A different split of a vector into ranges may change the last bits of the total.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector has another type or is not contiguous, or an output is read-only or not aligned.
    """
    if not gradient.size == square_avg.size == acc_delta.size == weights.size == new_weights.size:
        sizes = [vector.size for vector in (gradient, square_avg, acc_delta, weights, new_weights)]
        raise ValueError(f"expected five vectors of one length, got lengths {sizes}")
    squares: float = _update(
        as_bits(gradient), square_avg, acc_delta, weights, new_weights, streaming, divisor, *scalars(hyperparameters)
    )
    return squares


def add(total: Vector, values: Values, factor: float) -> None:
    """Adds factor * values to a sum, without the GIL; the product and the sum are each rounded to float32.

    Args:
        total: The sum, float32 [n]; updated in place.
        values: The summand, [n], contiguous, of any type in `formats`. It may be read-only and start at any byte.
        factor: > 0; rounded to float32.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector has another type or is not contiguous, or the sum is read-only or not aligned.
    """
    if total.size != values.size:
        raise ValueError(f"expected two vectors of one length, got lengths {[total.size, values.size]}")
    _add(total, as_bits(values), factor)


def _updated(g: Floats, s: Floats, acc: Floats, w: Floats, numbers: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """Generates the code of one update; returns square_avg, acc_delta and the new weights."""
    divisor, minus_lr, rho, one_minus_rho, eps, weight_decay, sign = numbers
    g = (sign * (g / divisor)).nan_to_zero()
    # As in torch, 0 skips the addition, which could change the sign of a zero gradient.
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
        squares = Accumulator(Floats(builder, zeros(DOUBLES)))
        streamed = builder.and_(arguments[1], new_weights.starts_at_cache_line())

        def step(at: Any, mask: Any) -> None:
            g, s, acc, old = (memory.load(at, mask) for memory in (gradient, square_avg, acc_delta, weights))
            s, acc, new = _updated(g, s, acc, old, lanes)
            square_avg.store(at, s, mask)
            acc_delta.store(at, acc, mask)
            # Lanes outside the mask are 0 here. A square of a float32 is exact in float64: only the sum rounds.
            change = (new - old).doubles()
            squares.lanes = change.fused(change, squares.lanes)
            if mask is not None:
                new_weights.store(at, new, mask)
                return
            for memory in (gradient, square_avg, acc_delta, weights):
                memory.prefetch(at)
            with builder.if_else(streamed) as (then, otherwise):
                with then:
                    new_weights.stream(at, new)
                with otherwise:
                    new_weights.store(at, new, None)

        each_group(builder, gradient.size, step)
        # Streaming stores are weakly ordered: the fence makes them visible before anything that this thread does next.
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
