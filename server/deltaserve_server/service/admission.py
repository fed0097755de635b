"""Checks vectors that arrive: the order and size of their chunks, and their values, before anything changes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from deltaserve._common.codec import Chunk
from deltaserve._common.element_types import FLOAT32, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import CHUNK_ELEMENTS, chunk_elements
from deltaserve._common.optimizers import Slot
from deltaserve_server.memory import Staging, State
from deltaserve_server.memory.parallel import run_parallel
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector, allocate_host
from deltaserve_server.model import Layout, Refused
from deltaserve_server.optimizers.formats import Values, widened

_BLOCKS = 4
"""How many of the kernel's blocks a thread checks in one call. Each block has its own sum of squares."""


class ChunkValidator:
    """Checks the order and the sizes of one vector's chunks.

    Args:
        runs: The ranges of elements that are expected, ascending. No chunk reaches across two of them.
        wire: The element type on the wire.

    Attributes:
        runs: The ranges of elements that are expected.
        size: Number of elements in all ranges.
        size_bytes: Their size on the wire.
    """

    def __init__(self, runs: Iterable[tuple[int, int]], wire: ElementType = FLOAT32) -> None:
        self.runs = list(runs)
        self._dtype = wire.dtype
        self.size = sum(stop - start for start, stop in self.runs)
        self.size_bytes = self.size * wire.dtype.itemsize
        self._received = 0
        self._following = iter(self.runs)
        self._next, self._stop = next(self._following, (0, 0))

    def take(self, offset: int, data: memoryview) -> Values:
        """Returns the values of the next chunk, which begins with element `offset`; raises Refused CHUNK_SEQUENCE."""
        count, rest = divmod(len(data), self._dtype.itemsize)
        if rest or not count:  # a stream of empty chunks might never end
            raise Refused("CHUNK_SEQUENCE", expected="one or more whole elements", got=f"{len(data)} bytes")
        if self._received == self.size:
            raise Refused("CHUNK_SEQUENCE", expected="no further element", got=f"offset {offset}")
        if offset != self._next:
            raise Refused("CHUNK_SEQUENCE", expected=f"offset {self._next}", got=f"offset {offset}")
        if offset + count > self._stop:
            expected = f"at most {self._stop - offset} elements from offset {offset}"
            raise Refused("CHUNK_SEQUENCE", expected=expected, got=f"{count} elements")
        self._received += count
        self._next += count
        if self._next == self._stop:
            self._next, self._stop = next(self._following, (self._next, self._stop))
        return np.frombuffer(data, self._dtype)

    def split(self, data: bytes) -> Iterator[tuple[int, Values]]:
        """Yields offset and values of each range from a vector that arrived in one message.

        Raises:
            Refused: PUSH_INCOMPLETE or CHUNK_SEQUENCE: the vector is too short or too long.
        """
        got, rest = divmod(len(data), self._dtype.itemsize)
        if got < self.size and not rest:
            raise Refused("PUSH_INCOMPLETE", expected=self.size, got=got)
        if rest or got > self.size:
            raise Refused("CHUNK_SEQUENCE", expected=f"{self.size} elements", got=f"{len(data)} bytes")
        values, at = np.frombuffer(data, self._dtype), 0  # without a copy
        for start, stop in self.runs:
            yield start, values[at : at + stop - start]
            at += stop - start
        self._received = self.size

    def close(self) -> None:
        """Raises Refused PUSH_INCOMPLETE if elements are missing at the end."""
        if self._received != self.size:
            raise Refused("PUSH_INCOMPLETE", expected=self.size, got=self._received)


class ValueChecker:
    """Checks that the square of every value is finite, and computes the values' fingerprint and norm.

    Attributes:
        fingerprint: Hash of all values so far; it does not depend on how they are split into chunks.
    """

    def __init__(self, layout: Layout) -> None:
        # Imports numba, which a server without pushes does without.
        from deltaserve_server.optimizers import values as kernel

        self._kernel = kernel
        self._layout = layout
        self._squares = kernel.lanes(layout.size)  # separate sums, so that the norm does not depend on threads
        self.fingerprint = 0

    @property
    def norm(self) -> float:
        """L2 norm of all values so far."""
        return self._kernel.norm(self._squares)

    def check(self, offset: int, values: Values) -> None:
        """Raises Refused VALUE_NOT_FINITE or VALUE_TOO_LARGE."""
        bad, self.fingerprint = self._kernel.inspect(values, offset, self.fingerprint, self._squares)
        if bad >= 0:
            self._refuse(offset + bad, values[bad:])

    def check_whole(self, values: Values, runs: Iterable[tuple[int, int]], executor: Executor, threads: int) -> None:
        """Checks ranges of one vector on up to `threads` threads, the calling one included; see `check`.

        The elements between the ranges are not checked.

        Raises:
            Refused: VALUE_NOT_FINITE or VALUE_TOO_LARGE for the first bad value.
        """
        fingerprints: list[int] = []
        bad: list[int] = []

        def inspect(parts: list[tuple[int, int]]) -> None:
            fingerprint = 0
            for start, stop in parts:
                index, fingerprint = self._kernel.inspect(values[start:stop], start, fingerprint, self._squares)
                if index >= 0:
                    bad.append(start + index)
                    return
            fingerprints.append(fingerprint)

        run_parallel(inspect, _in_blocks(runs, _BLOCKS * self._kernel.BLOCK), executor, threads)
        self.fingerprint = (self.fingerprint + sum(fingerprints)) % (1 << 64)
        if bad:  # the first, whichever thread found it: the same push always gets the same error
            self._refuse(min(bad), values[min(bad) :])

    def _refuse(self, position: int, values: Values) -> None:
        """Raises the refusal of the first one of `values`, which is at `position` in the flat vector."""
        reason = "VALUE_TOO_LARGE" if np.isfinite(widened(values[:1])[0]) else "VALUE_NOT_FINITE"
        tensor, index = self._layout.locate(position)
        raise Refused(reason, tensor=tensor, index=index)


