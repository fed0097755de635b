"""The queue between a model and its journal: records to be written, and callbacks that wait until they are durable.

The update comes first, in memory; its record is written after it and before anybody is notified of it.

There is no writer thread. A thread that has changed the model calls `flush` after it has released the model's lock. It
writes everything that is queued, with one fsync; threads that come meanwhile wait and mostly find their own records
written (group commit). So a lone worker pays no hand-over to another thread, and many workers share an fsync.
"""

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from deltaserve._common.failpoints import failpoint
from deltaserve._common.optimizers import Optimizer
from deltaserve_server.durability.journal import Journal, record_bytes
from deltaserve_server.durability.records import Changed, Event, Extended, Piece, Record, StatePut, Updated
from deltaserve_server.model import Tensor

_log = logging.getLogger(__name__)

Effect = Callable[[], None]

_NAMED_ENTRIES = 3
"""How many entries of `record_bytes` a tensor counts as if its record contains its name and shape."""

_SPARE_BYTES = 1 << 18
"""Reserved for records without a vector, which are written without a call of `ready`."""


class StorageError(Exception):
    """The journal cannot be written. The text is the system's reason."""


class _Rotation(NamedTuple):
    """Queued: later records go to another journal. `records` and `bytes_before` are the counts to restore if not."""

    journal: Journal
    records: int
    bytes_before: int


class _Release(NamedTuple):
    """Queued: the pieces of the record before are no longer needed."""

    effect: Effect


_Item = Record | Effect | _Release | _Rotation


