"""The lock of a model. A thread that leaves it makes durable what happened under it, before anybody is told."""

import threading
from types import TracebackType

from deltaserve_server.durability.commits import Commits, StorageError
from deltaserve_server.model import Refused

_STORAGE_RETRY_SECONDS = 0.5


class ModelLock:
    """Lets one thread at a time use a model, for one event, until the model ends.

    `with lock:` may be nested. Leaving the outermost block writes the journal and tells those who wait.

    Attributes:
        mutex: The plain lock, for what must also work on a model that has ended.
        read_lock: The same lock for a block that changes nothing: leaving it does not write the journal.
        ended: Why the model has ended; None while it is served.
    """

    def __init__(self, commits: Commits) -> None:
        self.mutex = threading.RLock()  # reentrant: a servicer makes several calls one event
        self.read_lock = ReadLock(self)
        self.ended: Refused | None = None
        self._commits = commits
        self._depth = 0

    def __enter__(self) -> None:
        """Takes the lock; raises Refused if the model has ended."""
        self.mutex.acquire()
        if self.ended:
            self.mutex.release()
            raise self.ended.with_traceback(None)  # one exception is raised many times: its traceback would grow
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the lock; the outermost block writes the journal, see `flush`."""
        if self.release():
            self.flush()

    def release(self) -> bool:
        """Releases the lock without writing the journal; returns whether this was the outermost block."""
        self._depth -= 1
        outermost = not self._depth  # read under the lock; another thread changes it at once
        self.mutex.release()
        return outermost

    def flush(self) -> None:
        """Writes the journal and tells those who wait; must be called without the lock.

        Raises:
            Refused: STORAGE_UNAVAILABLE: the journal cannot be written.
        """
        try:
            self._commits.flush()
        except StorageError as error:
            raise storage_refused(error) from None

    def check_room(self, records: int, elements: int, entries: int) -> None:
        """Raises Refused STORAGE_UNAVAILABLE if the journal has no room for these records; see `record_bytes`."""
        try:
            self._commits.ready(records, elements, entries)
        except StorageError as error:
            raise storage_refused(error) from None


class ReadLock:
    """A model's lock for a block that changes nothing."""

    def __init__(self, lock: ModelLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def storage_refused(error: StorageError | OSError) -> Refused:
    """Returns the refusal of a request for which the disk did not do its part."""
    why = (error.strerror or "the disk") if isinstance(error, OSError) else error
    return Refused("STORAGE_UNAVAILABLE", _STORAGE_RETRY_SECONDS, why=why)
