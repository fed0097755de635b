"""Shared memory: vectors that other processes of the same user on this host can map, as Linux memory files (memfd).

A memory file vanishes with the server's process, however it ends. It can be sealed: no other process can truncate it
while the server uses it, or write to one that is read-only for others.
"""

import fcntl
import mmap
import os
import secrets
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaserve_server.memory.store import ELEMENT_BYTES, Vector

_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE (Linux 5.1), which Python's fcntl lacks: only mappings that exist already may write."""

_OWNER = 0o600


@dataclass(frozen=True, slots=True)
class Handle:
    """What another process needs to map a vector; the message SharedMemory carries it."""

    process_id: int
    descriptor: int
    name: str
    size_bytes: int


class _Segment(mmap.mmap):
    """The server's mapping of a memory file. The file stays open, for others to map, as long as this object exists."""

    handle: Handle


def allocate(size: int, *, others_write: bool) -> Vector:
    """Returns a vector of zeros that others can map; its memory file is closed when the last reference to it goes.

    Args:
        size: Number of elements, at least 1.
        others_write: Whether other processes may write to it.

    Raises:
        OSError: The system has no memory files, or no file descriptors left. A lack of memory raises nothing: the
            caller has reserved the bytes from a `Budget`.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memory files (memfd_create), which need Linux")
    size_bytes = size * ELEMENT_BYTES
    name = f"deltaserve-{secrets.token_hex(16)}"
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Others open the file through /proc, which checks its mode.
        os.fchmod(descriptor, _OWNER)
        os.posix_fallocate(descriptor, 0, size_bytes)  # a lack of memory shows here, not as SIGBUS at a write
        segment = _Segment(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        # After the mapping: the seal against future writes leaves existing mappings writable.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | (0 if others_write else _FUTURE_WRITE))
    except BaseException:
        os.close(descriptor)
        raise
    # The mapping alone keeps the memory, but others can open the file only while the descriptor is open.
    weakref.finalize(segment, os.close, descriptor)
    segment.handle = Handle(os.getpid(), descriptor, name, size_bytes)
    return np.ndarray(size, np.float32, buffer=segment)


def handle(vector: Vector) -> Handle | None:
    """Returns the handle of a whole vector from `allocate`, and None for any other vector."""
    base: Any = vector.base
    return base.handle if isinstance(base, _Segment) else None


def when_gone(vector: Vector, call: Any) -> None:
    """Calls `call` when a vector from `allocate` has no references left."""
    weakref.finalize(vector.base, call)