class Commits:
    """Makes a model's changes durable and calls back when they are. This class has no journal: it calls back at once.

    The caller holds the model's lock for `add`, `on_durable`, `ready` and `rotate`, and does not hold it for `flush`.

    Attributes:
        index: Index of the last record.
        journals: Whether there is a journal.
    """

    journals = False

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def ready(self, records: int, elements: int, entries: int) -> None:
        """Reserves disk space for records, so that a full disk refuses a push before it changes anything.

        Each record's vector has `elements` elements; for `entries` see `record_bytes`.

        Raises:
            StorageError: The records could not be written.
        """

    def add(self, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
        """Adds a record. `done` is called when its pieces are no longer needed."""
        self.index += 1
        if done:
            done()

    def on_durable(self, effect: Effect) -> None:
        """Calls `effect` when everything added so far is durable."""
        effect()

    def flush(self) -> None:
        """Waits until everything added so far is durable and its effects were called.

        Raises:
            StorageError: It could not be written.
        """

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Delays effects until the block is left."""
        yield

    def rotate(self, journal: Journal) -> None:
        """Writes records that are added from now on to another journal."""

    def take_back(self, journal: Journal) -> bool:
        """Undoes `rotate`; returns False if records are in that journal already."""
        return True

    def adopt(self, journal: Journal) -> None:
        """Continues with a journal of an earlier `rotate`, now that a snapshot has everything before it."""

    def close(self) -> None:
        """Closes the journal."""


class Journaled(Commits):
    """`Commits` with a journal.

    Args:
        journal: The journal of the records after number `index`.
        sync: Whether a record is durable only when it is on the disk; otherwise when the kernel has it.
        before: Number and bytes of the records since the last snapshot that are in earlier journals.

    Attributes:
        records: Number of records since the last snapshot.
        error: Why the journal cannot be written; None if it can. Final for the journal, see `files`.
    """

    journals = True

    def __init__(self, journal: Journal, index: int, *, sync: bool, before: tuple[int, int] = (0, 0)) -> None:
        super().__init__(index)
        self.records, self._bytes_before = before
        self.error: OSError | None = None
        self._journal = journal
        self._sync = sync
        self._durable = index
        self._refusing = False  # logged already
        self._queue: deque[_Item] = deque()
        self._added = self._completed = 0
        self._writing = threading.Lock()

    @property
    def bytes(self) -> int:
        """Bytes of the records since the last snapshot, including queued ones."""
        return self._bytes_before + self._journal.size + sum(_estimated_bytes(item) for item in list(self._queue))

    def ready(self, records: int, elements: int, entries: int) -> None:
        """Reserves disk space in the journal that the next record goes to."""
        journal, end = self._end()
        try:
            if self.error:
                raise self.error.with_traceback(None)
            journal.reserve(end + records * record_bytes(elements, entries) + _SPARE_BYTES)
        except OSError as error:
            if not self._refusing:
                _log.warning("%s: cannot be written, pushes are refused: %s", journal.where, error.strerror)
            self._refusing = True
            raise StorageError(error.strerror or str(error)) from None
        if self._refusing:
            _log.warning("%s: can be written again, pushes are accepted", journal.where)
        self._refusing = False

    def add(self, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
        """Queues a record for the next `flush`."""
        self.index += 1
        self.records += 1
        self._put(Record(self.index, event, pieces))
        if done:
            self._put(_Release(done))

    def on_durable(self, effect: Effect) -> None:
        """Queues an effect for the next `flush`."""
        self._put(effect)

    def rotate(self, journal: Journal) -> None:
        """Queues the change to another journal."""
        self._put(_Rotation(journal, self.records, self._bytes_before))
        self.records = self._bytes_before = 0

    def take_back(self, journal: Journal) -> bool:
        """Removes a rotation from the queue."""
        with self._writing:
            for place, item in enumerate(list(self._queue)):
                if isinstance(item, _Rotation) and item.journal is journal:
                    self._queue[place] = _no_effect  # not deleted: `_completed` counts items
                    self.records += item.records
                    self._bytes_before += item.bytes_before
            return self._journal is not journal

    def flush(self) -> None:
        """Writes the queue, unless another thread has done so."""
        wanted = self._added  # what later threads add is theirs to flush
        if self._completed >= wanted:
            return
        with self._writing:
            if self._completed < wanted:
                self._flush(wanted)

    def adopt(self, journal: Journal) -> None:
        """Drops records that could not be written, since the snapshot has them, and continues with `journal`."""
        with self._writing:
            # Write what can be written: if this snapshot turns out to be corrupt, the earlier one and the journals
            # still lead here.
            with suppress(StorageError):
                self._flush(self._added)
            if not any(isinstance(item, _Rotation) and item.journal is journal for item in list(self._queue)):
                return  # the journal is in use already
            self.error = None
            while self._journal is not journal:
                self._complete_next()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keeps other threads from calling effects."""
        with self._writing:
            yield

    def close(self) -> None:
        """Closes the journal. Queued records are not written, their pieces are released, and effects are not called."""
        with self._writing:
            self.error = self.error or OSError(errno.ESHUTDOWN, "the model has ended")
            self._journal.close()
            for place, item in enumerate(list(self._queue)):
                if isinstance(item, _Rotation):
                    item.journal.close()
                elif isinstance(item, _Release):
                    self._queue[place] = _no_effect
                    item.effect()

    def _end(self) -> tuple[Journal, int]:
        """Returns the journal that the next record goes to, and its approximate offset there."""
        queued = 0
        for item in reversed(list(self._queue)):
            if isinstance(item, _Rotation):
                return item.journal, item.journal.size + queued
            queued += _estimated_bytes(item)
        return self._journal, self._journal.size + queued

    def _put(self, item: _Item) -> None:
        self._queue.append(item)
        self._added += 1

    def _flush(self, wanted: int) -> None:
        failpoint("journal.recorded")
        while self._completed < wanted:
            # One write and one fsync cover the items up to the next rotation.
            batch = list(self._queue)
            ends = [place for place, item in enumerate(batch, 1) if isinstance(item, _Rotation)]
            del batch[min(ends, default=len(batch)) :]
            records = [item for item in batch if isinstance(item, Record)]
            if records:
                if self.error:
                    raise StorageError(self.error.strerror or str(self.error))
                try:
                    self._journal.write(records, self._durable, sync=self._sync)
                except OSError as error:
                    self.error = error  # never retried on this file: see `files`
                    raise StorageError(error.strerror or str(error)) from error
                failpoint("journal.synced")
            for _ in batch:
                self._complete_next()

    def _complete_next(self) -> None:
        """Takes the next item off the queue and acts on it; records before it are durable."""
        item = self._queue.popleft()
        self._completed += 1
        if isinstance(item, Record):
            self._durable = item.index
        elif isinstance(item, _Rotation):
            previous, self._journal = self._journal, item.journal
            previous.close()
        else:
            try:
                (item.effect if isinstance(item, _Release) else item)()
            except Exception:  # the record stays durable although a caller cannot be notified
                _log.exception("an effect of a durable record failed")


def _estimated_bytes(item: _Item) -> int:
    """Returns about how long a record is; 0 for other items."""
    if not isinstance(item, Record):
        return 0
    match item.event:
        case Updated(summary=summary, absent=absent):
            entries = len(summary.hyperparameters) + len(absent)
        case Extended(tensors, groups):
            entries = extension_entries(tensors, groups)
        case Changed(settings):
            entries = len(settings.groups)
        case StatePut(counts):
            entries = len(counts)
        case _:
            entries = 0
    return record_bytes(sum(values.size for _, values in item.pieces), entries)


def extension_entries(tensors: Sequence[Tensor], groups: Sequence[Optimizer]) -> int:
    """Returns what `record_bytes` counts for an extension, whose record contains the tensors' names."""
    return _NAMED_ENTRIES * len(tensors) + len(groups)


def _no_effect() -> None:
    """Replaces a queued item that is no longer wanted."""
