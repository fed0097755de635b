"""Values of 16 bits in numba: how it knows them, and how float32 is rounded to them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.adadelta._compiled import compiled, intrinsic, readable, types, writable
from deltaserve_server.adadelta._vectors import Bits, Memory, each_group
from deltaserve_server.adadelta.formats import Halves, Values

FORMATS = (types.float32, types.int16, types.uint16)
"""What float32, float16 and bfloat16 are to numba, which does not compute in the latter two."""


def as_bits(values: Values) -> NDArray[Any]:
    """Returns the same memory as a vector of one of `FORMATS`.

    Raises:
        TypeError: The values are neither float32 nor in a format of 16 bits.
    """
    if values.dtype in (np.float32, np.uint16):
        return values
    if values.dtype == np.float16:
        return values.view(np.int16)
    raise TypeError(f"expected float32, float16, or bfloat16 as uint16, got {values.dtype}")


def narrow(values: NDArray[np.float32], out: Halves) -> None:
    """Rounds to a format of 16 bits, in one pass, on the calling thread and without the GIL.

    To the nearest value, ties to even, as IEEE 754 says and torch does. What is too large becomes infinite, NaN stays
    NaN.

    Args:
        values: float32 [n], contiguous; may be read-only.
        out: Where the rounded ones go, float16 [n], or uint16 [n] for the bits of bfloat16; contiguous.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector is not a contiguous one of its type, or `out` is read-only or not aligned.
    """
    if values.size != out.size:
        raise ValueError(f"expected two vectors of one length, got lengths {[values.size, out.size]}")
    _narrow(values, as_bits(out))


def _bfloat16(bits: Bits) -> Bits:
    """Rounds a float32 that is given by its bits: half of the last bit that stays, less 1 where that bit is 0."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Bits that are dropped may be all that makes a NaN one; adding to them may carry into the sign.
    return ((bits >> 16) | 0x40).where((bits & 0x7FFFFFFF).compared(">", 0x7F800000), rounded)


def _float16(bits: Bits) -> Bits:
    """Rounds a float32 that is given by its bits."""
    magnitude = bits & 0x7FFFFFFF
    # The exponent of a normal number differs by 127 - 15; the carry of one that is rounded up makes the next power.
    normal = (magnitude + (2**32 - (112 << 23)) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # What is smaller is rounded by an addition: the last bit of 0.5 stands for 2**-24, and so does float16's.
    denormal = (magnitude.floats() + 0.5).bits() + (2**32 - (126 << 23))
    made = denormal.where(magnitude.compared("<", 113 << 23), normal)
    made = made.splatted(0x7C00).where(magnitude.compared(">=", 143 << 23), made)
    made = made.splatted(0x7E00).where(magnitude.compared(">", 0x7F800000), made)
    return made | ((bits >> 16) & 0x8000)


def _type_narrow(_context: Any, values: Any, out: Any) -> Any:
    rounded = _float16 if out.dtype == types.int16 else _bfloat16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (Memory(context, builder, signature.args[k], arguments[k]) for k in range(2))

        def step(at: Any, mask: Any) -> None:
            target.store(at, rounded(source.load(at, mask).bits()).shorts(), mask)

        each_group(builder, source.size, step)
        return context.get_dummy_value()

    return types.void(values, out), generate


_narrow_vector: Any = intrinsic(_type_narrow)


def _narrow_values(values: Any, out: Any) -> None:
    _narrow_vector(values, out)


_narrow = compiled([types.void(readable(types.float32), writable(kind)) for kind in FORMATS[1:]], _narrow_values)
