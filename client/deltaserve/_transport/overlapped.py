"""A push that is sent while its gradient is still being made.

A push has its header first, and the header says what the whole push is: its number, the version it is of, which tensors
have no gradient, its hyperparameters and its weight. An early push guesses that, sends every chunk as soon as its
tensors are there, and keeps the last chunk back. `Worker.step` takes it over only where it is, header and values, the
very push that is asked for; otherwise the call is cancelled, of which the server keeps nothing, and the push is sent as
if there had been no other.
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

_AGAIN = "more than one backward pass made gradients"
_OTHERS = "other parameters had a gradient than in the step before"
_DIFFERENCES = {
    "absent_tensors": _OTHERS,
    "hyperparameters": "the hyperparameters were changed",
    "weight": "the weight was another than in the step before",
}


class OverlappedPush:
    """One push on its way before it is whole.

    One thread adds tensors, in any order: `begin`, `claim`, `add`, `end` and `drop` are its. gRPC's own thread sends. A
    third takes the push over.

    Args:
        arrays: By tensor name, in the layout's order: where the gradients are put before they are sent; float32,
            C-contiguous. They may be used again for the next push once this one was dropped.

    Attributes:
        header: What the push was begun with; None before.
        over: Whether nothing of it is wanted any more.
        taken: Whether `Worker.step` took it over.
        difference: What made it another push than the one that was asked for, in words; None where nothing did.
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
        self._idle: set[int] = set()  # of which nothing is sent
        self._first_missing = 0
        self._last = 0  # the last element that is sent
        self._call: Any = None
        self._whole = Event()
        self._may_send: SimpleQueue[int] = SimpleQueue()  # the vector up to this element; below 0: no more
        self._lock = Lock()

    # --- the thread that adds

    def begin(self, connection: Connection, header: rpc.PushHeader, wire: ElementType) -> None:
        """Begins the call.

        Args:
            connection: To the server.
            header: What the push is expected to be.
            wire: The type of elements in messages.
        """
        self._absent = list(header.absent_tensors)
        sizes = [stop - start for start, stop in pairwise(self._vector.offsets)]
        self._idle.update(self._absent, (index for index, size in enumerate(sizes) if not size))
        self._last = max(self._vector.offsets[index + 1] for index in range(len(sizes)) if index not in self._idle) - 1
        self._call = connection.begin("StreamStep", self._messages(header, wire))
        self.header = header

    def claim(self, index: int) -> bool:
        """Returns whether a tensor's array may be written to now; the push is dropped if that tensor is not due."""
        if index in self._added or index in self._absent:
            self.drop(_AGAIN if index in self._added else _OTHERS)
        return not self.over and not self._whole.is_set()

    def add(self, index: int) -> None:
        """Takes note that a tensor's gradient is in its array, where it stays as it is until the push is over."""
        self._added.add(index)
        before = self._first_missing
        while self._first_missing in self._added or self._first_missing in self._idle:
            self._first_missing += 1
        if self._first_missing > before:
            self._may_send.put(min(self._vector.offsets[self._first_missing], self._last))

    def end(self) -> None:
        """Takes note that no further tensor comes."""
        self._whole.set()

    def drop(self, difference: str | None = None) -> None:
        """Cancels the call, if it is not done, and lets go of it; nothing is sent after that."""
        with self._lock:
            self.over = True
            self.difference = self.difference or difference
            call, self._call = self._call, None
        self._may_send.put(-1)
        if call is not None:
            call.cancel()
        self._whole.set()

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

    # --- the thread that takes it over

    def take(self, header: rpc.PushHeader, pushed: FlatVector) -> Any:
        """Lets the rest go if this is the push that is asked for, once no further tensor comes.

        Args:
            header: Of the push that is asked for.
            pushed: Its gradient.

        Returns:
            The call, whose answer is to be read; None where there is none of this push.
        """
        self._whole.wait()
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
        """Compares, bit for bit, what was sent with what is asked for; fills in what did not come by itself."""
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
