"""Errors of a data directory, and what an operator needs to know about a disk that refuses."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DataDirectoryError(Exception):
    """A data directory cannot be used. The text is one line: what is wrong, and what to do."""


class CorruptError(Exception):
    """The file at `where` does not contain what the server wrote to it; `what` is wrong with it."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


@contextmanager
def unreadable_is_corrupt(where: str) -> Iterator[None]:
    """Turns EIO into a CorruptError: the disk has lost the data. Other errors pass through unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CorruptError(where, "the disk cannot read it") from error


@contextmanager
def disk_operation(action: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Completes an OSError raised inside: calls on file descriptors know neither the file nor the space they need.

    `strerror` gets the action and, on a full disk, the sizes; clients may see it, so it contains no path. `filename`
    gets the path.

    Args:
        action: What the server does, for example "syncing".
        path: The file or folder.
        needed_bytes: Space that the operation takes on the disk.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _DISK_FULL and needed_bytes > 0
        if error.filename is None or full:
            size = f" {needed_bytes:,} bytes ({_free_space(path.parent)})" if full else ""
            error.strerror = f"{error.strerror or error} while {action}{size}"
            error.filename = error.filename or str(path)
        raise


def disk_full_advice(error: OSError, path: Path) -> str:
    """Returns what to do about a full disk, to be appended to an error message; empty for other errors."""
    if error.errno not in _DISK_FULL:
        return ""
    mount = path.absolute()
    while not mount.is_mount():
        mount = mount.parent
    return f"; free some space on the file system mounted at {mount} and start the server again"


def _free_space(folder: Path) -> str:
    try:
        system = os.statvfs(folder)
    except OSError:
        return "free space unknown"
    if system.f_files and not system.f_favail:
        return "no inodes free"
    return f"{system.f_bavail * system.f_frsize:,} bytes free"
