"""What a model has done and not yet told: records that wait to be safe, and what is to be told when they are.

There is no thread for it. Whoever brings an event writes, after it, all that waits, in one go and with one fsync; who
comes meanwhile waits for that, and mostly finds its own record written (group commit).
"""

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability.journal import Journal, record_bytes
from deltaserve_server.durability.records import Changed, Event, Extended, Piece, Record, StatePut, Updated
from deltaserve_server.model import Hyperparameters, Tensor

_log = logging.getLogger(__name__)

Effect = Callable[[], None]

_NAMED_ENTRIES = 6
"""How many entries of `record_bytes` a tensor counts for where its record has its name and shape."""

_SPARE_BYTES = 1 << 18
"""For records without a vector."""


class StorageError(Exception):
    """A journal cannot be written to; the text says why."""


class _Switch(NamedTuple):
    """From here on another journal is written to; with what was counted before."""

    journal: Journal
    records: int
    bytes_before: int


class _Done(NamedTuple):
    """The record before needs its pieces no more."""

    release: Effect


_Item = Record | Effect | _Done | _Switch


class Commits:
    """What a model's owner tells. Here nothing waits: without a journal everything is told at once.

    `add`, `then` and `ready` are called by whoever owns the model, `settle` by whoever does not.

    Args:
        index: Of the last record before.

    Attributes:
        index: Of the last record.
        journals: Whether there is a journal.
    """

    journals = False

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def ready(self, records: int, elements: int, entries: int) -> None:
        """Sees to it that so many records can be written; see `record_bytes`.

        Raises:
            StorageError: They cannot.
        """

    def add(self, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
        """Takes note of what happened; `done` is called when the pieces are not needed any more."""
        self.index += 1
        if done:
            done()

    def on_durable(self, effect: Effect) -> None:
        """Has `effect` called when all that happened so far is safe."""
        effect()

    def flush(self) -> None:
        """Returns when all that happened so far is safe, and told.

        Raises:
            StorageError: That cannot be said.
        """

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keeps effects from being called meanwhile; here it is the model's owner who calls them."""
        yield

    def rotate(self, journal: Journal) -> None:
        """Has what happens from now on written to another journal."""

    def take_back(self, journal: Journal) -> bool:
        """Takes that back; returns whether it is possible."""
        return True

    def adopt(self, journal: Journal) -> None:
        """Goes on with that journal, all that happened before being safe in a snapshot."""

    def close(self) -> None:
        """Ends it."""


class Journaled(Commits):
    """`Commits` with a journal.

    Args:
        journal: To write to.
        index: Of the last record before.
        sync: Whether a record is safe when it is on the disk; otherwise when the system has it.
        before: Records, and bytes, of the journals since the last snapshot that are written to no more.

    Attributes:
        records: How many were added since the last snapshot.
        error: Why nothing can be written; None where it can.
    """

    journals = True

    def __init__(self, journal: Journal, index: int, *, sync: bool, before: tuple[int, int] = (0, 0)) -> None:
        super().__init__(index)
        self.records, self._bytes_before = before
        self.error: OSError | None = None
        self._journal = journal
        self._sync = sync
        self._safe = index
        self._refusing = False
        self._waiting: deque[_Item] = deque()
        self._added = self._settled = 0
        self._writing = threading.Lock()

    @property
    def bytes(self) -> int:
        """Length of the journals since the last snapshot, with what waits."""
        return self._bytes_before + self._journal.size + sum(_bytes(i) for i in list(self._waiting))

    def ready(self, records: int, elements: int, entries: int) -> None:
        """Sets space aside."""
        try:
            if self.error:
                raise self.error.with_traceback(None)
            journal, end = self._end()
            journal.reserve(end + records * record_bytes(elements, entries) + _SPARE_BYTES)
        except OSError as error:
            if not self._refusing:
                _log.warning("%s: pushes are refused until they can be written there: %s", self._journal.where, error)
            self._refusing = True
            raise StorageError(error.strerror or str(error)) from None
        if self._refusing:
            _log.warning("%s: it can be written to again", journal.where)
        self._refusing = False

    def add(self, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
        """Has it written with the next `settle`."""
        self.index += 1
        self.records += 1
        self._put(Record(self.index, event, pieces))
        if done:
            self._put(_Done(done))

    def on_durable(self, effect: Effect) -> None:
        """Has it called with the next `settle`."""
        self._put(effect)

    def rotate(self, journal: Journal) -> None:
        """Has what happens from now on written to another journal."""
        self._put(_Switch(journal, self.records, self._bytes_before))
        self.records = self._bytes_before = 0

    def take_back(self, journal: Journal) -> bool:
        """Goes on with the journal before one that was to be switched to; returns whether that is still possible."""
        with self._writing:
            for place, item in enumerate(list(self._waiting)):
                if isinstance(item, _Switch) and item.journal is journal:
                    self._waiting[place] = _nothing  # others count on its place
                    self.records += item.records
                    self._bytes_before += item.bytes_before
            return self._journal is not journal

    def flush(self) -> None:
        """Writes what waits, unless somebody does, and calls the effects."""
        wanted = self._added
        if self._settled >= wanted:
            return
        with self._writing:
            if self._settled < wanted:
                self._flush(wanted)

    def adopt(self, journal: Journal) -> None:
        """Goes on with a journal that was switched to, all that happened before being safe in a snapshot."""
        with self._writing:
            # What can be written is: should this snapshot turn out bad, the one before it and the journals lead here.
            with suppress(StorageError):
                self._flush(self._added)
            if not any(isinstance(item, _Switch) and item.journal is journal for item in list(self._waiting)):
                return  # it is written to already
            self.error = None
            while self._journal is not journal:
                self._next()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keeps whoever writes from calling effects meanwhile."""
        with self._writing:
            yield

    def close(self) -> None:
        """Ends the journal: whatever still waits is not written, nobody is told of it, and its pieces are let go."""
        with self._writing:
            self.error = self.error or OSError(errno.ESHUTDOWN, "the model has ended")
            self._journal.close()
            for place, item in enumerate(list(self._waiting)):
                if isinstance(item, _Switch):
                    item.journal.close()
                elif isinstance(item, _Done):
                    self._waiting[place] = _nothing
                    item.release()

    def _end(self) -> tuple[Journal, int]:
        """Returns the journal that the next record goes to, and where, about."""
        waiting = 0
        for item in reversed(list(self._waiting)):
            if isinstance(item, _Switch):
                return item.journal, item.journal.size + waiting
            waiting += _bytes(item)
        return self._journal, self._journal.size + waiting

    def _put(self, item: _Item) -> None:
        self._waiting.append(item)
        self._added += 1

    def _flush(self, wanted: int) -> None:
        failpoint("journal.recorded")
        while self._settled < wanted:
            batch = list(self._batch())
            records = [item for item in batch if isinstance(item, Record)]
            if records:
                self._write(records)
            for _ in batch:
                self._next()

    def _next(self) -> None:
        """Does what the next item stands for, what was recorded before it being safe."""
        item = self._waiting.popleft()
        self._settled += 1
        if isinstance(item, Record):
            self._safe = item.index
        elif isinstance(item, _Switch):
            before, self._journal = self._journal, item.journal
            before.close()
        else:
            try:
                (item.release if isinstance(item, _Done) else item)()
            except Exception:  # what is written stays so, whoever cannot be told
                _log.exception("somebody was not told")

    def _batch(self) -> Iterator[_Item]:
        """Yields what can be written in one go: up to where another journal begins."""
        for item in list(self._waiting):
            yield item
            if isinstance(item, _Switch):
                return

    def _write(self, records: Sequence[Record]) -> None:
        if self.error:
            raise StorageError(self.error.strerror or str(self.error))
        try:
            self._journal.write(records, self._safe, sync=self._sync)
        except OSError as error:
            self.error = error
            raise StorageError(error.strerror or str(error)) from error
        failpoint("journal.synced")


def _bytes(item: _Item) -> int:
    """Returns how long a record is, about; nothing for anything else."""
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


def extension_entries(tensors: Sequence[Tensor], groups: Sequence[Hyperparameters]) -> int:
    """Returns what `record_bytes` counts for an extension, whose record has the tensors' names."""
    return _NAMED_ENTRIES * len(tensors) + len(groups)


def _nothing() -> None:
    """Stands where something was that is not wanted any more."""
