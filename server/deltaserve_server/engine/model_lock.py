"""Who owns a model: one event at a time, and what was seen there is safe before anybody is told of it."""

import threading
from types import TracebackType
from typing import Self

from deltaserve_server.durability.commits import Commits, StorageError
from deltaserve_server.model import Refused

_STORAGE_RETRY_SECONDS = 0.5


class ModelLock:
    """What one thread at a time owns, for as long as it has not ended.

    Args:
        commits: What is to be told when it is safe.

    Attributes:
        lock: Held while it is owned; `event` also tells whether it has ended.
    """

    def __init__(self, commits: Commits) -> None:
        self.lock = threading.RLock()
        self._commits = commits
        self._depth = 0
        self._ended: Refused | None = None

    def event(self) -> Self:
        """Owns it for one event, or for a look at it: to be entered, which may happen again meanwhile.

        When it is left, everything that was to be seen there is as safe as it is to be.

        Raises:
            Refused: From entering: the model has ended. From leaving: STORAGE_UNAVAILABLE.
        """
        return self

    def __enter__(self) -> None:
        self.lock.acquire()
        if self._ended:
            self.lock.release()
            raise self._ended.with_traceback(None)  # else every raise would add to the one before
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.leave():
            self._flush()

    def leave(self) -> bool:
        """Ends what `event` began, unsettled; returns whether nobody owns the model any more."""
        self._depth -= 1
        outermost = not self._depth
        self.lock.release()
        return outermost

    def _flush(self) -> None:
        try:
            self._commits.flush()
        except StorageError as error:
            raise storage_refused(error) from None

    def _check_room(self, records: int, elements: int, entries: int) -> None:
        """Raises Refused STORAGE_UNAVAILABLE where so many records could not be written down; see `record_bytes`."""
        try:
            self._commits.ready(records, elements, entries)
        except StorageError as error:
            raise storage_refused(error) from None


class ReadLock:
    """Owns something for a look of which nobody is told."""

    def __init__(self, owned: ModelLock) -> None:
        self._owned = owned

    def __enter__(self) -> None:
        self._owned.__enter__()

    def __exit__(self, *_: object) -> None:
        self._owned.leave()


def storage_refused(error: StorageError | OSError) -> Refused:
    """Returns what whoever asks for something is told where the disk does not do its part."""
    why = (error.strerror or "the disk") if isinstance(error, OSError) else error
    return Refused("STORAGE_UNAVAILABLE", _STORAGE_RETRY_SECONDS, why=why)
