"""A flat vector view of the caller's tensors, without a copy."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import ArrayLike

from deltaserve._common.element_types import FLOAT32, Array, ElementType

ELEMENT_BYTES = 4

CHUNK_ELEMENTS = 1 << 18
"""float32 elements in a chunk: 1 MiB, which fits gRPC's default message limit in every language."""


def chunk_elements(wire: ElementType) -> int:
    """Returns the number of elements of a type in a chunk."""
    return CHUNK_ELEMENTS * ELEMENT_BYTES // wire.dtype.itemsize


def contiguous(values: ArrayLike) -> Array:
    """Returns values as a C-contiguous float32 array of the same shape, without a copy if they are one already.

    Raises:
        TypeError: The values are not real numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":  # numpy would drop imaginary parts, and parse text
        raise TypeError(f"expected real numbers, got {array.dtype}")
    return np.asarray(array, dtype="<f4", order="C")


class FlatVector:
    """Several arrays as one flat float32 vector, in order, read and written in place.

    Args:
        arrays: C-contiguous little-endian float32 arrays.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.offsets = list(accumulate((array.size for array in arrays), initial=0))
        # An empty array cannot be cast.
        self._bytes = [array.data.cast("B") if array.size else memoryview(b"") for array in arrays]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.offsets[-1]

    def chunks(
        self, absent: Collection[int] = (), wire: ElementType = FLOAT32
    ) -> Iterator[tuple[int, list[memoryview]]]:
        """Yields chunks as offset and memory. Arrays in `absent` are left out, and no chunk spans one of them."""
        size, run = chunk_elements(wire), 0
        for index in [*sorted(absent), len(self._bytes)]:
            stop = self.offsets[index]
            for start in range(self.offsets[run], stop, size):
                yield start, list(self._parts(start, min(start + size, stop)))
            run = index + 1  # the next run of arrays begins after the absent one

    def write(self, offset: int, data: memoryview, wire: ElementType = FLOAT32) -> None:
        """Writes received elements from element `offset` on; ignores elements beyond the vector's end."""
        values = np.frombuffer(data, wire.dtype)[: max(self.size - offset, 0)]
        at = 0
        for part in self._parts(offset, offset + values.size):
            count = part.nbytes // ELEMENT_BYTES
            wire.widen(values[at : at + count], np.frombuffer(part, "<f4"))
            at += count

    def _parts(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yields the memory of elements `[start, stop)`."""
        index = bisect_right(self.offsets, start) - 1
        while start < stop:
            first = start - self.offsets[index]
            last = min(stop, self.offsets[index + 1]) - self.offsets[index]
            if first < last:  # empty arrays have no bytes
                yield self._bytes[index][first * ELEMENT_BYTES : last * ELEMENT_BYTES]
            start = self.offsets[index] + last
            index += 1
