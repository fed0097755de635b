"""The worker's side of shared memory, written by hand from the contract. A test decides when each call ends."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from google.protobuf.message import Message
from messages import Vector
from numpy.typing import ArrayLike
from wire import SECONDS, Session, Wire

from deltaserve.v1 import worker_service_pb2 as rpc


def path(memory: rpc.SharedMemory) -> Path:
    """Returns the path at which the contract says to open the memory."""
    return Path(f"/proc/{memory.process_id}/fd/{memory.file_descriptor}")


def mapped(memory: rpc.SharedMemory, *, write: bool = False) -> Vector:
    """Opens and maps memory as the contract says. Checks its name and size."""
    descriptor = os.open(path(memory), os.O_RDWR if write else os.O_RDONLY)
    try:
        assert str(Path(f"/proc/self/fd/{descriptor}").readlink()) == f"/memfd:{memory.name} (deleted)"
        assert os.fstat(descriptor).st_size == memory.bytes
        access = mmap.PROT_READ | mmap.PROT_WRITE if write else mmap.PROT_READ
        return np.frombuffer(mmap.mmap(descriptor, memory.bytes, mmap.MAP_SHARED, access), "<f4")
    finally:
        os.close(descriptor)


class SharedStep:
    """A StreamStep in flight whose push is in shared memory.

    Args:
        wire: To the server.
        header: The push's header.
        after: What is sent after it, once `finish` is called.
    """

    def __init__(self, wire: Wire, header: rpc.PushHeader, *after: Message) -> None:
        self._finished = Event()
        self._after = after
        self.call = wire.start("StreamStep", self._messages(header))

    def answer(self) -> rpc.StreamStepHeader:
        """The first message of the answer; the version that it names is read until `finish` or `cancel`."""
        return rpc.StreamStepResponse.FromString(next(self.call)).header

    def finish(self) -> list[rpc.StreamStepResponse]:
        """Sends the remaining messages and half-closes. Returns the rest of the answer."""
        self._finished.set()
        return [rpc.StreamStepResponse.FromString(message) for message in self.call]

    def cancel(self) -> None:
        """Cancels the call."""
        self.call.cancel()
        self._finished.set()

    def _messages(self, header: rpc.PushHeader) -> Iterator[Message]:
        yield rpc.StreamStepRequest(header=header)
        self._finished.wait(SECONDS)
        yield from self._after


class Sharer:
    """A session that shares memory with the server.

    Args:
        wire: To the server.
        model: The model's name.
        worker: The worker's name.

    Attributes:
        session: The session.
        memory: Where its gradients go, as the server answered.
        gradient: That, mapped.
    """

    def __init__(self, wire: Wire, model: str, worker: str, lease_seconds: float | None = None) -> None:
        self._wire = wire
        self.session: Session = wire.open(model, worker, lease_seconds)
        self.memory = open_memory(wire, self.session)
        self.gradient = mapped(self.memory, write=True)

    def begin(self, sequence: int, gradient: ArrayLike | None, *after: Message, **fields: Any) -> SharedStep:
        """Writes a gradient, unless it is None, and starts its push."""
        if gradient is not None:
            self.gradient[:] = gradient
        return SharedStep(self._wire, self.session.header(sequence, shared_memory=True, **fields), *after)

    def step(self, sequence: int, gradient: ArrayLike | None, **fields: Any) -> tuple[rpc.PushResult, Vector]:
        """Pushes; returns the result and a copy of the weights."""
        step = self.begin(sequence, gradient, **fields)
        answer = step.answer()
        weights = mapped(answer.weights)[: self.gradient.size].copy()
        assert step.finish() == []
        return answer.result, weights


def open_memory(wire: Wire, session: Session) -> rpc.SharedMemory:
    """OpenSharedMemory."""
    answer: rpc.OpenSharedMemoryResponse = wire.one("OpenSharedMemory", rpc.OpenSharedMemoryRequest(**session.id))
    return answer.gradient


def free(wire: Wire) -> int:
    """Returns how many bytes of its memory budget the server has left."""
    return wire.info().limits.memory_available_bytes


def descriptors() -> int:
    """Returns how many file descriptors this process has open. The server runs in it too."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
