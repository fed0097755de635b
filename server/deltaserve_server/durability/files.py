"""A folder's files: the one place that asks the system for them, so that a test can see, and undo, all that is done."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from deltaserve._common.failpoints import failpoint

_MOST_BUFFERS = 1024
"""What one call of pwritev takes: Linux' IOV_MAX."""

_OWNER = 0o600

UNFINISHED = ".new"
"""What the name of a file ends with that is not whole yet."""


class File:
    """A file that is being written.

    Args:
        path: Where it is to be; nothing may be there.

    Attributes:
        name: Its name in its folder.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OWNER)

    def allocate(self, start: int, stop: int) -> None:
        """Has the system set space aside from byte `start`, the end of the file, up to `stop`.

        Writing there does not fail for want of it. Where a file system cannot, the C library writes zeros instead; of
        bytes that are there already it would have to read first, which this file does not allow.
        """
        if stop > start:  # nothing at all is an error to the system
            os.posix_fallocate(self._descriptor, start, stop - start)

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Writes buffers one after the other, from byte `offset` on."""
        _write(self._descriptor, offset, buffers)

    def cut(self, stop: int) -> None:
        """Ends the file at byte `stop`."""
        os.ftruncate(self._descriptor, stop)

    def sync(self) -> None:
        """Returns when what was written is on the disk. If it raises, what became of it is not known, for good."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Lets go of the file; what was not synced stays so. A second time it does nothing."""
        descriptor, self._descriptor = self._descriptor, -1  # its number may be another file's by then
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Files:
    """What a folder holds. Every method raises OSError where the system refuses.

    Args:
        folder: The folder; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Returns the names of all files."""
        return sorted(path.name for path in self.folder.iterdir())

    def size(self, name: str) -> int:
        """Returns a file's length in bytes."""
        return (self.folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        """Returns a whole file."""
        return (self.folder / name).read_bytes()

    def create(self, name: str) -> File:
        """Makes a file; it is there for good after `sync`."""
        return File(self.folder / name)

    def shorten(self, name: str, stop: int, end: bytes, *, sync: bool) -> None:
        """Ends a file with `end` at byte `stop`; where it is to `sync`, it is on the disk with all that it holds."""
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write(descriptor, stop, [end])
            os.ftruncate(descriptor, stop + len(end))
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rewrite(self, name: str, offset: int, data: memoryview) -> None:
        """Writes a part of a file again, from byte `offset` on; the whole file is on the disk when this returns.

        What was written before an fsync that failed, or was never called, may be with the system alone, which takes it
        for clean.
        """
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write(descriptor, offset, [data])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, name: str, new: str) -> None:
        """Gives a file another name, in place of a file that has it; for good after `sync`."""
        (self.folder / name).replace(self.folder / new)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there; for good after `sync`."""
        (self.folder / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Returns when the names are on the disk as they now are."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def put(self, name: str, content: Sequence[bytes | memoryview]) -> None:
        """Writes a file whole or not at all, in place of one of this name; it is on the disk when this returns.

        Args:
            name: Its name.
            content: What is in it, in parts.
        """
        temporary = name + UNFINISHED
        self.remove(temporary)
        try:
            with self.create(temporary) as file:
                failpoint("file.created")
                file.allocate(0, sum(memoryview(part).nbytes for part in content))
                offset = 0
                for part in content:
                    file.write(offset, [part])
                    offset += memoryview(part).nbytes
                    failpoint("file.mid_write")
                failpoint("file.written")
                file.sync()
            failpoint("file.synced")
            self.rename(temporary, name)
            failpoint("file.renamed")
            self.sync()
            failpoint("file.safe")
        except OSError:
            with suppress(OSError):
                self.remove(temporary)
            raise


def _write(descriptor: int, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while left:
        written = os.pwritev(descriptor, left[:_MOST_BUFFERS], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
