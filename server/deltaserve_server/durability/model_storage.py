"""Keeps one model safe: when a snapshot is due, how it is taken, what the journal is."""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from deltaserve_server.durability import snapshot
from deltaserve_server.durability.commits import Commits, Journaled
from deltaserve_server.durability.folder import Folder, Head, Served, boot
from deltaserve_server.durability.journal import Journal, journal_name
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.memory import Frozen
from deltaserve_server.model.state import MachineState

_log = logging.getLogger(__name__)

_JOURNAL_STATES = 4.0
"""A journal is cut by a snapshot when it is so many times as long as one."""

_JOURNAL_BYTES = 64 << 20
"""But not before it has so many bytes."""

_JOURNAL_RECORDS = 4_000
"""Or so many records: they take time when a server comes back."""

_RETRY_SECONDS = 5.0
_REPAIR_SECONDS = 0.5


class Durability(StrEnum):
    """What survives the death of the server: nothing, the last snapshot, what a journal holds, also without power."""

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
        durability: What is to survive.
        updates: After so many updates; None means not for that reason.
        seconds: After so many seconds in which something happened; None likewise.
    """

    durability: Durability
    updates: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model at one moment.

    Attributes:
        model: All but its vectors.
        frozen: Its vectors.
        index: Of its last record.
    """

    model: MachineState
    frozen: Frozen
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """What a model's folder has of it.

    Attributes:
        head: What is known of it apart from its state.
        last: Its newest good snapshot.
        saved_index: Of the last record that is part of that.
        index: Of its last record.
        journal_bytes: Length of the records in between.
        hurry: Whether a newer snapshot is wanted at once.
    """

    head: Head
    last: Entry
    saved_index: int = 0
    index: int = 0
    journal_bytes: int = 0
    hurry: bool = False


