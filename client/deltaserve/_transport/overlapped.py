"""A push that begins while backward still computes its gradient.

The header of a push comes first and describes all of it: number, base version, tensors without a gradient,
hyperparameters, weight. An overlapped push guesses the header, sends every chunk as soon as its tensors have a
gradient, and keeps back the last element. `Worker.step` takes the push over only if its header and values equal those
of the push to send. Otherwise the call is cancelled, the server keeps nothing of it, and the push is sent from the
beginning.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

import numpy as np

from deltaserve._common.codec import StreamCodec
from deltaserve._common.element_types import Array, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import ELEMENT_BYTES, FlatVector
from deltaserve._connection import Connection
from deltaserve.v1 import worker_service_pb2 as rpc

_SECOND_BACKWARD = "more than one backward pass made gradients"
_OTHER_TENSORS = "other parameters had a gradient than in the step before"
_DIFFERENCES = {
    "absent_tensors": _OTHER_TENSORS,
    "hyperparameters": "the hyperparameters were changed",
    "weight": "the weight was another than in the step before",
}


class OverlappedPush:
    """A push that is sent before its gradient is whole.

    Three threads use it. One adds tensors in any order, with `begin`, `claim`, `add`, `end` and `drop`. One of gRPC's
    sends. A third takes the push over, with `take`.

    Args:
        arrays: The memory that gradients are sent from: float32, C-contiguous, by tensor name, in the layout's order.
            The next push may use it again after this one was dropped.

    Attributes:
        header: The header that was sent; None before `begin`.
        over: Whether the push was dropped.
        taken: Whether `Worker.step` took it over.
        difference: How it differs from the push to send, in words; None if it does not.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.header: rpc.PushHeader | None = None
        self.over = False
        self.taken = False
        self.difference: str | None = None
        self._names = list(arrays)
        self._vector = FlatVector(list(arrays.values()))
        self._absent: list[int] = []
        self._added: set[int] = set()
        self._unsent: set[int] = set()  # absent tensors and empty ones
        self._first_missing = 0
        self._last = 0  # index of the last element to send
        self._call: Any = None
        self._ended = Event()
        self._may_send: SimpleQueue[int] = SimpleQueue()  # send up to this element; a negative number ends the stream
        self._lock = Lock()

    # --- the thread that adds

    def begin(self, connection: Connection, header: rpc.PushHeader, wire: ElementType) -> None:
        """Starts the call, with the header that the push is expected to have."""
        self._absent = list(header.absent_tensors)
        bounds = list(pairwise(self._vector.offsets))
        self._unsent.update(self._absent, (index for index, (start, stop) in enumerate(bounds) if start == stop))
        self._last = max(stop for index, (_, stop) in enumerate(bounds) if index not in self._unsent) - 1
        messages = self._messages(header, wire)
        self._call = connection.stub("StreamStep")(messages, timeout=connection.timeout_seconds)
        self.header = header

    def claim(self, index: int) -> bool:
        """Returns whether a tensor's array may be written to. Drops the push if the tensor is not expected."""
        if index in self._added or index in self._absent:
            self.drop(_SECOND_BACKWARD if index in self._added else _OTHER_TENSORS)
        return not self.over and not self._ended.is_set()

    def add(self, index: int) -> None:
        """Releases a tensor for sending. Its array must not change until the push is over."""
        self._added.add(index)
        before = self._first_missing
        while self._first_missing in self._added or self._first_missing in self._unsent:
            self._first_missing += 1
        if self._first_missing > before:
            # The last element stays back until `take` has compared the values: without it the push is not whole.
            self._may_send.put(min(self._vector.offsets[self._first_missing], self._last))

    def end(self) -> None:
        """States that no further tensor comes."""
        self._ended.set()

    def drop(self, difference: str | None = None) -> None:
        """Cancels the call if it is not done. Nothing is sent after that."""
        with self._lock:
            self.over = True
            self.difference = self.difference or difference
            call, self._call = self._call, None
        self._may_send.put(-1)
        if call is not None:
            call.cancel()
        self._ended.set()

    # --- the thread that sends

    def _messages(self, header: rpc.PushHeader, wire: ElementType) -> Iterator[bytes]:
        codec = StreamCodec(rpc.StreamStepRequest)
        yield codec.header(header)
        sendable = 0
        for offset, parts in self._vector.chunks(self._absent):
            stop = offset + sum(part.nbytes for part in parts) // ELEMENT_BYTES
            while sendable < stop:
                sendable = self._may_send.get()
                if sendable < 0:
                    return
            yield codec.chunk("gradient", offset, wire.encoded(parts))
            failpoint("worker.mid_body")
        failpoint("worker.sent")

    # --- the thread that takes the push over

    def take(self, header: rpc.PushHeader, pushed: FlatVector) -> Any:
        """Waits for `end`, and sends the rest if this is the push to send.

        Args:
            header: The header of the push to send.
            pushed: Its gradient.

        Returns:
            The call, whose answer the caller reads; None if the push must be sent from the beginning.
        """
        self._ended.wait()
        with self._lock:
            call = None if self.over else self._call
        if call is None or self.header is None:
            return None
        difference = self._header_difference(header) or self._difference(pushed)
        with self._lock:
            if self.over:
                return None
            self.difference = difference
            self.taken = not difference
            self._may_send.put(-1 if difference else self._vector.size)
        if difference:
            call.cancel()
            return None
        return call

    def _header_difference(self, header: rpc.PushHeader) -> str | None:
        if header == self.header:
            return None
        fields = {field.name for message in (header, self.header) if message for field, _ in message.ListFields()}
        different = sorted(name for name in fields if getattr(header, name) != getattr(self.header, name))
        return next((_DIFFERENCES[name] for name in different if name in _DIFFERENCES), "the session was another")

    def _difference(self, pushed: FlatVector) -> str | None:
        """Compares what was sent with the push to send, bit for bit. Copies the tensors that were not added."""
        for (offset, mine), (_, theirs) in zip(
            self._vector.chunks(self._absent), pushed.chunks(self._absent), strict=True
        ):
            at = offset
            for part, other in zip(mine, theirs, strict=True):
                index = bisect_right(self._vector.offsets, at) - 1
                if index not in self._added:
                    part[:] = other
                elif not np.array_equal(np.frombuffer(part, np.uint32), np.frombuffer(other, np.uint32)):
                    return f"gradients were changed after backward, that of {self._names[index]} among them"
                at += part.nbytes // ELEMENT_BYTES
        return None
