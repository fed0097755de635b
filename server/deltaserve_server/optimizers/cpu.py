"""The optimizers in numba, float32, for vectors in host memory: one fused pass over all vectors, limited by memory.

A kernel evaluates the definition of its optimizer, operation for operation and 16 lanes at a time, within the steps
that all optimizers share. Each operation is stated and none is left to the compiler, so an element gets the same bits
at any position of a vector, in any split of a vector into ranges, on any processor, and from `cuda`. Square roots are
correctly rounded, which torch's are not everywhere.

The shared steps, in this order:

1. The gradient is divided by the divisor, and negated with `maximize`.
2. NaN becomes 0. Admission refuses NaN, but a gradient in memory shared with its worker may change after that check.
3. A coupled weight decay adds weight_decay times the weight. A decoupled one multiplies the weight by
   1 - lr * weight_decay, which is computed in float64, and clips it at `FLOAT32_MAX`.
4. The gradient is clipped at `MAGNITUDE_MAX`. Beyond it torch's square is infinite, and its coordinate never moves
   again.
5. The definition gives the new slots and the new weight. The weight is clipped at `FLOAT32_MAX`, if it can exceed it.

A kernel is compiled when it is first needed, one for each structure of an optimizer and element type of the gradient,
and loaded from numba's cache on disk in later processes. A processor without fused multiply-add (x86 from before 2013)
gets the same bits from the C library, several times slower.
"""

import functools
import hashlib
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from deltaserve._common.optimizers import Optimizer, definition
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX, bounded, rounded_to_float32
from deltaserve_server.optimizers import _vectors
from deltaserve_server.optimizers._compiled import cgutils, compiled, intrinsic, readable, received, types, writable
from deltaserve_server.optimizers._vectors import (
    LANES,
    Accumulator,
    FloatOperations,
    Floats,
    Memory,
    branched,
    each_group,
    joined,
    lanes_of_a_vector,
    part,
    splat,
    zeros,
)
from deltaserve_server.optimizers.float16 import FORMATS, as_bits
from deltaserve_server.optimizers.formats import Values
from deltaserve_server.optimizers.trace import kernel_numbers, traced

Vector = NDArray[np.float32]

_FORMATS = dict(zip(map(np.dtype, (np.float32, np.int16, np.uint16)), FORMATS, strict=True))
"""Numba's type for each type that `as_bits` returns."""

_compiling = threading.Lock()
_kernels: dict[tuple[object, ...], Any] = {}
"""The kernels so far, by structure and element type of the gradient."""

_definitions: dict[str, Optimizer] = {}
"""For each kernel's name an optimizer of its structure: code that is being compiled finds its definition here."""


def update(
    gradient: Values,
    divisor: float,
    slots: Sequence[Vector],
    weights: Vector,
    new_weights: Vector,
    optimizer: Optimizer,
    count: int,
    *,
    streaming: bool = False,
) -> float:
    """Applies one update to a range, on the calling thread and without the GIL.

    If the weights are finite, the slots and the new weights are finite for any gradient and hyperparameters. Denormal
    numbers are not flushed to zero.

    Args:
        gradient: The sum of a round's gradients, [n], contiguous, of any type in `formats`. It may be read-only and
            start at any byte. A NaN in it counts as 0.
        divisor: The sum of the gradients' weights, > 0; rounded to float32.
        slots: The optimizer's state in the order of `optimizer.slots`, each float32 [n], finite and not below the
            slot's minimum; updated in place.
        weights: The parameters, float32 [n]; read only.
        new_weights: Output, the new parameters, float32 [n].
        optimizer: An optimizer whose `problem()` is None.
        count: Its `relevant_count` of the number of updates of the range's tensors, this one included.
        streaming: Store the new weights around the caches, which is faster where the vector does not fit in them. It
            takes effect if they start at a multiple of 64 bytes, and never changes the bits.

    Returns:
        The sum of (new_weights - weights)**2, with differences in float32 and squares and sums in float64. It is
        infinite only where a weight moved by more than the largest float32. Each of the 16 lanes has its own sum first,
        so the bits are the same on any processor and depend only on the range's values. A different split of a vector
        into ranges may change the last bits of the total.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector has another type or is not contiguous, an output is read-only or not aligned, or the number
            of slots is not the optimizer's.
    """
    sizes = [vector.size for vector in (gradient, *slots, weights, new_weights)]
    if min(sizes) != max(sizes):
        raise ValueError(f"expected vectors of one length, got lengths {sizes}")
    bits = as_bits(gradient)
    short, packed = _packed(optimizer, count, divisor)
    kernel = _kernel(optimizer, bits.dtype)
    squares: float = kernel(bits, tuple(slots), weights, new_weights, streaming, short, packed)
    return squares


