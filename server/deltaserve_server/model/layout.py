"""The order of a model's tensors in one flat float32 vector."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TypeVar

from deltaserve._common.optimizers import Optimizer

_Use = TypeVar("_Use")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor.

    Attributes:
        name: Its name.
        shape: Its shape.
        group: Index of the parameter group whose hyperparameters it uses.
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """A model's tensors in order. Tensor k is elements `[offsets[k], offsets[k + 1])` of the flat vector."""

    tensors: tuple[Tensor, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of every tensor, in elements, and the end of the last one."""
        return tuple(accumulate((tensor.size for tensor in self.tensors), initial=0))

    @property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return self.offsets[-1]

    def locate(self, index: int) -> tuple[str, int]:
        """Returns the name of the tensor that holds element `index` of the vector, and the index in that tensor."""
        position = bisect_right(self.offsets, index) - 1
        return self.tensors[position].name, index - self.offsets[position]

    def runs(self, count: int, absent: Collection[int]) -> Iterator[tuple[int, int]]:
        """Yields the ranges `[start, stop)` that the first `count` tensors cover without those in `absent`."""
        ranges = ((self.offsets[k], self.offsets[k + 1], None) for k in range(count) if k not in absent)
        yield from ((start, stop) for start, stop, _ in _merged(ranges))

    def ranges(
        self, absent: Collection[int], groups: Sequence[Optimizer], counts: Sequence[int]
    ) -> Iterator[tuple[int, int, Optimizer, int]]:
        """Yields the ranges of elements that an update can treat alike, in ascending order.

        Args:
            absent: Tensors that are left out.
            groups: The optimizer by parameter group.
            counts: By tensor: how many updates its optimizer state has had, this one included.

        Yields:
            `(start, stop, optimizer, count)`, where `count` is the optimizer's `relevant_count`.
        """
        parts = (
            (self.offsets[k], self.offsets[k + 1], (groups[tensor.group], groups[tensor.group].relevant_count(count)))
            for k, (tensor, count) in enumerate(zip(self.tensors, counts, strict=True))
            if k not in absent
        )
        yield from ((start, stop, *use) for start, stop, use in _merged(parts))

    def extended(self, tensors: Sequence[Tensor]) -> "Layout":
        """Returns this layout with `tensors` at its end."""
        return Layout((*self.tensors, *tensors))


def _merged(ranges: Iterable[tuple[int, int, _Use]]) -> Iterator[tuple[int, int, _Use]]:
    """Joins adjacent ranges of the same use, so that kernels get few long ranges. Drops empty ones."""
    open_range: tuple[int, int, _Use] | None = None
    for start, stop, use in ranges:
        if start == stop:
            continue
        if open_range and open_range[1] == start and open_range[2] == use:
            open_range = (open_range[0], stop, use)
            continue
        if open_range:
            yield open_range
        open_range = (start, stop, use)
    if open_range:
        yield open_range
