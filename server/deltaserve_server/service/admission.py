"""The gate for vectors: their chunks' order, their size and their values, all looked at before anything changes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from deltaserve._codec import Piece
from deltaserve._failpoints import failpoint
from deltaserve_server.memory import Staging, State
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector
from deltaserve_server.model import Layout, Refused

STATE_VECTORS = ("weights", "square_avg", "acc_delta")


class Gate:
    """Lets the chunks of one vector pass in their order.

    Args:
        runs: Ranges of elements that are to come, ascending; no chunk reaches across two.
    """

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        self._runs = list(runs)
        self.size = sum(stop - start for start, stop in self._runs)
        self._passed = 0
        self._left = iter(self._runs)
        self._next, self._stop = next(self._left, (0, 0))

    def take(self, offset: int, data: memoryview) -> Vector:
        """Returns the chunk's values.

        Raises:
            Refused: CHUNK_SEQUENCE.
        """
        count, rest = divmod(len(data), ELEMENT_BYTES)
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
        return np.frombuffer(data, "<f4")

    def cut(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yields the runs' parts of a vector that came in one piece.

        Raises:
            Refused: PUSH_INCOMPLETE or CHUNK_SEQUENCE where its length is another.
        """
        got, rest = divmod(len(data), ELEMENT_BYTES)
        if got < self.size and not rest:
            raise Refused("PUSH_INCOMPLETE", expected=self.size, got=got)
        if rest or got > self.size:
            raise Refused("CHUNK_SEQUENCE", expected=f"{self.size} elements", got=f"{len(data)} bytes")
        at = 0
        for start, stop in self._runs:
            size = (stop - start) * ELEMENT_BYTES
            yield start, data[at : at + size]
            at += size

    def close(self) -> None:
        """Raises Refused PUSH_INCOMPLETE where something is missing."""
        if self._passed != self.size:
            raise Refused("PUSH_INCOMPLETE", expected=self.size, got=self._passed)


class Inspector:
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
        self._squares = kernel.lanes()
        self.fingerprint = 0

    @property
    def norm(self) -> float:
        """L2 norm of all values so far."""
        return self._kernel.norm(self._squares)

    def check(self, offset: int, values: Vector) -> None:
        """Raises Refused VALUE_NOT_FINITE or VALUE_TOO_LARGE."""
        bad, self.fingerprint = self._kernel.inspect(values, offset, self.fingerprint, self._squares)
        if bad < 0:
            return
        reason = "VALUE_TOO_LARGE" if np.isfinite(values[bad]) else "VALUE_NOT_FINITE"
        tensor, index = self._layout.locate(offset + bad)
        raise Refused(reason, tensor=tensor, index=index)


def admit_push(pieces: Iterable[tuple[int, memoryview]], gate: Gate, layout: Layout, staging: Staging) -> Inspector:
    """Takes a push's values into staging; returns what has looked at them.

    Raises:
        Refused: For the first thing that is wrong with them.
    """
    inspector = Inspector(layout)
    for offset, data in pieces:
        failpoint("push.chunk")
        values = gate.take(offset, data)
        inspector.check(offset, values)
        staging.add(offset, values)
    gate.close()
    failpoint("push.admitted")
    return inspector


def admit_weights(messages: Iterator[Piece], layout: Layout, start: int = 0) -> Vector:
    """Returns the weights of a new model, or of its extension from element `start` on.

    Raises:
        Refused: For the first thing that is wrong with them.
    """
    return _vector(messages, "weights", layout, start)


def admit_state(messages: Iterator[Piece], layout: Layout) -> State:
    """Returns a whole state: three vectors one after the other.

    Raises:
        Refused: For the first thing that is wrong with it.
    """
    vectors = [_vector(messages, name, layout) for name in STATE_VECTORS]
    extra = _chunk(messages)
    if extra is not None:
        raise Refused("CHUNK_SEQUENCE", expected="no further chunk", got=f"a chunk of {extra.vector}")
    return State(*vectors)


def _vector(messages: Iterator[Piece], name: str, layout: Layout, start: int = 0) -> Vector:
    """Reads one vector up to its last element, and no message beyond."""
    gate = Gate([(start, layout.size)] if start < layout.size else [])
    inspector = Inspector(layout)
    vector = np.empty(gate.size, np.float32)
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
        _check_state(inspector, name, piece.offset, values, layout)
        vector[got : got + values.size] = values
        got += values.size
    gate.close()
    return vector


def _chunk(messages: Iterator[Any]) -> Piece | None:
    """Returns the next chunk, or None at the end; raises Refused MESSAGE_INVALID for a second header."""
    message = next(messages, None)
    if message is not None and not isinstance(message, Piece):
        raise Refused("MESSAGE_INVALID", message="stream: chunks follow its first message")
    return message


def _check_state(inspector: Inspector, name: str, offset: int, values: Vector, layout: Layout) -> None:
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


def require_end(messages: Iterator[Piece]) -> None:
    """Raises Refused CHUNK_SEQUENCE where the stream goes on after its last chunk."""
    if next(messages, None) is not None:
        raise Refused("CHUNK_SEQUENCE", expected="no further chunk", got="another message")


def chunks(vector: Vector, count: int, size: int) -> Sequence[tuple[int, memoryview]]:
    """Cuts the first `count` elements of a vector into pieces of at most `size` elements."""
    raw = vector.data.cast("B")
    stops = [min(start + size, count) for start in range(0, count, size)]
    return [
        (start, raw[start * ELEMENT_BYTES : stop * ELEMENT_BYTES])
        for start, stop in zip(range(0, count, size), stops, strict=True)
    ]