class ModelStorage:
    """Keeps a model safe.

    Args:
        folder: Where.
        schedule: How, and when.
        kept: What is there.

    Raises:
        OSError: The folder cannot be written to.

    Attributes:
        folder: As above.
        commits: What is to be told when it is safe.
        head: As above, with how it is served.
        last: The newest snapshot.
    """

    def __init__(self, folder: Folder, schedule: Schedule, kept: StoredModel) -> None:
        self.last = kept.last
        self.folder = folder
        self._schedule = schedule
        self._number = folder.next_number() - 1
        self._saving = threading.Lock()
        self._begun = self._finished = 0
        self._saved_index = kept.saved_index
        self._saved_at = time.monotonic()
        self._retry_at = 0.0
        self._gone = False
        journal = self._new_journal()
        self._soon = kept.hurry or (journal is None and kept.index != kept.saved_index)
        self.commits = _commits(journal, kept, sync=schedule.durability is Durability.FSYNC)
        served = Served(schedule.durability.value, boot(), journal.number if journal else None)
        self.head = msgspec.structs.replace(kept.head, served=served)
        try:
            folder.write_head(self.head)
        except BaseException:
            if journal:
                journal.close()  # and not removed: the head may be there, and speaks of it
            raise

    @property
    def entries(self) -> list[Entry]:
        """The snapshots that are kept, oldest first."""
        return self.folder.entries()

    def durable_version(self, told: int) -> int:
        """Returns the newest version that would survive; `told` is the newest that anybody was told of."""
        return told if self.commits.journals else self.last.version

    def hurry(self) -> None:
        """Has a snapshot be due at once: something has changed that does not come again by itself."""
        self._soon = True

    def due(self, version: int) -> bool:
        """Returns whether it is time for a snapshot of a model that is at `version`."""
        now, commits, schedule = time.monotonic(), self.commits, self._schedule
        if now < self._retry_at:
            return False
        if isinstance(commits, Journaled) and commits.error:
            return True
        if commits.index == self._saved_index:
            return False
        return (
            self._soon
            or (schedule.updates is not None and version - self.last.version >= schedule.updates)
            or (schedule.seconds is not None and now - self._saved_at >= schedule.seconds)
            or (isinstance(commits, Journaled) and self._is_long(commits))
        )

    def save(self, cut: Callable[[Callable[[], None]], Checkpoint]) -> Entry:
        """Takes a snapshot; it is safe when this returns, as all is that had happened before the call.

        Many calls at a time are answered with few snapshots: one that was begun after a call serves it.

        Args:
            cut: Takes the model's image; calls what it is given at that moment, under the model's lock.

        Raises:
            OSError: It could not be written; there are those that were there before.
            Exception: Whatever `cut` raises.
        """
        asked = self._begun
        with self._saving:
            if self._gone:
                raise FileNotFoundError(errno.ENOENT, "the model has ended")
            if self._finished > asked:  # while this call waited
                return self.last
            return self._save(cut)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Waits for a snapshot that is being taken; if nothing is raised within, none is taken any more."""
        with self._saving:
            yield
            self._gone = True
            self.commits.close()

    def close(self, cut: Callable[[Callable[[], None]], Checkpoint]) -> None:
        """Ends in good order: takes a last snapshot, and says that nothing comes after it.

        Raises:
            OSError: It could not be written. What was told of is safe as before.
        """
        with self._saving:
            if self.commits.index != self._saved_index or self._is_broken():
                self._save(cut)
            self._gone = True
            self.commits.close()
            self.folder.write_head(msgspec.structs.replace(self.head, served=None))

    def _save(self, cut: Callable[[Callable[[], None]], Checkpoint]) -> Entry:
        began, soon, commits = time.monotonic(), self._soon, self.commits
        self._soon, journal = False, None
        self._begun += 1
        try:
            journal = self._new_journal()
            taken = cut(lambda: commits.rotate(journal) if journal else None)
            entry = self._written(taken, journal)
        except BaseException:
            self._soon = self._soon or soon
            self._retry_at = time.monotonic() + (_REPAIR_SECONDS if self._is_broken() else _RETRY_SECONDS)
            self._take_back(journal)
            raise
        if journal:
            commits.adopt(journal)
        self.last, self._saved_index, self._saved_at, self._finished = entry, taken.index, began, self._begun
        seconds = time.monotonic() - began
        _log.info("%s: snapshot %d of version %d, %.1f s", self._where, entry.number, entry.version, seconds)
        try:
            self.folder.tidy()
        except OSError as error:
            _log.warning("%s: old snapshots were not removed: %s", self._where, error)
        return entry

    def _written(self, taken: Checkpoint, journal: Journal | None) -> Entry:
        self._number += 1
        try:
            number, state = self._number, taken.frozen.state()
            follows = journal.number if journal else None
            return snapshot.write(self.folder.files, number, time.time(), taken.index, follows, taken.model, state)
        finally:
            taken.frozen.release()

    def _take_back(self, journal: Journal | None) -> None:
        """Removes the journal that was to follow a snapshot which failed: tried often, they would fill the disk."""
        # A manifest that has its name may be found after a crash: then it is this journal that must be written to.
        if journal and not self._may_be_found() and self.commits.take_back(journal):
            self._discard(journal)

    def _discard(self, journal: Journal | None) -> None:
        if journal:
            journal.close()
            with suppress(OSError):
                self.folder.files.remove(journal_name(journal.number))

    def _may_be_found(self) -> bool:
        try:
            return snapshot.manifest_name(self._number) in self.folder.files.names()
        except OSError:
            return True

    @property
    def _where(self) -> str:
        return f"model {self.folder.files.folder.name}"

    def _is_broken(self) -> bool:
        return isinstance(self.commits, Journaled) and self.commits.error is not None

    def _is_long(self, commits: Journaled) -> bool:
        """Whether the journal takes so much space, or its records so much time, that a snapshot is to cut it."""
        return commits.records >= _JOURNAL_RECORDS or commits.bytes >= max(
            _JOURNAL_STATES * self.last.bytes, _JOURNAL_BYTES
        )

    def _new_journal(self) -> Journal | None:
        if not self._schedule.durability.journals:
            return None
        self._number += 1
        return Journal(self.folder.files, self._number)


def _commits(journal: Journal | None, kept: StoredModel, *, sync: bool) -> Commits:
    if journal is None:
        return Commits(kept.index)
    before = kept.index - kept.saved_index, kept.journal_bytes
    return Journaled(journal, kept.index, sync=sync, before=before)
