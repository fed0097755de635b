"""What can be wrong with a data directory."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class DataDirectoryError(Exception):
    """A data directory cannot be used; the text is one line that says why, and what to do."""


class CorruptError(Exception):
    """A file does not hold what was written.

    Args:
        where: The file.
        what: What is wrong with it.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Takes a file that the disk cannot give any more for one that is corrupt; every other error is what it is."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CorruptError(where, "the disk cannot read it") from error
