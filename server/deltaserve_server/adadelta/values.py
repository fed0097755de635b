"""What admission must know of a gradient before anything changes: are its values fit, and which content is it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.adadelta._compiled import compiled, received, types
from deltaserve_server.adadelta.hyperparameters import MAGNITUDE_MAX

_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
# Without their sign, floats are in the order of their bits, infinities and NaN above all others.
_LARGEST_BITS = np.float32(MAGNITUDE_MAX).view(np.uint32)

# SplitMix64 (Steele, Lea and Flood, 2014): the increment is odd, and the rest is a bijection of 64 bits.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def inspect(values: NDArray[np.float32], start: int, fingerprint: int) -> tuple[int, int]:
    """Finds the first value that no gradient may have and extends a push's fingerprint; one pass, without the GIL.

    A value is bad if it is NaN, infinite, or of a magnitude above `MAGNITUDE_MAX`.

    The fingerprint is the sum, modulo 2**64, of a mix of each element's bits and its position. So it does not depend on
    how a push was cut into chunks, nor on the order in which they are inspected. One changed element always changes it;
    two different pushes by accident have the same one with a probability of 2**-64. It protects against mistakes, not
    against those who look for a collision.

    Args:
        values: A chunk of a gradient, float32 [n], contiguous; may be read-only and start at any byte.
        start: The position of its first element in the push, in elements.
        fingerprint: Of what was inspected before; 0 at first.

    Returns:
        The index in `values` of the first bad value, or -1; and the fingerprint including this chunk.

    Raises:
        TypeError: The values are not a contiguous vector of float32.
    """
    if values.dtype != np.float32:
        raise TypeError(f"expected float32, got {values.dtype}")
    bits = values.view(np.uint32)
    largest, fingerprint = _inspect(bits, start, fingerprint)
    return (int(_first_bad(bits)) if largest > _LARGEST_BITS else -1), fingerprint


def _inspect_chunk(bits: Any, start: Any, fingerprint: Any) -> Any:
    largest = np.uint32(0)
    offset = start * _INCREMENT
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE_BITS)
        mixed = offset + np.uint64(bits[i])
        mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
        mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
        fingerprint += mixed ^ (mixed >> _SHIFTS[2])
        offset += _INCREMENT
    return largest, fingerprint


def _find_first_bad(bits: Any) -> Any:
    for i in range(bits.size):
        if bits[i] & _MAGNITUDE_BITS > _LARGEST_BITS:
            return i
    return -1


_uint32, _uint64 = types.uint32, types.uint64
_inspect = compiled(types.Tuple((_uint32, _uint64))(received(_uint32), _uint64, _uint64), _inspect_chunk)
_first_bad = compiled(types.int64(received(_uint32)), _find_first_bad)
