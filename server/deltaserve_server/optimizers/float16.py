"""float16 and bfloat16 in numba: their types there, and the rounding of float32 to them.

The client has this rounding in numpy (`deltaserve._common.element_types`), which takes six times as long and holds
the GIL.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.optimizers._compiled import compiled, intrinsic, readable, types, writable
from deltaserve_server.optimizers._vectors import Bits, Memory, each_group
from deltaserve_server.optimizers.formats import HalfPrecision, Values

FORMATS = (types.float32, types.int16, types.uint16)
"""Numba's types for float32, float16 and bfloat16. It has no arithmetic for the latter two, so they are integers."""


def as_bits(values: Values) -> NDArray[Any]:
    """Returns a view of the values whose type is one of `FORMATS`.

    Raises:
        TypeError: The values are neither float32, float16 nor uint16.
    """
    if values.dtype in (np.float32, np.uint16):
        return values
    if values.dtype == np.float16:
        return values.view(np.int16)
    raise TypeError(f"expected float32, float16, or bfloat16 as uint16, got {values.dtype}")


def narrow(values: NDArray[np.float32], out: HalfPrecision) -> None:
    """Rounds float32 to float16 or bfloat16 in one pass, on the calling thread and without the GIL.

    Values are rounded to nearest, ties to even, as in IEEE 754 and torch. Values that are too large become infinite,
    and NaN stays NaN.

    Args:
        values: float32 [n], contiguous; may be read-only.
        out: Output, contiguous: float16 [n], or uint16 [n] for the bits of bfloat16.

    Raises:
        ValueError: The lengths differ.
        TypeError: A vector has another type or is not contiguous, or `out` is read-only or not aligned.
    """
    if values.size != out.size:
        raise ValueError(f"expected two vectors of one length, got lengths {[values.size, out.size]}")
    _narrow(values, as_bits(out))


def _bfloat16(bits: Bits) -> Bits:
    """Rounds float32, given as 32 bits, to the 16 bits of bfloat16."""
    # Adding half of the last place that stays, less 1 where its bit is 0, rounds a tie to even.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN whose fraction lies in the lower half would become an infinity, or carry into the sign: set a bit that
    # stays.
    return ((bits >> 16) | 0x40).where((bits & 0x7FFFFFFF).compared(">", 0x7F800000), rounded)


def _float16(bits: Bits) -> Bits:
    """Rounds float32, given as 32 bits, to the 16 bits of float16."""
    magnitude = bits & 0x7FFFFFFF
    # The exponent's bias shrinks by 127 - 15. A fraction that rounds up to 2 carries into the exponent, as it should.
    normal = (magnitude + (2**32 - (112 << 23)) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # A denormal result is rounded by an addition: the last bit of a float32 near 0.5 is 2**-24, as is float16's.
    denormal = (magnitude.floats() + 0.5).bits() + (2**32 - (126 << 23))
    narrowed = denormal.where(magnitude.compared("<", 113 << 23), normal)
    narrowed = narrowed.splatted(0x7C00).where(magnitude.compared(">=", 143 << 23), narrowed)
    narrowed = narrowed.splatted(0x7E00).where(magnitude.compared(">", 0x7F800000), narrowed)
    return narrowed | ((bits >> 16) & 0x8000)


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
