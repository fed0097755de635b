"""The gate for vectors: their chunks' order, their size and their values, all looked at before anything changes."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np

from deltaserve._common.codec import Chunk
from deltaserve._common.element_types import FLOAT32, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import CHUNK_ELEMENTS, chunk_elements
from deltaserve_server.adadelta.formats import Values, widened
from deltaserve_server.memory import Staging, State
from deltaserve_server.memory.parallel import run_parallel
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector, allocate_host
from deltaserve_server.model import Layout, Refused

_BLOCKS = 4
"""Blocks that have sums of squares of their own, of all that a thread inspects in one call."""

STATE_VECTORS = ("weights", "square_avg", "acc_delta")


class ChunkValidator:
    """Lets the chunks of one vector pass in their order.

    Args:
        runs: Ranges of elements that are to come, ascending; no chunk reaches across two.
        wire: The type of the elements that come.

    Attributes:
        runs: As above.
        size: How many elements that are.
        size_bytes: What they come in.
    """

    def __init__(self, runs: Iterable[tuple[int, int]], wire: ElementType = FLOAT32) -> None:
        self.runs = list(runs)
        self._dtype = wire.dtype
        self.size = sum(stop - start for start, stop in self.runs)
        self.size_bytes = self.size * wire.dtype.itemsize
        self._passed = 0
        self._left = iter(self.runs)
        self._next, self._stop = next(self._left, (0, 0))

    def take(self, offset: int, data: memoryview) -> Values:
        """Returns the chunk's values.

        Raises:
            Refused: CHUNK_SEQUENCE.
        """
        count, rest = divmod(len(data), self._dtype.itemsize)
        if rest or not count:
            raise Refused("CHUNK_SEQUENCE", expected="one or more whole elements", got=f"{len(data)} bytes")
        if self._passed == self.size:
            raise Refused("CHUNK_SEQUENCE", expected="no further element", got=f"offset {offset}")
        if offset != self._next:
            raise Refused("CHUNK_SEQUENCE", expected=f"offset {self._next}", got=f"offset {offset}")
        if offset + count > self._stop:
            expected = f"at most {self._stop - offset} elements from offset {offset}"
            raise Refused("CHUNK_SEQUENCE", expected=expected, got=f"{count} elements")
        self._passed += count
        self._next += count
        if self._next == self._stop:
            self._next, self._stop = next(self._left, (self._next, self._stop))
        return np.frombuffer(data, self._dtype)

    def cut(self, data: bytes) -> Iterator[tuple[int, Values]]:
        """Yields the runs' parts of a vector that came in one piece.

        Raises:
            Refused: PUSH_INCOMPLETE or CHUNK_SEQUENCE where its length is another.
        """
        got, rest = divmod(len(data), self._dtype.itemsize)
        if got < self.size and not rest:
            raise Refused("PUSH_INCOMPLETE", expected=self.size, got=got)
        if rest or got > self.size:
            raise Refused("CHUNK_SEQUENCE", expected=f"{self.size} elements", got=f"{len(data)} bytes")
        values, at = np.frombuffer(data, self._dtype), 0
        for start, stop in self.runs:
            yield start, values[at : at + stop - start]
            at += stop - start
        self._passed = self.size

    def close(self) -> None:
        """Raises Refused PUSH_INCOMPLETE where something is missing."""
        if self._passed != self.size:
            raise Refused("PUSH_INCOMPLETE", expected=self.size, got=self._passed)


class ValueChecker:
    """Looks at values that are to be finite when squared, and takes their fingerprint.

    Args:
        layout: Names the tensor of a bad value.

    Attributes:
        fingerprint: Of all values so far.
    """

    def __init__(self, layout: Layout) -> None:
        from deltaserve_server.adadelta import values as kernel  # numba: not before the first push

        self._kernel = kernel
        self._layout = layout
        self._squares = kernel.lanes(layout.size)
        self.fingerprint = 0

    @property
    def norm(self) -> float:
        """L2 norm of all values so far."""
        return self._kernel.norm(self._squares)

    def check(self, offset: int, values: Values) -> None:
        """Raises Refused VALUE_NOT_FINITE or VALUE_TOO_LARGE."""
        bad, self.fingerprint = self._kernel.inspect(values, offset, self.fingerprint, self._squares)
        if bad >= 0:
            self._refuse(offset + bad, values[bad : bad + 1])

    def check_whole(self, values: Values, runs: Iterable[tuple[int, int]], executor: Executor, threads: int) -> None:
        """Looks at the runs of a vector that lies in one piece, on several threads; the same comes out as of `check`.

        Args:
            values: The flat vector; only its runs are looked at.
            runs: Ranges of elements, ascending.
            executor: Has threads beside the calling one.
            threads: How many work at most, the calling one among them.

        Raises:
            Refused: VALUE_NOT_FINITE or VALUE_TOO_LARGE for the first such value.
        """
        seen: list[tuple[int, int | None]] = []

        def inspect(parts: list[tuple[int, int]]) -> None:
            fingerprint = 0
            for start, stop in parts:
                bad, fingerprint = self._kernel.inspect(values[start:stop], start, fingerprint, self._squares)
                if bad >= 0:
                    seen.append((fingerprint, start + bad))
                    return
            seen.append((fingerprint, None))

        run_parallel(inspect, _in_blocks(runs, _BLOCKS * self._kernel.BLOCK), executor, threads)
        self.fingerprint = (self.fingerprint + sum(fingerprint for fingerprint, _ in seen)) % (1 << 64)
        bad = min((position for _, position in seen if position is not None), default=None)
        if bad is not None:
            self._refuse(bad, values[bad : bad + 1])

    def _refuse(self, position: int, value: Values) -> None:
        reason = "VALUE_TOO_LARGE" if np.isfinite(widened(value)[0]) else "VALUE_NOT_FINITE"
        tensor, index = self._layout.locate(position)
        raise Refused(reason, tensor=tensor, index=index)


def _in_blocks(runs: Iterable[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Cuts ranges where they cross a multiple of `size`; returns those of each block together."""
    blocks: dict[int, list[tuple[int, int]]] = {}
    for first, stop in runs:
        start = first
        while start < stop:
            block = start // size
            end = min(stop, (block + 1) * size)
            blocks.setdefault(block, []).append((start, end))
            start = end
    return list(blocks.values())