def prepare(optimizer: Optimizer) -> None:
    """Compiles or loads the kernels of an optimizer's structure, for all element types; from any thread.

    `update` does so itself for what it needs, if nobody has.
    """
    for dtype in _FORMATS:
        _kernel(optimizer, dtype)


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


# Every portion of an update asks for the same numbers.
@functools.lru_cache(maxsize=1024)
def _packed(optimizer: Optimizer, count: int, divisor: float) -> tuple[bool, Vector]:
    """Returns whether the kernel takes its short way, and its numbers.

    The short way multiplies the gradient by the first number, and adds no weight decay to it. The other one divides by
    that number. The reciprocal of a power of two is exact, if it is in float32's range: the product has the same bits,
    in a fraction of the time.
    """
    rounded = rounded_to_float32(-divisor if optimizer.maximize else divisor)
    decay, *scalars = kernel_numbers(optimizer, count)
    is_exact = abs(math.frexp(rounded)[0]) == 0.5 and abs(rounded) > 2.0**-128
    short = is_exact and (optimizer.decoupled or decay == 0)
    return short, np.array((1 / rounded if short else rounded, decay, *scalars), np.float32)


@functools.lru_cache(maxsize=256)
def _kernel(optimizer: Optimizer, dtype: np.dtype[Any]) -> Any:
    key = *optimizer.structure, dtype
    if key not in _kernels:  # a new lr must not wait for another kernel's compilation, which has the lock for seconds
        with _compiling:
            if key not in _kernels:
                _kernels[key] = _compiled_kernel(optimizer, _FORMATS[dtype])
    return _kernels[key]


def _compiled_kernel(optimizer: Optimizer, gradient: Any) -> Any:
    name = f"update_{optimizer.kind}_{gradient}_{_digest(optimizer)}"
    _definitions[name] = optimizer
    slots = types.Tuple([writable(types.float32)] * len(optimizer.slots))
    vectors = received(gradient), slots, readable(types.float32), writable(types.float32)
    signature = types.float64(*vectors, types.boolean, types.boolean, readable(types.float32))
    return compiled([signature], _update_range(name))