def _in_blocks(runs: Iterable[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Splits ranges at multiples of `size`; returns a list of parts for each block of that size."""
    blocks: dict[int, list[tuple[int, int]]] = {}
    for start, stop in runs:
        for first in range(start // size * size, stop, size):
            blocks.setdefault(first, []).append((max(start, first), min(stop, first + size)))
    return list(blocks.values())


def admit_push(
    chunks: Iterable[tuple[int, Values]], validator: ChunkValidator, layout: Layout, staging: Staging
) -> ValueChecker:
    """Checks a push's values and stages them; returns the checker, which has their fingerprint and norm.

    Args:
        chunks: Offset and values of each chunk, which `validator` has accepted.
        validator: Knows which elements are expected.
        layout: The model's layout.
        staging: Takes the values.

    Raises:
        Refused: For the first fault of the values.
    """
    checker = ValueChecker(layout)
    for offset, values in chunks:
        failpoint("push.chunk")
        checker.check(offset, values)  # first: a bad value must not reach the store
        staging.add(offset, values)
    validator.close()
    failpoint("push.admitted")
    return checker


def admit_shared(
    vector: Vector, validator: ChunkValidator, layout: Layout, staging: Staging, executor: Executor, threads: int
) -> ValueChecker:
    """Checks and stages, without a copy, a push whose values lie in one vector; see `admit_push`.

    See `copy_shared` for a vector that a worker can still write to.
    """
    checker = ValueChecker(layout)
    checker.check_whole(vector, validator.runs, executor, threads)
    for start, stop in validator.runs:
        staging.add(start, vector[start:stop])
    failpoint("push.admitted")
    return checker


def copy_shared(vector: Vector, executor: Executor, threads: int) -> Vector:
    """Returns a copy of a vector that another process can write to, made on several threads."""
    own = np.empty_like(vector)  # checking in place would not do: the worker could change a value afterwards

    def copy(start: int) -> None:
        own[start : start + CHUNK_ELEMENTS] = vector[start : start + CHUNK_ELEMENTS]

    run_parallel(copy, range(0, vector.size, CHUNK_ELEMENTS), executor, threads)
    return own


def admit_weights(messages: Iterator[Any], layout: Layout, start: int = 0) -> Vector:
    """Returns the weights of a new model, or of its extension from element `start` on; the stream ends with them."""
    checker = ValueChecker(layout)
    return _receive(messages, [(start, layout.size)], lambda _, offset, values: checker.check(offset, values))[0]


def admit_state(messages: Iterator[Any], layout: Layout, slots: Sequence[Slot]) -> State:
    """Returns weights and optimizer state, which arrive as one vector after the other; the stream ends with them."""
    checker = ValueChecker(layout)

    def check(index: int, offset: int, values: Vector) -> None:
        if index == 0:
            checker.check(offset, values)
        else:
            _check_slot(slots[index - 1], offset - index * layout.size, values, layout)

    runs = [(index * layout.size, (index + 1) * layout.size) for index in range(1 + len(slots))]
    weights, *others = _receive(messages, runs, check)
    return State(weights, tuple(others))


def _receive(
    messages: Iterator[Any], runs: Sequence[tuple[int, int]], check: Callable[[int, int, Vector], None]
) -> list[Vector]:
    """Returns one vector for each range, up to the end of the stream.

    Args:
        messages: The stream after its first message.
        runs: Adjacent ranges of equal size. No chunk extends across two of them.
        check: Called with the index of the range, the offset and the values of each chunk.
    """
    validator = ChunkValidator(runs)
    vectors = [allocate_host(stop - start) for start, stop in runs]  # aligned: the model may keep them
    for message in messages:
        if not isinstance(message, Chunk):
            raise Refused("MESSAGE_INVALID", message="stream: chunks follow its first message")
        values = validator.take(message.offset, message.data)
        index, at = divmod(message.offset - runs[0][0], vectors[0].size)
        part = vectors[index][at : at + values.size]
        part[:] = values
        check(index, message.offset, part)
    validator.close()
    return vectors


def _check_slot(slot: Slot, offset: int, values: Vector, layout: Layout) -> None:
    """Raises Refused unless all values are finite and at least the slot's minimum."""
    bad = np.flatnonzero(~((values >= slot.minimum) & np.isfinite(values)))
    if bad.size:
        tensor, index = layout.locate(offset + int(bad[0]))
        if np.isfinite(values[bad[0]]):
            field = f"{slot.name} of tensor {tensor} at element {index}"
            raise Refused("PUSH_INVALID", field=field, allowed=f">= {slot.minimum:g}")
        raise Refused("VALUE_NOT_FINITE", tensor=tensor, index=index)


def chunks(vector: Vector, count: int, wire: ElementType = FLOAT32) -> Iterator[tuple[int, list[memoryview]]]:
    """Yields the first `count` elements of a vector as chunks to send: their offset and their bytes on the wire."""
    raw, size = vector.data.cast("B"), chunk_elements(wire)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield start, wire.encoded([raw[start * ELEMENT_BYTES : stop * ELEMENT_BYTES]])