def admit_push(
    pieces: Iterable[tuple[int, Values]], gate: ChunkValidator, layout: Layout, staging: Staging
) -> ValueChecker:
    """Takes a push's values, which have passed the gate, into staging; returns what has looked at them.

    Raises:
        Refused: For the first thing that is wrong with them.
    """
    inspector = ValueChecker(layout)
    for offset, values in pieces:
        failpoint("push.chunk")
        inspector.check(offset, values)
        staging.add(offset, values)
    gate.close()
    failpoint("push.admitted")
    return inspector


def admit_shared(
    vector: Vector,
    gate: ChunkValidator,
    layout: Layout,
    staging: Staging,
    executor: Executor,
    threads: int,
    *,
    in_place: bool,
) -> ValueChecker:
    """Takes a push that lies in memory which somebody else can write to; otherwise as `admit_push`.

    Args:
        vector: The flat vector; what lies outside the gate's runs is not looked at.
        gate: Says what belongs to the push.
        layout: The model's.
        staging: Where it goes.
        executor: Has threads beside the calling one.
        threads: How many work at most.
        in_place: It is used where it is; otherwise it is copied first.

    Raises:
        Refused: For the first value that is wrong.
    """
    failpoint("push.chunk")
    if not in_place:
        mine = np.empty_like(vector)

        def copy(start: int) -> None:
            mine[start : start + CHUNK_ELEMENTS] = vector[start : start + CHUNK_ELEMENTS]

        run_parallel(copy, range(0, vector.size, CHUNK_ELEMENTS), executor, threads)
        vector = mine
    inspector = ValueChecker(layout)
    inspector.check_whole(vector, gate.runs, executor, threads)
    for start, stop in gate.runs:
        staging.add(start, vector[start:stop])
    failpoint("push.admitted")
    return inspector


def admit_weights(messages: Iterator[Chunk], layout: Layout, start: int = 0) -> Vector:
    """Returns the weights of a new model, or of its extension from element `start` on.

    Raises:
        Refused: For the first thing that is wrong with them.
    """
    return _vector(messages, "weights", layout, start)


def admit_state(messages: Iterator[Chunk], layout: Layout) -> State:
    """Returns a whole state: three vectors one after the other.

    Raises:
        Refused: For the first thing that is wrong with it.
    """
    vectors = [_vector(messages, name, layout) for name in STATE_VECTORS]
    extra = _chunk(messages)
    if extra is not None:
        raise Refused("CHUNK_SEQUENCE", expected="no further chunk", got=f"a chunk of {extra.vector}")
    return State(*vectors)


def _vector(messages: Iterator[Chunk], name: str, layout: Layout, start: int = 0) -> Vector:
    """Reads one vector up to its last element, and no message beyond."""
    gate = ChunkValidator([(start, layout.size)] if start < layout.size else [])
    inspector = ValueChecker(layout)
    vector = allocate_host(gate.size)  # a model may keep it
    got = 0
    while got < gate.size:
        piece = _chunk(messages)
        if piece is None:
            break
        if piece.vector != name:
            raise Refused(
                "CHUNK_SEQUENCE", expected=f"{name} from offset {start + got}", got=f"a chunk of {piece.vector}"
            )
        values = gate.take(piece.offset, piece.data)
        vector[got : got + values.size] = values
        _check_state(inspector, name, piece.offset, vector[got : got + values.size], layout)
        got += values.size
    gate.close()
    return vector


def _chunk(messages: Iterator[Any]) -> Chunk | None:
    """Returns the next chunk, or None at the end; raises Refused MESSAGE_INVALID for a second header."""
    message = next(messages, None)
    if message is not None and not isinstance(message, Chunk):
        raise Refused("MESSAGE_INVALID", message="stream: chunks follow its first message")
    return message


def _check_state(inspector: ValueChecker, name: str, offset: int, values: Vector, layout: Layout) -> None:
    """Weights obey the rule for gradients; the averages of squares are finite and not negative."""
    if name == "weights":
        inspector.check(offset, values)
        return
    bad = np.flatnonzero(~((values >= 0) & np.isfinite(values)))
    if bad.size:
        tensor, index = layout.locate(offset + int(bad[0]))
        if np.isfinite(values[bad[0]]):
            raise Refused("PUSH_INVALID", field=f"{name} of tensor {tensor} at element {index}", allowed=">= 0")
        raise Refused("VALUE_NOT_FINITE", tensor=tensor, index=index)


def require_end(messages: Iterator[Chunk]) -> None:
    """Raises Refused CHUNK_SEQUENCE where the stream goes on after its last chunk."""
    if next(messages, None) is not None:
        raise Refused("CHUNK_SEQUENCE", expected="no further chunk", got="another message")


def chunks(vector: Vector, count: int, wire: ElementType = FLOAT32) -> Iterator[tuple[int, list[memoryview]]]:
    """Yields the first `count` elements of a vector in chunks, as offset and what travels."""
    raw, size = vector.data.cast("B"), chunk_elements(wire)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield start, wire.encoded([raw[start * ELEMENT_BYTES : stop * ELEMENT_BYTES]])
