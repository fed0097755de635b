"""Vectors through memory that a server on the same host shares with the worker."""

import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.element_types import FLOAT32, Array, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import FlatVector
from deltaserve._connection import Connection
from deltaserve._errors import RequestError
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.protocol import Answer, Push
from deltaserve._transport.pull import write_chunks
from deltaserve._transport.stream import StreamTransport
from deltaserve._transport.unary import UnaryTransport
from deltaserve._weights import LocalWeights
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

_MAX_THREADS = 4
"""This many threads copy as fast as the machine's memory allows."""

_MAX_MAPPINGS = 4
"""Mappings of weights that stay open: a server writes its versions to a few places in turn."""


class SharedMemoryTransport:
    """Sends a push through shared memory, and falls back to messages where that is not possible.

    Args:
        connection: The connection to the server.
        memory: The session's shared memory.
        messages: The transport to fall back to, with float32 elements.
        wire: The type of elements in messages that the caller asked for. It takes effect after the memory is given up
            and no push that went through it is uncertain.

    Attributes:
        memory: The shared memory; None after it was given up.
    """

    def __init__(
        self,
        connection: Connection,
        memory: "SharedMemory",
        messages: UnaryTransport | StreamTransport,
        wire: ElementType,
    ) -> None:
        self._connection = connection
        self._messages = messages
        self._asked = wire
        self.memory: SharedMemory | None = memory

    @property
    def wire(self) -> ElementType:
        """The type of elements in messages."""
        return self._messages.wire

    def step(self, push: Push, weights: LocalWeights) -> Answer:
        """As in `Transport`."""
        # The server may still read the gradient of an uncertain push, so another gradient must not overwrite it.
        if self.memory and not push.resent:
            self._connection.check_usable()  # in a forked child the memory is the parent's
            exchange = _Exchange(self._connection, self.memory, push, weights)
            try:
                return self._connection.receive("StreamStep", exchange.start, exchange.take, push.timeout_seconds)
            except (RequestError, OSError) as problem:  # OSError: the weights cannot be mapped
                if isinstance(problem, RequestError) and problem.reason != "SHARED_MEMORY_UNAVAILABLE":
                    raise
                _log.info("vectors travel in messages from now on: %s", problem)
                self.memory = None
            finally:
                exchange.release()
        answer = self._messages.step(push, weights)
        if not self.memory:
            self._messages.wire = self._asked  # the answer settles the push that may have gone through shared memory
        return answer

    def begin(self, overlapped: OverlappedPush, header: rpc.PushHeader, size: int) -> bool:
        """Returns False while shared memory is open: copying is quicker than a head start."""
        return self.memory is None and self._messages.begin(overlapped, header, size)

    def close(self) -> None:
        """Unmaps the memory: a mapping counts as used whatever the server does with its side."""
        self.memory = None


class _Exchange:
    """One push through shared memory, with all its attempts."""

    def __init__(self, connection: Connection, memory: "SharedMemory", push: Push, weights: LocalWeights) -> None:
        self._connection = connection
        self._memory = memory
        self._push = push
        self._weights = weights
        self._reads: list[Event] = []  # one for each attempt, set when its weights were read
        push.header.ClearField("gradient_type")
        push.header.weights_type = FLOAT32.data_type  # applies if the weights come in chunks
        push.header.shared_memory = True

    def start(self, attempt: int, seconds: float) -> Any:
        """Starts the call of an attempt."""
        # The copy is made here and not by gRPC's thread, which may ask for the message after the step is over.
        if not attempt:
            failpoint("worker.mid_body")
            self._memory.write_gradient(self._push.gradient)
        self._reads.append(Event())
        return self._connection.stub("StreamStep")(self._messages(self._reads[-1]), timeout=seconds)

    def take(self, answer: rpc.StreamStepHeader, chunks: Iterable[Chunk]) -> Answer:
        """Reads the answer to an attempt."""
        failpoint("worker.acknowledged")
        self._weights.begin(answer.position)
        if answer.HasField("weights"):
            failpoint("worker.mid_answer")
            self._memory.read_weights(answer.weights, self._weights.target)
            self._reads[-1].set()
            for _ in chunks:  # waits for the call's end: a call that has failed did not keep the weights in place
                pass
        else:  # the weights lie in memory that cannot be shared, for instance on a GPU
            self._reads[-1].set()
            write_chunks(chunks, FLOAT32, self._weights)
        return Answer(answer.result, answer.position)

    def release(self) -> None:
        """Ends the request streams of all attempts."""
        for read in self._reads:
            read.set()

    def _messages(self, read: Event) -> Iterator[bytes]:
        yield StreamCodec(rpc.StreamStepRequest).header(self._push.header)
        failpoint("worker.sent")
        read.wait()  # the server keeps the weights in place until the stream ends


