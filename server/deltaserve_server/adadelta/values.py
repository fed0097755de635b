"""What admission must know of a gradient: are its values fit, which content is it, and how long is it."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from deltaserve_server.adadelta._compiled import compiled, intrinsic, received, types
from deltaserve_server.adadelta._vectors import (
    DOUBLES,
    LANES,
    LONGS,
    WORDS,
    Bits,
    Floats,
    Memory,
    StoredModel,
    each_group,
    splat,
    zeros,
)
from deltaserve_server.adadelta.float16 import FORMATS, as_bits
from deltaserve_server.adadelta.formats import Values, widened
from deltaserve_server.adadelta.hyperparameters import MAGNITUDE_MAX

BLOCK = 1 << 18
"""Elements of the flat vector that have sums of squares of their own."""

_MAGNITUDE_BITS = 0x7FFFFFFF
# Without their sign, floats are in the order of their bits, infinities and NaN above all others.
_LARGEST_BITS = int(np.float32(MAGNITUDE_MAX).view(np.uint32))

# SplitMix64 (Steele, Lea and Flood, 2014): the increment is odd, and the rest is a bijection of 64 bits.
_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31

_MODULUS = 1 << 64


def lanes(size: int) -> NDArray[np.float64]:
    """Returns the sums of squares of a push of which nothing came yet: float64 [blocks, 16], each block 2**18 elements.

    Args:
        size: Elements of the flat vector.
    """
    return np.zeros((-(-size // BLOCK), LANES))


def norm(squares: NDArray[np.float64]) -> float:
    """Returns a push's L2 norm, float64: the lanes added up block by block and in order, and the root of that.

    Args:
        squares: The lanes, float64 [blocks, 16], after the whole push was inspected.
    """
    total = 0.0
    for lane in squares.ravel().tolist():
        total += lane
    return math.sqrt(total)


def inspect(values: Values, start: int, fingerprint: int, squares: NDArray[np.float64]) -> tuple[int, int]:
    """Finds the first value that no gradient may have, extends a push's fingerprint and its sums of squares.

    One pass, without the GIL. A value is bad if it is NaN, infinite, or of a magnitude above `MAGNITUDE_MAX`. All is
    that of the values as float32, in whatever format they come.

    The fingerprint is the sum, modulo 2**64, of a mix of each element's bits and its position. So it does not depend on
    how a push was cut into chunks, nor on the order in which they are inspected. One changed element always changes it;
    two different pushes by accident have the same one with a probability of 2**-64. It protects against mistakes, not
    against those who look for a collision.

    The square of the element at position p is added, in float64, to lane p % 16 of block p // 2**18. So where the
    elements of each block are inspected in ascending order, the lanes have the same bits however a push was cut, and
    whatever the order of the blocks: several threads may inspect different blocks at a time. The lanes are finite where
    no value is bad.

    Args:
        values: A chunk of a gradient, float32 or of 16 bits (`formats`), [n], contiguous; may be read-only and start
            at any byte.
        start: The position of its first element in the flat vector, in elements.
        fingerprint: Of what was inspected before; 0 at first.
        squares: The lanes, float64 [blocks, 16], with what was inspected before; added to in place. Of no meaning after
            a bad value.

    Returns:
        The index in `values` of the first bad value, or -1; and the fingerprint including this chunk.

    Raises:
        TypeError: The values are not a contiguous vector of their type, or the lanes not one of float64.
        ValueError: There are not 16 lanes in a block, or no lanes for the last element.
    """
    if squares.shape[1:] != (LANES,) or not 0 <= start <= len(squares) * BLOCK - values.size:
        expected = f"[{-(-(start + values.size) // BLOCK)}, {LANES}]"
        raise ValueError(f"expected lanes {expected} or more blocks of them, got {list(squares.shape)}")
    largest, fingerprint = _inspect(as_bits(values), start, fingerprint, squares)
    return (_first_bad(values) if largest > _LARGEST_BITS else -1), fingerprint


def _first_bad(values: Values) -> int:
    magnitudes = widened(values).view(np.uint32) & np.uint32(_MAGNITUDE_BITS)
    return int(np.argmax(magnitudes > np.uint32(_LARGEST_BITS)))


def _mixed(values: Bits, offsets: Bits) -> Bits:
    mixed = values.longs() + offsets
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    return mixed ^ (mixed >> _SHIFTS[2])


def _type_inspect(_context: Any, values: Any, start: Any, squares: Any) -> Any:
    """Makes the code for elements of one block, whose first position is `start` and whose lanes are `squares`."""
    steps = ir.Constant(LONGS, [lane * _INCREMENT % _MODULUS for lane in range(LANES)])

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        chunk = Memory(context, builder, signature.args[0], arguments[0])
        array = context.make_array(signature.args[2])(context, builder, arguments[2])
        held = builder.bitcast(array.data, DOUBLES.as_pointer())
        squares = StoredModel(Floats(builder, builder.load(held, align=8)))
        mixes, largest = StoredModel(Bits(builder, zeros(LONGS))), StoredModel(Bits(builder, zeros(WORDS)))
        head = builder.and_(arguments[1], ir.Constant(arguments[1].type, LANES - 1))
        first = builder.mul(builder.sub(arguments[1], head), ir.Constant(head.type, _INCREMENT))
        offsets = StoredModel(Bits(builder, builder.add(splat(builder, first), steps)))

        def step(at: Any, mask: Any) -> None:
            loaded = chunk.load(at, mask)
            bits, wide = loaded.bits(), loaded.doubles()
            mixed = _mixed(bits, offsets.lanes)
            mixes.lanes += mixed if mask is None else mixed.where(mask, 0)
            largest.lanes = (bits & _MAGNITUDE_BITS).at_least(largest.lanes)
            # A square is exact: it is rounded but once, with the sum.
            squares.lanes = wide.fused(wide, squares.lanes)
            offsets.lanes += LANES * _INCREMENT % _MODULUS

        each_group(builder, chunk.size, step, head)
        builder.store(squares.lanes.value, held, align=8)
        made = [largest.lanes.largest(), mixes.lanes.total()]
        return context.make_tuple(builder, signature.return_type, made)

    return types.Tuple((types.uint32, types.uint64))(values, types.uint64, squares), generate


_inspect_vector: Any = intrinsic(_type_inspect)


def _inspect_chunk(values: Any, start: Any, fingerprint: Any, squares: Any) -> Any:
    largest = np.uint32(0)
    first = np.uint64(0)
    while first < np.uint64(values.size):
        position = start + first
        last = min(first + np.uint64(BLOCK) - position % np.uint64(BLOCK), np.uint64(values.size))
        found, mixed = _inspect_vector(values[first:last], position, squares[position // np.uint64(BLOCK)])
        largest = max(largest, found)
        fingerprint += mixed
        first = last
    return largest, fingerprint


_uint32, _uint64 = types.uint32, types.uint64
_inspect = compiled(
    [
        types.Tuple((_uint32, _uint64))(received(kind), _uint64, _uint64, types.Array(types.float64, 2, "C"))
        for kind in FORMATS
    ],
    _inspect_chunk,
)
