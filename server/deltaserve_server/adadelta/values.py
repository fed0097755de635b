"""What admission must know of a gradient: are its values fit, which content is it, and how long is it."""

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from deltaserve_server.adadelta._compiled import compiled, received, types, writable
from deltaserve_server.adadelta._squares import LANES, add_squares
from deltaserve_server.adadelta.hyperparameters import MAGNITUDE_MAX

_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
# Without their sign, floats are in the order of their bits, infinities and NaN above all others.
_LARGEST_BITS = np.float32(MAGNITUDE_MAX).view(np.uint32)

# SplitMix64 (Steele, Lea and Flood, 2014): the increment is odd, and the rest is a bijection of 64 bits.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


_BLOCK = 1 << 17
"""Elements that are looked at, and then squared: they stay in a near cache in between. Short blocks make a processor
lose sight of what it is to fetch next: with 4096 this takes twice as long."""


def lanes() -> NDArray[np.float64]:
    """Returns the sums of squares of a push of which nothing came yet, float64 [16]."""
    return np.zeros(LANES)


def norm(squares: NDArray[np.float64]) -> float:
    """Returns a push's L2 norm, float64: the lanes added up in order, and the root of that.

    Args:
        squares: The lanes, float64 [16], after the whole push was inspected.
    """
    total = 0.0
    for lane in squares.tolist():
        total += lane
    return math.sqrt(total)


def inspect(values: NDArray[np.float32], start: int, fingerprint: int, squares: NDArray[np.float64]) -> tuple[int, int]:
    """Finds the first value that no gradient may have, extends a push's fingerprint and its sums of squares.

    One pass, without the GIL. A value is bad if it is NaN, infinite, or of a magnitude above `MAGNITUDE_MAX`.

    The fingerprint is the sum, modulo 2**64, of a mix of each element's bits and its position. So it does not depend on
    how a push was cut into chunks, nor on the order in which they are inspected. One changed element always changes it;
    two different pushes by accident have the same one with a probability of 2**-64. It protects against mistakes, not
    against those who look for a collision.

    The square of the element at position p is added, in float64, to lane p % 16. So where chunks are inspected in
    ascending order, the lanes have the same bits however a push was cut; and they are finite where no value is bad.

    Args:
        values: A chunk of a gradient, float32 [n], contiguous; may be read-only and start at any byte.
        start: The position of its first element in the push, in elements.
        fingerprint: Of what was inspected before; 0 at first.
        squares: The lanes, float64 [16], with what was inspected before; added to in place. Of no meaning after a bad
            value.

    Returns:
        The index in `values` of the first bad value, or -1; and the fingerprint including this chunk.

    Raises:
        TypeError: The values are not a contiguous vector of float32, or the lanes not one of float64.
        ValueError: There are not 16 lanes.
    """
    if values.dtype != np.float32:
        raise TypeError(f"expected float32, got {values.dtype}")
    if squares.size != LANES:
        raise ValueError(f"expected {LANES} lanes, got {squares.size}")
    bits = values.view(np.uint32)
    largest, fingerprint = _inspect(bits, values, start, fingerprint, squares)
    return (int(_first_bad(bits)) if largest > _LARGEST_BITS else -1), fingerprint


@register_jitable
def _mix(bits: Any, offset: Any, fingerprint: Any, largest: Any) -> Any:
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE_BITS)
        mixed = offset + np.uint64(bits[i])
        mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
        mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
        fingerprint += mixed ^ (mixed >> _SHIFTS[2])
        offset += _INCREMENT
    return offset, fingerprint, largest


def _inspect_chunk(bits: Any, values: Any, start: Any, fingerprint: Any, squares: Any) -> Any:
    largest = np.uint32(0)
    offset = start * _INCREMENT
    for first in range(0, bits.size, _BLOCK):
        last = min(first + _BLOCK, bits.size)
        offset, fingerprint, largest = _mix(bits[first:last], offset, fingerprint, largest)
        add_squares(values[first:last], start + np.uint64(first), squares)
    return largest, fingerprint


def _find_first_bad(bits: Any) -> Any:
    for i in range(bits.size):
        if bits[i] & _MAGNITUDE_BITS > _LARGEST_BITS:
            return i
    return -1


_uint32, _uint64 = types.uint32, types.uint64
_inspect = compiled(
    types.Tuple((_uint32, _uint64))(
        received(_uint32), received(types.float32), _uint64, _uint64, writable(types.float64)
    ),
    _inspect_chunk,
)
_first_bad = compiled(types.int64(received(_uint32)), _find_first_bad)