def _digest(optimizer: Optimizer) -> str:
    """Returns a digest of what the code of an optimizer's kernel follows from."""
    parts = [repr((traced(optimizer), optimizer.decoupled, optimizer.clips_weight)).encode(), *_sources()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _sources() -> list[bytes]:
    return [Path(file).read_bytes() for file in (__file__, str(_vectors.__file__), str(definition.__file__))]


def _updated(
    builder: Any, optimizer: Optimizer, g: Floats, w: Floats, slots: Sequence[Floats], short: Any, numbers: Any
) -> tuple[Floats, Sequence[Floats]]:
    """Generates the code of one update; returns the new weights and slots."""
    op = FloatOperations()
    scale, decay, *scalars = numbers

    def the_short_way() -> Any:
        return (g * scale).nan_to_zero()

    def the_long_way() -> Any:
        divided = (g / scale).nan_to_zero()
        if optimizer.decoupled:
            return divided
        # As in torch, 0 skips the addition, which could change the sign of a zero gradient.
        decays = builder.fcmp_ordered("!=", decay.first(), decay.first().type(0.0))
        return branched(builder, decays, lambda: decay.fused(w, divided), lambda: divided)

    # One branch in the usual case: more of them cost a tenth of Adadelta's time.
    prepared = branched(builder, short, the_short_way, the_long_way)
    if optimizer.decoupled:
        w = bounded(op, w * decay, FLOAT32_MAX)
    h = SimpleNamespace(**dict(zip(optimizer.scalars(optimizer.relevant_count(1)), scalars, strict=True)))
    new, slots = optimizer.update(op, bounded(op, prepared, MAGNITUDE_MAX), w, slots, h)
    return bounded(op, new, FLOAT32_MAX) if optimizer.clips_weight else new, slots


def _type_update(
    _context: Any, name: Any, gradient: Any, slots: Any, weights: Any, new_weights: Any, streaming: Any, short: Any,
    numbers: Any,
) -> Any:  # fmt: skip
    optimizer = _definitions[name.literal_value]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # One of the processor's vectors after the other: 16 lanes of all values at once would need more registers than
        # processors without AVX-512 have.
        width = lanes_of_a_vector(context)

        def memory(kind: Any, array: Any) -> Memory:
            return Memory(context, builder, kind, array, width)

        gradient, weights, new_weights = (memory(signature.args[k], arguments[k]) for k in (1, 3, 4))
        slots = list(map(memory, signature.args[2], cgutils.unpack_tuple(builder, arguments[2])))
        count = 2 + len(optimizer.scalars(optimizer.relevant_count(1)))
        numbers = memory(signature.args[7], arguments[7]).splats(count)
        firsts = range(0, LANES, width)
        squares = [Accumulator(Floats(builder, zeros(ir.VectorType(ir.DoubleType(), width)))) for _ in firsts]
        streamed = builder.and_(arguments[5], new_weights.starts_at_cache_line())

        def step_part(at: Any, mask: Any, squares: Accumulator) -> None:
            g, old, *values = (vector.load(at, mask) for vector in (gradient, weights, *slots))
            new, new_values = _updated(builder, optimizer, g, old, values, arguments[6], numbers)
            for slot, value in zip(slots, new_values, strict=True):
                slot.store(at, value, mask)
            # Lanes outside the mask are 0 here. A square of a float32 is exact in float64: only the sum rounds.
            change = (new - old).doubles()
            squares.lanes = change.fused(change, squares.lanes)
            if mask is not None:
                new_weights.store(at, new, mask)
                return
            with builder.if_else(streamed) as (then, otherwise):
                with then:
                    new_weights.stream(at, new)
                with otherwise:
                    new_weights.store(at, new, None)

        def step(at: Any, mask: Any) -> None:
            if mask is None:
                for vector in (gradient, weights, *slots):
                    vector.prefetch(at)
            for first, total in zip(firsts, squares, strict=True):
                place = builder.add(at, ir.Constant(at.type, first))
                step_part(place, None if mask is None else part(builder, mask, first, width), total)

        each_group(builder, gradient.size, step)
        # Streaming stores are weakly ordered: the fence makes them visible before anything that this thread does next.
        with builder.if_then(streamed):
            builder.fence("seq_cst")
        return Floats(builder, joined(builder, [total.lanes.value for total in squares])).total()

    arguments = name, gradient, slots, weights, new_weights, streaming, short, numbers
    return types.float64(*arguments), generate


def _type_add(_context: Any, total: Any, values: Any, factor: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, added = (Memory(context, builder, signature.args[k], arguments[k]) for k in range(2))
        times = Floats(builder, splat(builder, arguments[2]))

        def step(at: Any, mask: Any) -> None:
            sums.store(at, sums.load(at, mask) + times * added.load(at, mask), mask)

        each_group(builder, sums.size, step)
        return context.get_dummy_value()

    return types.void(total, values, factor), generate


_update_vectors: Any = intrinsic(prefer_literal=True)(_type_update)
_add_vectors: Any = intrinsic(_type_add)


def _update_range(name: str) -> Any:
    """Returns the kernel of a name in `_definitions`, before its compilation."""

    def kernel(
        gradient: Any, slots: Any, weights: Any, new_weights: Any, streaming: Any, short: Any, numbers: Any
    ) -> Any:
        return _update_vectors(name, gradient, slots, weights, new_weights, streaming, short, numbers)

    # The name of its files in the cache. Two processes that fill one file at the same time must write the same code.
    kernel.__qualname__ = name
    return kernel


def _add_scaled(total: Any, values: Any, factor: Any) -> None:
    _add_vectors(total, values, factor)


_add = compiled([types.void(writable(types.float32), received(kind), types.float32) for kind in FORMATS], _add_scaled)
