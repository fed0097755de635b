"""Brings a model back after a start of the server: from its newest good snapshot and the journals that continue it.

    read the head -> read the newest good snapshot -> replay the journals -> decide what is lost -> repair the files
    -> begin a new lineage

Nothing in the folder changes before the decision. A crash during recovery therefore leaves either the same folder or
one whose head says that versions may be lost.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from deltaserve._common.failpoints import failpoint
from deltaserve._common.optimizers import Optimizer
from deltaserve_server.durability import snapshot
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Folder, Head, Served
from deltaserve_server.durability.journal import END, JournalReader, journal_name
from deltaserve_server.durability.model_storage import Clock, Durability, StoredModel
from deltaserve_server.durability.records import (
    Changed,
    Ended,
    Extended,
    Opened,
    Record,
    StatePut,
    Updated,
    VersionBumped,
)
from deltaserve_server.durability.snapshot import Entry, Manifest, Progress
from deltaserve_server.durability.validation import InvalidRecord, check_record
from deltaserve_server.memory import Range, State, Store, initial_state
from deltaserve_server.memory.store import joined
from deltaserve_server.model import Layout, Machine

_log = logging.getLogger(__name__)

MakeStore = Callable[[State, Optimizer], Store]


@dataclass(kw_only=True)
class Recovered:
    """A model that was recovered.

    Attributes:
        stored: What its folder contains, with the head of the new lineage, which is not written yet.
        version_bumped: Whether resuming incremented the version, for workers that wait for it. The caller must journal
            that.
    """

    machine: Machine
    store: Store
    stored: StoredModel
    version_bumped: bool


class Expected(NamedTuple):
    """An estimate, before recovery: bytes that it will read, and elements and slots that the model will have.

    All are 0 if the newest snapshot is corrupt.
    """

    bytes: int = 0
    elements: int = 0
    slots: int = 0

    @classmethod
    def of(cls, folder: Folder) -> "Expected":
        """Returns the estimate for a folder."""
        files = folder.files
        for number in folder.snapshots()[-1:]:
            with suppress(CorruptError, OSError):
                manifest = snapshot.read_manifest(files, number)
                journals = (number for number in folder.journals() if number >= manifest.first_journal)
                size = manifest.bytes + sum(files.size(journal_name(number)) for number in journals)
                model = manifest.model
                return cls(size, Layout(model.tensors).size, len(model.settings.groups[0].slots))
        return cls()


def recover(
    folder: Folder,
    make_store: MakeStore,
    progress: Progress,
    *,
    accept_data_loss: bool,
    sync: bool,
    clock: Clock = time,
) -> Recovered:
    """Recovers a model.

    Args:
        folder: The model's folder.
        make_store: Creates the model's store from its state, which it may keep, and one of its optimizers.
        progress: Receives the number of bytes read since its last call.
        accept_data_loss: Whether to continue with what is good if a file is corrupt.
        sync: Whether everything recovered must be on the disk when this returns.
        clock: The time.

    Raises:
        CorruptError: A file is corrupt and data loss is not accepted, or no snapshot is good.
        OSError: A file cannot be read or written.
    """
    folder.clear()  # first: unfinished files may fill the disk
    head = _read_head(folder, accept_data_loss)
    found = _read_newest_snapshot(folder, progress)
    manifest = found.manifest
    failpoint("recovery.tensors")

    machine = manifest.model.machine(clock.monotonic())
    store = make_store(found.state, machine.groups[0])
    replayer = JournalReplayer(folder.files, machine, store, manifest.index, head, clock.monotonic())
    present = {number for number in folder.journals() if number >= manifest.first_journal}
    must_exist = _must_exist(manifest, head.served)
    replayer.replay(sorted(present | must_exist), must_exist, progress)

    loss = assess_loss(
        head.served,
        lost_power=replayer.lost_power,
        journal_error=replayer.error,
        snapshot_error=found.corrupt[max(found.corrupt)] if found.corrupt else None,
        has_journal=manifest.journal is not None,
        is_complete=replayer.index >= found.last_index,
    )
    if loss.refusal and not accept_data_loss:
        raise loss.refusal
    if loss.possible:
        if replayer.error:
            _log.error("%s; the journal is set aside from there on", replayer.error)
        text = "model %s: continues from version %d; later versions, if there were any, are lost, and all sessions end"
        _log.warning(text, machine.name, machine.version)
        # Before any repair: a start that finds the repaired files after a crash must know of the loss as well.
        folder.write_head(head.mark_uncertain())
        machine.lose_sessions()
    elif head.inode not in (None, folder.inode):
        text = (
            "model %s: %s is a copy, perhaps restored from a backup; the model continues from version %d, and workers "
            "that have later versions of the original get RolledBackError"
        )
        _log.warning(text, machine.name, folder.files.folder, machine.version)
    _repair(folder, replayer, found.corrupt, sync=sync)
    stored = StoredModel(
        head=head.next_lineage(machine.version, lost_at=replayer.index if loss.possible else None),
        last=Entry(manifest.number, manifest.model.version, manifest.bytes, manifest.taken_at),
        saved_index=manifest.index,
        index=replayer.index,
        journal_bytes=replayer.bytes,
        snapshot_wanted=bool(found.corrupt),
    )
    version_bumped = machine.resume(clock.monotonic())
    store.current.number = machine.version
    failpoint("recovery.done")
    return Recovered(machine=machine, store=store, stored=stored, version_bumped=version_bumped)


# --- reading


class _Snapshot(NamedTuple):
    """The newest good snapshot of a folder.

    Attributes:
        corrupt: Newer snapshots that are corrupt, by number, with what is wrong.
        last_index: Index of the last record that any snapshot includes, corrupt ones among them.
    """

    manifest: Manifest
    state: State
    corrupt: Mapping[int, CorruptError]
    last_index: int


def _read_head(folder: Folder, accept_data_loss: bool) -> Head:
    try:
        return folder.read_head()
    except CorruptError as error:
        if not accept_data_loss:
            raise
        _log.error("%s; the model gets a new lineage that no worker knows", error)
        return Head.new().mark_uncertain()  # how the model was served is unknown: its sessions must end


def _read_newest_snapshot(folder: Folder, progress: Progress) -> _Snapshot:
    corrupt: dict[int, CorruptError] = {}
    last_index = 0
    for number in reversed(folder.snapshots()):
        try:
            manifest = snapshot.read_manifest(folder.files, number)
            failpoint("recovery.manifest")
            if manifest.model.name != folder.files.folder.name:
                where = str(folder.files.folder / snapshot.manifest_name(number))
                raise CorruptError(where, f"it belongs to model {manifest.model.name}")
            state = snapshot.read_state(folder.files, manifest, progress)
            return _Snapshot(manifest, state, corrupt, max(last_index, manifest.index))
        except CorruptError as error:
            _log.error("corrupt snapshot, trying the one before: %s", error)
            last_index = max(last_index, snapshot.last_index_of_corrupt(folder.files, number))
            corrupt[number] = error
    if corrupt:
        raise corrupt[max(corrupt)]
    raise CorruptError(str(folder.files.folder), "it contains no snapshot")


def _must_exist(manifest: Manifest, served: Served | None) -> set[int]:
    """Returns the numbers of journals that exist if the last server crashed: manifest and head name them."""
    if served is None or served.journal is None:
        return set()
    named = manifest.journal, served.journal
    return {number for number in named if number is not None and number >= manifest.first_journal}


# --- replay


class JournalReplayer:
    """Replays journals: applies their records to a machine and its store, through the same kernel as at first.

    Machine, store and index are those of the snapshot at first; `now` is the time for leases.

    Attributes:
        index: Index of the last record replayed.
        bytes: Length of the records replayed.
        journals: The readers of the journals read so far, by number, in order. Each stays open: repairs need its bytes.
        error: Why the last of these journals ends early; None if it is good.
        lost_power: Whether the machine may have restarted since the journals were written.
        unread: Numbers of the journals after it.
    """

    def __init__(self, files: Files, machine: Machine, store: Store, index: int, head: Head, now: float) -> None:
        self.machine = machine
        self.index = index
        self.bytes = 0
        self.journals: dict[int, JournalReader] = {}
        self.error: CorruptError | None = None
        self.unread: Sequence[int] = ()
        self.lost_power = head.served is not None and head.served.lost_power
        self._files = files
        self._store = store
        self._lost_at = head.lost_at
        self._now = now

    def replay(self, numbers: Sequence[int], must_exist: set[int], progress: Progress) -> None:
        """Replays journals, up to the first error."""
        for place, number in enumerate(numbers):
            journal = JournalReader(
                self._files, number, self.index, lost_power=self.lost_power, must_exist=number in must_exist
            )
            self.journals[number] = journal
            try:
                self._replay_journal(journal, progress)
            except CorruptError as error:
                self.error, self.unread = error, numbers[place + 1 :]
                break
        self._end_lost_sessions()

    def _replay_journal(self, journal: JournalReader, progress: Progress) -> None:
        before = 0
        for record in journal.records():
            try:
                check_record(record, self.machine)
            except InvalidRecord as error:
                raise CorruptError(journal.where, f"record {record.index}: {error}") from None
            self._end_lost_sessions()  # before the record: it followed the loss
            self._apply(record)
            self.index = record.index
            failpoint("recovery.replay")
            self.bytes += journal.size - before
            progress(journal.size - before)
            before = journal.size
        progress(journal.file_bytes - before)

    def _end_lost_sessions(self) -> None:
        """Ends all sessions at the record at which an earlier recovery ended them."""
        if self.index == self._lost_at:
            self.machine.lose_sessions()

    def _apply(self, record: Record) -> None:
        machine, event = self.machine, record.event
        match event:
            case Updated(summary=summary):
                staging = self._store.stage()
                for offset, values in record.pieces:
                    staging.add(offset, values)
                self._store.fold(staging, 1.0)
                machine.replay_update(summary, event.absent, event.sources, self._now)
                # With the counts that include this update, as at first: some optimizers depend on them.
                parts = machine.layout.ranges(event.absent, summary.hyperparameters, machine.update_counts)
                self._store.update([Range(*part) for part in parts], event.divisor, summary.version)
            case Opened(session):
                machine.sessions.restore(session.session({}, self._now))
            case Ended(ids):
                machine.sessions.end(ids)
            case Changed(settings, waits):
                machine.replay_change(settings.groups, settings.policy, waits)
            case VersionBumped(version):
                machine.replay_version_bump(version)
                self._store.current.number = version
            case StatePut(counts):
                weights, *slots = (joined(values) for _, values in record.pieces)
                machine.put_state(counts)
                self._store.put(State(weights, tuple(slots)), machine.version)
            case Extended(tensors, groups):
                weights = joined(*(values for _, values in record.pieces))
                machine.extend(tensors, groups)
                self._store.extend(initial_state(weights, Layout(tensors), machine.groups))


# --- the decision


class Loss(NamedTuple):
    """Whether versions are lost that somebody may have seen.

    Attributes:
        possible: Whether versions are lost, or may be.
        refusal: The damage that lost acknowledged versions, which the operator must accept; None if there is none.
    """

    possible: bool
    refusal: CorruptError | None = None


def assess_loss(
    served: Served | None,
    *,
    lost_power: bool,
    journal_error: CorruptError | None,
    snapshot_error: CorruptError | None,
    has_journal: bool,
    is_complete: bool,
) -> Loss:
    """Decides whether versions are lost.

    Args:
        served: How the model was served; None after an orderly shutdown.
        lost_power: Whether the machine may have restarted since.
        journal_error: Why the journals end early; None if they are good.
        snapshot_error: What is wrong with the newest snapshot; None if it is good.
        has_journal: Whether a journal continues the snapshot used.
        is_complete: Whether recovery reached every record that any snapshot includes, corrupt ones among them.
    """
    durability = served.durability if served else Durability.FSYNC
    if journal_error and not (lost_power and durability != Durability.FSYNC):
        return Loss(True, journal_error)
    if snapshot_error and has_journal and not is_complete:
        # The snapshot repaired a broken journal: it alone has the records that the journal lacks.
        return Loss(True, snapshot_error)
    # Without fsync, a power failure leaves any part of the last records: an early end is a loss, and no damage.
    survives = durability == Durability.FSYNC or (durability == Durability.JOURNAL and not lost_power)
    return Loss(not survives or (snapshot_error is not None and not has_journal))


# --- after the decision


def _repair(folder: Folder, replayer: JournalReplayer, corrupt: Mapping[int, CorruptError], *, sync: bool) -> None:
    """Makes the files agree with what was recovered, so that the next start finds the same."""
    files, journals = folder.files, list(replayer.journals.items())
    if replayer.error:
        number, journal = journals[-1]
        folder.set_aside(journal_name(number), keep_bytes=journal.size)
        for unread in replayer.unread:
            folder.set_aside(journal_name(unread), keep_bytes=0)
    for number, journal in journals:
        is_corrupt = replayer.error is not None and number == journals[-1][0]
        if not is_corrupt and journal.file_bytes != journal.size + len(END):
            # Removes a torn record. Not synced: if this is lost, the next start finds the same torn record.
            files.shorten(journal_name(number), journal.size, END, sync=False)
        if sync and (journal.size or not is_corrupt):
            # The last batch may be in the page cache alone: its server died before its fsync, or the fsync failed.
            files.rewrite(journal_name(number), *journal.last_batch)
    for number in corrupt:  # no longer counts as one of the two snapshots that are kept
        files.rename(snapshot.manifest_name(number), f"{snapshot.manifest_name(number)}.corrupt")
