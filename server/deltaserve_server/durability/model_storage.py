"""Keeps one model durable: decides when a snapshot is due, takes it, and starts a new journal with it."""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import msgspec

from deltaserve_server.durability import snapshot
from deltaserve_server.durability.commits import Commits, Journaled
from deltaserve_server.durability.folder import Folder, Head, Served, boot
from deltaserve_server.durability.journal import Journal, journal_name
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.memory import Frozen
from deltaserve_server.model.state import MachineState

_log = logging.getLogger(__name__)

_JOURNAL_STATES_MAX = 4.0
_JOURNAL_BYTES_MIN = 64 << 20
_JOURNAL_RECORDS_MAX = 4_000
"""A snapshot is due when the journal is longer than that many snapshots, but at least this many bytes; or has that many
records, because replaying small records takes time rather than space."""

_RETRY_SECONDS = 5.0
_REPAIR_SECONDS = 0.5
"""Shorter than the retry: while the journal is broken, pushes are refused until a snapshot succeeds."""


class Clock(Protocol):
    """The time; the module `time` is one."""

    def monotonic(self) -> float:
        """Returns seconds that only grow."""

    def time(self) -> float:
        """Returns seconds since 1970, UTC."""


class Durability(StrEnum):
    """What survives the death of the server process.

    NONE: nothing. SNAPSHOT: the last snapshot. JOURNAL: every acknowledged push, unless the machine crashes. FSYNC:
    every acknowledged push.
    """

    NONE = "none"
    SNAPSHOT = "snapshot"
    JOURNAL = "journal"
    FSYNC = "fsync"

    @property
    def journals(self) -> bool:
        """Whether there is a journal."""
        return self in (Durability.JOURNAL, Durability.FSYNC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When snapshots are taken.

    Attributes:
        durability: What must survive.
        updates: Number of updates between snapshots; None for no such limit.
        seconds: Seconds between snapshots, if the model changes; None for no such limit.
    """

    durability: Durability
    updates: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A consistent view of a model at one moment.

    Attributes:
        model: The state without its vectors.
        frozen: The vectors; later updates do not change them.
        index: Index of the last record that the view includes.
    """

    model: MachineState
    frozen: Frozen
    index: int


TakeCheckpoint = Callable[[Callable[[], None]], Checkpoint]
"""Takes a checkpoint under the model's lock, and calls its argument under the same lock: it rotates the journal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """What the folder of a model contains.

    Attributes:
        head: The head, of the lineage that is about to begin.
        last: The newest good snapshot.
        saved_index: Index of the last record in that snapshot.
        index: Index of the last record.
        journal_bytes: Bytes of the records in between.
        snapshot_wanted: Whether a new snapshot is due at once.
    """

    head: Head
    last: Entry
    saved_index: int = 0
    index: int = 0
    journal_bytes: int = 0
    snapshot_wanted: bool = False


class ModelStorage:
    """Keeps a model durable.

    The constructor starts the first journal and then writes the head. The new lineage is therefore on the disk before
    anybody hears of it.

    Raises:
        OSError: The folder cannot be written.

    Attributes:
        head: The head as written.
        last: The newest snapshot.
    """

    def __init__(self, folder: Folder, schedule: Schedule, stored: StoredModel, clock: Clock = time) -> None:
        self.last = stored.last
        self.folder = folder
        self._schedule = schedule
        self._clock = clock
        self._number = folder.next_number() - 1  # snapshots and journals count together
        self._saving = threading.Lock()
        self._started = self._finished = 0  # snapshots
        self._saved_index = stored.saved_index
        self._saved_at = clock.monotonic()
        self._retry_at = 0.0
        self._closed = False
        journal = self._new_journal()
        # Without a journal nothing but a snapshot keeps what an earlier server had journaled.
        self._snapshot_wanted = stored.snapshot_wanted or (journal is None and stored.index != stored.saved_index)
        self.commits = Commits(stored.index)
        if journal:
            sync, before = schedule.durability is Durability.FSYNC, stored.index - stored.saved_index
            self.commits = Journaled(journal, stored.index, sync=sync, before=(before, stored.journal_bytes))
        served = Served(schedule.durability.value, boot(), journal.number if journal else None)
        self.head = msgspec.structs.replace(stored.head, served=served, inode=folder.inode)
        try:
            folder.write_head(self.head)
        except BaseException:
            if journal:
                journal.close()  # not removed: the head may be on the disk, and it names this journal
            raise

    @property
    def entries(self) -> list[Entry]:
        """The snapshots, oldest first."""
        return self.folder.entries()

    def durable_version(self, notified: int) -> int:
        """Returns the newest version that would survive a crash; `notified` is the newest that anybody knows of."""
        return notified if self.commits.journals else self.last.version

    def request_snapshot(self) -> None:
        """Makes a snapshot due at once: the model has changed in a way that its workers would not repeat."""
        self._snapshot_wanted = True

    def due(self, version: int) -> bool:
        """Returns whether a snapshot is due for a model at `version`."""
        now, commits, schedule = self._clock.monotonic(), self.commits, self._schedule
        if now < self._retry_at:
            return False
        if self._is_broken():
            return True
        if commits.index == self._saved_index:
            return False
        journal_bytes = max(_JOURNAL_STATES_MAX * self.last.bytes, _JOURNAL_BYTES_MIN)
        return (
            self._snapshot_wanted
            or (schedule.updates is not None and version - self.last.version >= schedule.updates)
            or (schedule.seconds is not None and now - self._saved_at >= schedule.seconds)
            or (isinstance(commits, Journaled) and commits.records >= _JOURNAL_RECORDS_MAX)
            or (isinstance(commits, Journaled) and commits.bytes >= journal_bytes)
        )

    def save(self, take_checkpoint: TakeCheckpoint) -> Entry:
        """Takes a snapshot; when this returns, everything that had happened before the call is durable.

        Concurrent calls share snapshots: a call returns the result of one that started after it.

        Raises:
            OSError: The snapshot was not written. Earlier snapshots are unchanged.
            Exception: Whatever `take_checkpoint` raises.
        """
        started_before = self._started
        with self._saving:
            if self._closed:
                raise FileNotFoundError(errno.ENOENT, "the model has ended")
            if self._finished > started_before:  # another call's snapshot started after this call
                return self.last
            return self._save(take_checkpoint)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Waits for a snapshot that is being taken, and closes the storage when the block ends without an error."""
        with self._saving:
            yield
            self._closed = True
            self.commits.close()

    def close(self, take_checkpoint: TakeCheckpoint) -> None:
        """Takes a last snapshot and marks the head as cleanly stopped.

        Raises:
            OSError: The snapshot or the head could not be written. Everything that was durable before still is.
        """
        with self._saving:
            if self.commits.index != self._saved_index or self._is_broken():
                self._save(take_checkpoint)
            self._closed = True
            self.commits.close()
            # Last: until then a crash must look for the journal.
            self.folder.write_head(msgspec.structs.replace(self.head, served=None))

    def _save(self, take_checkpoint: TakeCheckpoint) -> Entry:
        began, wanted, commits = self._clock.monotonic(), self._snapshot_wanted, self.commits
        self._snapshot_wanted, journal = False, None
        self._started += 1
        try:
            # Before the checkpoint: creating a file may block, and the checkpoint holds the model's lock.
            journal = self._new_journal()
            checkpoint = take_checkpoint(lambda: commits.rotate(journal) if journal else None)
            entry = self._write(checkpoint, journal)
        except BaseException:
            self._snapshot_wanted = self._snapshot_wanted or wanted
            self._retry_at = self._clock.monotonic() + (_REPAIR_SECONDS if self._is_broken() else _RETRY_SECONDS)
            self._take_back(journal)
            raise
        if journal:
            commits.adopt(journal)
        self.last, self._saved_index, self._saved_at, self._finished = entry, checkpoint.index, began, self._started
        seconds = self._clock.monotonic() - began
        model = self.folder.files.folder.name
        _log.info("model %s: wrote snapshot %d of version %d in %.1f s", model, entry.number, entry.version, seconds)
        try:
            self.folder.tidy()
        except OSError as error:
            _log.warning("model %s: old snapshots were not removed: %s", model, error)
        return entry

    def _write(self, checkpoint: Checkpoint, journal: Journal | None) -> Entry:
        self._number += 1
        try:
            return snapshot.write(
                self.folder.files,
                self._number,
                self._clock.time(),
                checkpoint.index,
                journal.number if journal else None,
                checkpoint.model,
                checkpoint.frozen.state(),
            )
        finally:
            checkpoint.frozen.release()  # updates copy what they overwrite as long as it is held

    def _take_back(self, journal: Journal | None) -> None:
        """Removes the journal that was to continue a failed snapshot: repeated attempts would fill the disk.

        A manifest that has its name may be found after a crash, although its last sync failed. It names the new
        journal as the one that continues it, so later records must go there.
        """
        files = self.folder.files
        with suppress(OSError):
            if (
                journal
                and snapshot.manifest_name(self._number) not in files.names()
                and self.commits.take_back(journal)
            ):
                journal.close()
                files.remove(journal_name(journal.number))

    def _is_broken(self) -> bool:
        """Returns whether the journal failed: only a snapshot can then make anything durable."""
        return isinstance(self.commits, Journaled) and self.commits.error is not None

    def _new_journal(self) -> Journal | None:
        if not self._schedule.durability.journals:
            return None
        self._number += 1
        return Journal(self.folder.files, self._number)
