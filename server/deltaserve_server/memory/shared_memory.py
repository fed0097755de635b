"""Memory that processes of the same user on this host can map: anonymous files (Linux' memfd) under names of chance.

An anonymous file leaves nothing behind when the server is killed, and it can be sealed: nobody can cut it short under
the server's hands, and nobody but the server can write to one that is only to be read.
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
"""F_SEAL_FUTURE_WRITE of Linux 5.1, which Python's fcntl lacks: mappings for writing are those from before."""

_OWNER = 0o600


@dataclass(frozen=True, slots=True)
class Handle:
    """What another process needs to map a vector: see the proto's SharedMemory."""

    process_id: int
    descriptor: int
    name: str
    size_bytes: int


class _Segment(mmap.mmap):
    """A file's mapping; the file is open for others for as long as this is here."""

    handle: Handle


def allocate(size: int, *, others_write: bool) -> Vector:
    """Returns a vector of zeros that others can map, gone when nobody refers to it any more.

    Args:
        size: Number of elements, at least 1.
        others_write: Whether they may write to it.

    Raises:
        OSError: The system has no such files, or no descriptors left. A lack of memory is no error here: whoever asks
            has reserved it from a `Budget`.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("only Linux has memory files")
    size_bytes = size * ELEMENT_BYTES
    name = f"deltaserve-{secrets.token_hex(16)}"
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(descriptor, _OWNER)
        os.posix_fallocate(descriptor, 0, size_bytes)  # now, not when it is first written to
        segment = _Segment(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | (0 if others_write else _FUTURE_WRITE))
    except BaseException:
        os.close(descriptor)
        raise
    weakref.finalize(segment, os.close, descriptor)
    segment.handle = Handle(os.getpid(), descriptor, name, size_bytes)
    return np.ndarray(size, np.float32, buffer=segment)


def handle(vector: Vector) -> Handle | None:
    """Returns how others can map a whole vector; None if they cannot."""
    base: Any = vector.base
    return base.handle if isinstance(base, _Segment) else None


def when_gone(vector: Vector, call: Any) -> None:
    """Has `call` called when nobody here refers to a shared vector any more."""
    weakref.finalize(vector.base, call)
