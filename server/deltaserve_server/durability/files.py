"""Reads and writes the files of one folder.

Everything in this room goes through `Files` and `File`, so that a test can record, fail or undo each operation.

A failed fsync is final: Linux marks the pages clean although they never reached the disk, so a second fsync of the
same file succeeds without writing them (Rebello et al., "Can Applications Recover from fsync Failures?", ATC'20).
Data that matters is therefore written again, to another file or over the same bytes, and synced there.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability.errors import disk_operation

_BUFFERS_PER_CALL = 1024
"""Linux' IOV_MAX: the most buffers that one pwritev takes."""

_OWNER = 0o600

UNFINISHED = ".new"
"""Suffix of a file that is still being written. A crash leaves it behind; the next start removes it."""


class File:
    """A new file, open for writing; its path must not exist yet."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OWNER)

    def allocate(self, start: int, stop: int) -> None:
        """Reserves disk space from byte `start`, the end of the file, to byte `stop`, so that writes there succeed.

        On file systems without fallocate, the C library writes zeros. It would have to read bytes that exist, which
        this write-only descriptor does not allow; so `start` must be the end of the file.
        """
        if stop > start:  # the system call refuses an empty range
            os.posix_fallocate(self._descriptor, start, stop - start)

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Writes buffers one after the other, starting at byte `offset`."""
        _write(self._descriptor, offset, buffers)

    def cut(self, stop: int) -> None:
        """Truncates the file at byte `stop`."""
        os.ftruncate(self._descriptor, stop)

    def sync(self) -> None:
        """Waits until the content is on the disk. After an error, what the disk holds is unknown; do not call again."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file without syncing it. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1  # the number may be another file's by then
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Files:
    """The files of an existing folder. Every method raises OSError if the system refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Returns the names of all files, sorted."""
        return sorted(path.name for path in self.folder.iterdir())

    def size(self, name: str) -> int:
        """Returns the length of a file in bytes."""
        return (self.folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        """Returns the content of a file."""
        return (self.folder / name).read_bytes()

    def create(self, name: str) -> File:
        """Creates a file. Its name survives a power failure after `sync`."""
        return File(self.folder / name)

    def shorten(self, name: str, stop: int, end: bytes, *, sync: bool) -> None:
        """Overwrites a file with `end` at byte `stop` and truncates it after that; `sync` waits for the disk."""
        with disk_operation("shortening", self.folder / name), _opened(self.folder / name) as descriptor:
            _write(descriptor, stop, [end])
            os.ftruncate(descriptor, stop + len(end))
            if sync:
                os.fsync(descriptor)

    def rewrite(self, name: str, offset: int, data: memoryview) -> None:
        """Writes bytes again over the same bytes and syncs the file.

        Pages that an earlier process wrote may be in the page cache alone, marked clean by an fsync that failed.
        Writing marks them dirty, so that this fsync writes them.
        """
        with disk_operation("rewriting", self.folder / name, len(data)), _opened(self.folder / name) as descriptor:
            _write(descriptor, offset, [data])
            os.fsync(descriptor)

    def rename(self, name: str, new: str) -> None:
        """Renames a file and replaces the file called `new`, if any. The change survives power failure after `sync`."""
        (self.folder / name).replace(self.folder / new)

    def remove(self, name: str) -> None:
        """Removes a file if it exists. The change survives power failure after `sync`."""
        (self.folder / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Waits until the folder's names are on the disk."""
        with disk_operation("syncing", self.folder), _opened(self.folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
            os.fsync(descriptor)

    def put(self, name: str, content: Sequence[bytes | memoryview]) -> None:
        """Writes a file atomically and durably, replacing the file of this name, if any.

        A crash leaves the old file or the new one, never a mixture: rename replaces a file in one step, and it follows
        the fsync of the new content.
        """
        temporary = name + UNFINISHED  # in the same folder: rename is atomic only within a file system
        total = sum(memoryview(part).nbytes for part in content)
        self.remove(temporary)  # of an attempt that a crash interrupted: O_EXCL would refuse the name
        try:
            with disk_operation("writing", self.folder / name, total):
                with self.create(temporary) as file:
                    failpoint("file.created")
                    file.allocate(0, total)  # a full disk fails here, before anything is written
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


@contextmanager
def _opened(path: Path, flags: int = os.O_WRONLY) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while left:
        written = os.pwritev(descriptor, left[:_BUFFERS_PER_CALL], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