class SharedMemory:
    """A session's shared memory, copied to and from by several threads.

    Args:
        gradient: The memory for gradients, from OpenSharedMemory.

    Raises:
        OSError: The memory cannot be opened: the server runs on another host or as another user.
    """

    def __init__(self, gradient: rpc.SharedMemory) -> None:
        self._gradient = _mapped(gradient, writable=True)
        self._weights: dict[str, Array] = {}
        self._threads: ThreadPoolExecutor | None = None

    def write_gradient(self, pushed: FlatVector) -> None:
        """Copies a gradient to where the server reads it, absent tensors included, which the server skips."""
        self._copy(pushed, self._gradient, lambda part, shared: _assign(shared, part))

    def read_weights(self, weights: rpc.SharedMemory, target: FlatVector) -> None:
        """Copies weights to the worker's tensors.

        Raises:
            OSError: The memory cannot be opened.
        """
        vector = self._weights.pop(weights.name, None)
        if vector is None:
            vector = _mapped(weights, writable=False)
        self._weights[weights.name] = vector  # moves to the end: the least recently used mapping is the first
        while len(self._weights) > _MAX_MAPPINGS:
            del self._weights[next(iter(self._weights))]
        self._copy(target, vector, _assign)

    def _copy(self, flat: FlatVector, shared: Array, copy: Callable[[memoryview, memoryview], None]) -> None:
        """Calls `copy` with every piece of a flat vector and of the shared vector, in several threads."""
        pieces = list(_pieces(flat, shared))
        count = min(len(os.sched_getaffinity(0)), _MAX_THREADS, len(pieces))
        if self._threads is None and count > 1:
            self._threads = ThreadPoolExecutor(_MAX_THREADS - 1, "deltaserve copy")

        def run(first: int) -> None:
            for part, shared_part in pieces[first::count]:
                copy(part, shared_part)

        others = [self._threads.submit(run, first) for first in range(1, count)] if self._threads else []
        try:
            run(0)
        finally:
            wait(others)  # the threads use the caller's memory
        for other in others:
            other.result()


def _pieces(flat: FlatVector, shared: Array) -> Iterator[tuple[memoryview, memoryview]]:
    raw, at = shared.view(np.uint8).data, 0
    for _, parts in flat.chunks():
        for part in parts:
            yield part, raw[at : at + part.nbytes]
            at += part.nbytes


def _assign(target: memoryview, source: memoryview) -> None:
    # numpy's copy releases the GIL, memoryview's does not.
    np.frombuffer(target, np.uint8)[:] = np.frombuffer(source, np.uint8)


def _mapped(memory: rpc.SharedMemory, *, writable: bool) -> Array:
    """Opens a file of the server and maps it.

    Raises:
        OSError: There is no such file, it may not be opened, or it is another file, because process ids differ between
            containers.
    """
    path, link = f"/proc/{memory.process_id}/fd/{memory.file_descriptor}", f"/memfd:{memory.name} (deleted)"
    # The link is checked before the file is opened: opening some other file, a device perhaps, could do harm.
    if str(Path(path).readlink()) != link:
        raise OSError(f"the server's file {memory.name} is not on this host")
    flags, protection = (os.O_RDWR, mmap.PROT_READ | mmap.PROT_WRITE) if writable else (os.O_RDONLY, mmap.PROT_READ)
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        found = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if found != link or os.fstat(descriptor).st_size != memory.bytes:
            raise OSError(f"the server's file {memory.name} is not on this host")
        populate = getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(descriptor, memory.bytes, mmap.MAP_SHARED | populate, protection)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, "<f4")
