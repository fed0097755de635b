"""Element types on the wire: float32 as it lies in memory, and two 16-bit types, converted while copying.

Conversions work block by block, so that intermediate values stay in a near cache.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaserve.v1 import common_pb2

Array = NDArray[np.float32]

WireType = Literal["float32", "bfloat16", "float16"]
"""The type of a vector's elements in messages. On the server they are always float32."""

_BLOCK = 1 << 14  # 64 KiB of float32

_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SHIFT = np.uint32(16)
_QUIET = np.uint16(0x40)
"""Setting this bit keeps a NaN a NaN after its lower half is cut off."""


class ElementType(NamedTuple):
    """An element type and its conversions.

    Attributes:
        data_type: Its number in the proto.
        dtype: The numpy type that holds its bytes.
        narrow: Converts a float32 array to an array of this type, rounding to nearest, ties to even.
        widen: Converts an array of this type to a float32 array, exactly.
    """

    data_type: "common_pb2.DataType.ValueType"
    dtype: "np.dtype[Any]"
    narrow: Callable[[Array, NDArray[Any]], None]
    widen: Callable[[NDArray[Any], Array], None]

    def encoded(self, parts: Sequence[memoryview]) -> list[memoryview]:
        """Returns the bytes to send for float32 memory: the memory itself, or a converted copy."""
        if self is FLOAT32:
            return list(parts)
        sources = [np.frombuffer(part, "<f4") for part in parts]
        out = np.empty(sum(source.size for source in sources), self.dtype)
        at = 0
        for source in sources:
            self.narrow(source, out[at : at + source.size])
            at += source.size
        return [out.view(np.uint8).data]


def _copy(source: NDArray[Any], target: NDArray[Any]) -> None:
    target[:] = source


def _to_bfloat16(source: Array, target: NDArray[Any]) -> None:
    for start in range(0, source.size, _BLOCK):
        values = source[start : start + _BLOCK]
        bits = values.view(np.uint32)
        # Adds half of what is cut off, and one more if the last bit that stays is odd: ties go to even.
        rounded = bits >> _SHIFT
        rounded &= _ONE
        rounded += _HALF
        rounded += bits
        rounded >>= _SHIFT
        target[start : start + _BLOCK] = rounded
        nan = np.isnan(values)  # the rounding may have made a NaN infinite, or carried it into the sign
        if nan.any():
            target[start : start + _BLOCK][nan] = (bits[nan] >> _SHIFT).astype(np.uint16) | _QUIET


def _from_bfloat16(source: NDArray[Any], target: Array) -> None:
    np.left_shift(source, _SHIFT, out=target.view(np.uint32), dtype=np.uint32)  # older numpy would choose uint16


def _to_float16(source: Array, target: NDArray[Any]) -> None:
    with np.errstate(all="ignore"):  # large values become infinity, which the server refuses in a gradient
        target[:] = source


FLOAT32 = ElementType(common_pb2.DATA_TYPE_FLOAT32, np.dtype("<f4"), _copy, _copy)

ELEMENT_TYPES: dict[WireType, ElementType] = {
    "float32": FLOAT32,
    "bfloat16": ElementType(common_pb2.DATA_TYPE_BFLOAT16, np.dtype("<u2"), _to_bfloat16, _from_bfloat16),
    "float16": ElementType(common_pb2.DATA_TYPE_FLOAT16, np.dtype("<f2"), _to_float16, _copy),
}
"""Element types by their public names."""


def named(name: WireType, wires: Mapping[WireType, ElementType]) -> ElementType:
    """Returns an element type by its public name.

    Raises:
        ValueError: There is no type of this name.
    """
    if name not in wires:
        raise ValueError(f"wire: expected one of {', '.join(wires)}, got {name!r}")
    return wires[name]
