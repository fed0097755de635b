"""The inspection of a gradient for admission: its first invalid value, its fingerprint and its L2 norm, in one pass."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from deltaserve._common.optimizers.definition import MAGNITUDE_MAX
from deltaserve_server.optimizers._compiled import compiled, intrinsic, received, types
from deltaserve_server.optimizers._vectors import (
    DOUBLES,
    LANES,
    LONGS,
    WORDS,
    Accumulator,
    Bits,
    Floats,
    Memory,
    each_group,
    splat,
    zeros,
)
from deltaserve_server.optimizers.float16 import FORMATS, as_bits
from deltaserve_server.optimizers.formats import Values, widened

BLOCK = 1 << 18
"""Elements of the flat vector in a block; each block has its own sums of squares."""

_MAGNITUDE_BITS = 0x7FFFFFFF
# Without the sign, float32 are ordered like their bits, with infinity and NaN above all finite values.
_LARGEST_BITS = int(np.float32(MAGNITUDE_MAX).view(np.uint32))

# SplitMix64 (Steele, Lea and Flood, 2014): the increment is odd, and the rest is a bijection of 64 bits.
_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31

_MODULUS = 1 << 64


def lanes(size: int) -> NDArray[np.float64]:
    """Returns sums of squares for a push, all 0: float64 [blocks, 16], with blocks of 2**18 elements.

    Args:
        size: Number of elements of the flat vector.
    """
    return np.zeros((-(-size // BLOCK), LANES))


def norm(squares: NDArray[np.float64]) -> float:
    """Returns a push's L2 norm in float64: the root of the sum of its lanes, added block by block and in order.

    Args:
        squares: Sums of squares after the whole push was inspected, float64 [blocks, 16].
    """
    total = 0.0
    for lane in squares.ravel().tolist():
        total += lane
    return math.sqrt(total)


def inspect(values: Values, start: int, fingerprint: int, squares: NDArray[np.float64]) -> tuple[int, int]:
    """Inspects a chunk of a gradient in one pass, without the GIL.

    It finds the first invalid value and adds the chunk to the push's fingerprint and sums of squares. A value is
    invalid if it is NaN, infinite, or has a magnitude above `MAGNITUDE_MAX`. All results are those of the values as
    float32.

    The fingerprint is the sum, modulo 2**64, of a mix of each element's bits and its position. It depends neither on
    the chunks' boundaries nor on their order. One changed element always changes it; two different pushes share it with
    a probability of 2**-64. It detects mistakes, not deliberate collisions.

    The square of the element at position p is added, in float64, to lane p % 16 of block p // 2**18. If each block's
    elements are inspected in ascending order, the lanes have the same bits for any chunks, and for any order of the
    blocks: several threads may inspect different blocks at the same time. The lanes are finite if all values are valid.

    Args:
        values: The chunk, [n], contiguous, of any type in `formats`. It may be read-only and start at any byte.
        start: Position of its first element in the flat vector.
        fingerprint: Fingerprint of the chunks inspected so far; 0 for none.
        squares: Sums of squares of the chunks inspected so far, float64 [blocks, 16]; updated in place. They have no
            meaning after an invalid value.

    Returns:
        The index in `values` of the first invalid value, or -1; and the fingerprint including this chunk.

    Raises:
        TypeError: The values have another type or are not contiguous, or the sums are not float64.
        ValueError: The sums have another shape, or none for the last element.
    """
    if squares.shape[1:] != (LANES,) or not 0 <= start <= len(squares) * BLOCK - values.size:
        expected = f"[{-(-(start + values.size) // BLOCK)}, {LANES}]"
        raise ValueError(f"expected sums of squares {expected} or with more blocks, got {list(squares.shape)}")
    largest, fingerprint = _inspect(as_bits(values), start, fingerprint, squares)
    if largest <= _LARGEST_BITS:
        return -1, fingerprint
    # A second pass in numpy, which only a refused push needs.
    magnitudes = widened(values).view(np.uint32) & np.uint32(_MAGNITUDE_BITS)
    return int(np.argmax(magnitudes > np.uint32(_LARGEST_BITS))), fingerprint


def _mixed(values: Bits, offsets: Bits) -> Bits:
    mixed = values.longs() + offsets
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    return mixed ^ (mixed >> _SHIFTS[2])


def _type_inspect(_context: Any, values: Any, start: Any, squares: Any) -> Any:
    """Generates the code for elements of one block, from position `start` on, with the block's lanes `squares`."""
    steps = ir.Constant(LONGS, [lane * _INCREMENT % _MODULUS for lane in range(LANES)])

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        chunk = Memory(context, builder, signature.args[0], arguments[0])
        array = context.make_array(signature.args[2])(context, builder, arguments[2])
        block = builder.bitcast(array.data, DOUBLES.as_pointer())
        squares = Accumulator(Floats(builder, builder.load(block, align=8)))
        mixes, largest = Accumulator(Bits(builder, zeros(LONGS))), Accumulator(Bits(builder, zeros(WORDS)))
        head = builder.and_(arguments[1], ir.Constant(arguments[1].type, LANES - 1))
        first = builder.mul(builder.sub(arguments[1], head), ir.Constant(head.type, _INCREMENT))
        offsets = Accumulator(Bits(builder, builder.add(splat(builder, first), steps)))

        def step(at: Any, mask: Any) -> None:
            loaded = chunk.load(at, mask)
            bits, wide = loaded.bits(), loaded.doubles()
            mixed = _mixed(bits, offsets.lanes)
            # Outside the mask the values are 0, but their mixes are not.
            mixes.lanes += mixed if mask is None else mixed.where(mask, 0)
            largest.lanes = (bits & _MAGNITUDE_BITS).at_least(largest.lanes)
            # A square of a float32 is exact in float64: only the sum rounds.
            squares.lanes = wide.fused(wide, squares.lanes)
            offsets.lanes += LANES * _INCREMENT % _MODULUS

        each_group(builder, chunk.size, step, head)
        builder.store(squares.lanes.value, block, align=8)
        results = [largest.lanes.largest(), mixes.lanes.total()]
        return context.make_tuple(builder, signature.return_type, results)

    return types.Tuple((types.uint32, types.uint64))(values, types.uint64, squares), generate


_inspect_vector: Any = intrinsic(_type_inspect)


def _inspect_chunk(values: Any, start: Any, fingerprint: Any, squares: Any) -> Any:
    largest = np.uint32(0)
    first = np.uint64(0)
    # One call for each block that the chunk touches, because each has its own lanes.
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
