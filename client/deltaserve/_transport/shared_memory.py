"""Memory that a server on this host shares with a worker: mapped, and copied to and from by several threads."""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from deltaserve._common.element_types import Array
from deltaserve._common.flat_vector import FlatVector
from deltaserve.v1 import worker_service_pb2 as rpc

_THREADS_MOST = 4
"""So many copy as fast as a machine's memory can take it."""

_KEPT = 4
"""Mappings that are kept, to be used again: a server writes versions to a few places in turn."""


class SharedMemory:
    """A session's memory.

    Args:
        gradient: Where its gradients go, as the server answered.

    Raises:
        OSError: It cannot be opened: the server is on another host, or another user's.
    """

    def __init__(self, gradient: rpc.SharedMemory) -> None:
        self._gradient = _mapped(gradient, writable=True)
        self._weights: dict[str, Array] = {}
        self._threads: ThreadPoolExecutor | None = None

    def write_gradient(self, pushed: FlatVector) -> None:
        """Copies a gradient to where the server reads it; what is absent is copied too, and never read."""
        self._copy(pushed, self._gradient, lambda part, shared: _assign(shared, part))

    def read_weights(self, weights: rpc.SharedMemory, target: FlatVector) -> None:
        """Copies weights to their tensors.

        Raises:
            OSError: The memory cannot be opened.
        """
        vector = self._weights.pop(weights.name, None)
        if vector is None:
            vector = _mapped(weights, writable=False)
        self._weights[weights.name] = vector  # the last in order: the one used most recently
        while len(self._weights) > _KEPT:
            del self._weights[next(iter(self._weights))]
        self._copy(target, vector, _assign)

    def _copy(self, flat: FlatVector, shared: Array, copy: Callable[[memoryview, memoryview], None]) -> None:
        """Calls `copy` with all pieces of a flat vector and of the shared one."""
        pieces = list(_pieces(flat, shared))
        count = min(len(os.sched_getaffinity(0)), _THREADS_MOST, len(pieces))
        if self._threads is None and count > 1:
            self._threads = ThreadPoolExecutor(_THREADS_MOST - 1, "deltaserve copy")

        def run(share: int) -> None:
            for part, theirs in pieces[share::count]:
                copy(part, theirs)

        others = [self._threads.submit(run, share) for share in range(1, count)] if self._threads else []
        try:
            run(0)
        finally:
            wait(others)  # they use the caller's memory
        for other in others:
            other.result()


def _pieces(flat: FlatVector, shared: Array) -> Iterator[tuple[memoryview, memoryview]]:
    raw, at = shared.view(np.uint8).data, 0
    for _, parts in flat.chunks():
        for part in parts:
            yield part, raw[at : at + part.nbytes]
            at += part.nbytes


def _assign(target: memoryview, source: memoryview) -> None:
    # numpy's copy, unlike memoryview's, lets other threads run.
    np.frombuffer(target, np.uint8)[:] = np.frombuffer(source, np.uint8)


def _mapped(memory: rpc.SharedMemory, *, writable: bool) -> Array:
    """Opens a file of the server's and maps it.

    Raises:
        OSError: There is no such file, it may not be opened, or it is another one: process ids are a container's own.
    """
    path, link = f"/proc/{memory.process_id}/fd/{memory.file_descriptor}", f"/memfd:{memory.name} (deleted)"
    if str(Path(path).readlink()) != link:  # whatever else it is, it is not even opened
        raise OSError(f"the server's file {memory.name} is not here")
    flags, protection = (os.O_RDWR, mmap.PROT_READ | mmap.PROT_WRITE) if writable else (os.O_RDONLY, mmap.PROT_READ)
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        found = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if found != link or os.fstat(descriptor).st_size != memory.bytes:
            raise OSError(f"the server's file {memory.name} is not here")
        populate = getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(descriptor, memory.bytes, mmap.MAP_SHARED | populate, protection)
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, "<f4")
