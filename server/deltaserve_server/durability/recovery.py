"""How a model comes back: its newest good snapshot, and then its journals, record by record."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from deltaserve._common.failpoints import failpoint
from deltaserve_server.durability import snapshot
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.folder import Folder, Head, Served
from deltaserve_server.durability.journal import END, Reading, journal_name
from deltaserve_server.durability.model_storage import StoredModel
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
from deltaserve_server.memory import Range, State, Store
from deltaserve_server.memory.store import Vector, zeros_like
from deltaserve_server.model import Layout, Machine

_log = logging.getLogger(__name__)

MakeStore = Callable[[Vector], Store]


@dataclass(kw_only=True)
class Recovered:
    """A model that came back.

    Attributes:
        machine: Its state machine, resumed.
        store: Its vectors.
        kept: What its folder has of it; under another lineage than before where something was lost, or may have been.
        waited: Whether the last thing that happened is a version for those who wait for one.
    """

    machine: Machine
    store: Store
    kept: StoredModel
    waited: bool


@dataclass
class _Found:
    """What is found while a model is read.

    Attributes:
        head: What its folder says.
        lost: Whether acknowledged updates may be missing.
        saved: Index of the last record that is part of any snapshot, be it a bad one.
        bad: By number: what is wrong with a snapshot.
    """

    head: Head
    lost: bool = False
    saved: int = 0
    bad: dict[int, CorruptError] = field(default_factory=dict)


class Expected(NamedTuple):
    """How much `recover` is going to read, about, and elements of the model that it is going to bring back, at least.

    The newest snapshot says so, and the journals that follow it; nothing does where that is bad.
    """

    bytes: int = 0
    elements: int = 0

    @classmethod
    def of(cls, folder: Folder) -> "Expected":
        """Returns what a folder lets expect."""
        files = folder.files
        for number in folder.snapshots()[-1:]:
            with suppress(CorruptError, OSError):
                manifest = snapshot.read_manifest(files, number)
                journals = (number for number in folder.journals() if number >= manifest.follows)
                size = manifest.bytes + sum(files.size(journal_name(number)) for number in journals)
                return cls(size, Layout(manifest.model.tensors).size)
        return cls()


def recover(
    folder: Folder, make_store: MakeStore, progress: Progress, *, accept_data_loss: bool, sync: bool
) -> Recovered:
    """Brings a model back.

    Args:
        folder: Where it is.
        make_store: Makes the place for its vectors, of the weights.
        progress: Is told how many further bytes were read.
        accept_data_loss: Whether to go on where a file is corrupt, with what comes before.
        sync: Whether what comes back is to be on the disk, since others are told that it is.

    Raises:
        CorruptError: A file is, and that is not accepted; or no snapshot is good.
        OSError: A file cannot be read.
    """
    folder.clear()
    found = _Found(_head(folder, accept_data_loss))
    manifest, state = _newest(folder, found, progress)
    failpoint("recovery.tensors")
    now = time.monotonic()
    machine = manifest.model.machine(now)
    # A vector of its own: the first one of a store is used again when another takes its place.
    store = make_store(zeros_like(state.weights))
    store.put(state, machine.version)
    replay = _Replay(machine, store, manifest.index, found.head.lost_at, now)
    _replay(folder, manifest, replay, found, progress, accept_data_loss=accept_data_loss, sync=sync)
    replay.end_sessions()
    if found.bad and manifest.journal is not None and replay.index < found.saved:
        # What could not be written to a journal was safe in the snapshot that is bad, and there alone.
        if not accept_data_loss:
            raise max(found.bad.items())[1]
        found.lost = True
    if _may_lack(found, manifest):
        found.lost = True
    head = found.head
    if found.lost:
        _log.warning(
            "model %s: goes on from version %d; what came after, if anything, is lost", machine.name, machine.version
        )
        folder.write_head(head.mark_uncertain())
        head = head.forked(machine.version, replay.index)
        machine.lose_sessions()
    for number in found.bad:  # it is none, neither for the next who comes back nor where two are to stay
        folder.files.rename(snapshot.manifest_name(number), f"{snapshot.manifest_name(number)}.corrupt")
    waited = machine.resume(time.monotonic())
    store.current.number = machine.version
    entry = Entry(manifest.number, manifest.model.version, manifest.bytes, manifest.taken_at)
    failpoint("recovery.done")
    return Recovered(
        machine=machine,
        store=store,
        kept=StoredModel(
            head=head,
            last=entry,
            saved_index=manifest.index,
            index=replay.index,
            journal_bytes=replay.bytes,
            hurry=bool(found.bad),
        ),
        waited=waited,
    )


def _head(folder: Folder, accept_data_loss: bool) -> Head:
    try:
        return folder.read_head()
    except CorruptError as error:
        if not accept_data_loss:
            raise
        _log.error("%s; workers take the model for another one", error)
        return Head.new().mark_uncertain()  # how it was served is not known: sessions must not go on


def _newest(folder: Folder, found: _Found, progress: Progress) -> tuple[Manifest, State]:
    """Returns the newest snapshot that is good."""
    for number in reversed(folder.snapshots()):
        try:
            manifest = snapshot.read_manifest(folder.files, number)
            failpoint("recovery.manifest")
            if manifest.model.name != folder.files.folder.name:
                where = str(folder.files.folder / snapshot.manifest_name(number))
                raise CorruptError(where, f"it is of model {manifest.model.name}")
            state = snapshot.read_state(folder.files, manifest, progress)
            found.saved = max(found.saved, manifest.index)
            return manifest, state
        except CorruptError as error:
            found.saved = max(found.saved, snapshot.recorded_index(folder.files, number))
            _log.error("corrupt snapshot, an older one is tried: %s", error)
            found.bad[number] = error
    if found.bad:
        raise max(found.bad.items())[1]
    raise CorruptError(str(folder.files.folder), "there is no snapshot in it")


def _may_lack(found: _Found, manifest: Manifest) -> bool:
    """Whether updates that somebody was told of may be missing, though all files that are there are good."""
    served = found.head.served
    if found.bad and manifest.journal is None:
        return True  # an older snapshot, and no journal that leads on from it
    if served is None or served.durability == "fsync":
        return False
    return served.durability != "journal" or served.lost_power


def _replay(
    folder: Folder,
    manifest: Manifest,
    replay: "_Replay",
    found: _Found,
    progress: Progress,
    *,
    accept_data_loss: bool,
    sync: bool,
) -> None:
    """Makes everything happen again that the journals hold; ends each where it was torn."""
    served = found.head.served
    lost_power = served is not None and served.lost_power
    begun = _begun(manifest, served)
    numbers = sorted({number for number in folder.journals() if number >= manifest.follows} | begun)
    # What nobody has synced is gone in any order when the power goes: no more was promised.
    may_end = accept_data_loss or (lost_power and served is not None and served.durability != "fsync")
    for place, number in enumerate(numbers):
        reading = Reading(folder.files, number, replay.index, lost_power=lost_power, begun=number in begun)
        before = 0
        try:
            for record in reading.records():
                try:
                    check_record(record, replay.machine)
                except InvalidRecord as error:
                    raise CorruptError(reading.where, f"record {record.index}: {error}") from None
                replay.redo(record)
                failpoint("recovery.replay")
                progress(reading.size - before)
                replay.bytes += reading.size - before
                before = reading.size
        except CorruptError as error:
            if not may_end:
                raise
            _log.error("%s; it ends at version %d", error, replay.machine.version)
            found.lost = True
            # Before anything is set aside: who comes back after a crash here must know of the loss too.
            found.head = found.head.mark_uncertain()
            folder.write_head(found.head)
            for bad in numbers[place:]:
                folder.set_aside(journal_name(bad), keep=reading.size if bad == number else 0)
            if sync and reading.size:
                folder.files.rewrite(journal_name(number), *reading.tail)
            return
        if reading.total != reading.size + len(END):
            # If that is lost, the next who comes back finds the same tear.
            folder.files.shorten(journal_name(number), reading.size, END, sync=False)
        if sync:
            folder.files.rewrite(journal_name(number), *reading.tail)
        progress(reading.total - before)


def _begun(manifest: Manifest, served: Served | None) -> set[int]:
    """Returns the numbers of journals that must be there after a snapshot, though its server has died."""
    if served is None or served.journal is None:  # it kept none, or ended in good order
        return set()
    known = manifest.journal, served.journal
    return {number for number in known if number is not None and number >= manifest.follows}


class _Replay:
    """Makes a model's records happen again.

    Args:
        machine: The model as its snapshot has it.
        store: Its vectors, likewise.
        index: Of the last record that is part of the snapshot.
        lost_at: See `Head`.
        now: The time.

    Attributes:
        machine: As above.
        index: Of the last record that happened again.
        bytes: How many the records have that did.
    """

    def __init__(self, machine: Machine, store: Store, index: int, lost_at: int | None, now: float) -> None:
        self.machine = machine
        self.index = index
        self.bytes = 0
        self._store = store
        self._lost_at = lost_at
        self._now = now

    def end_sessions(self) -> None:
        """Ends all sessions where an earlier recovery has done so."""
        if self.index == self._lost_at:
            self.machine.lose_sessions()

    def redo(self, record: Record) -> None:
        """Makes a record happen again."""
        machine, event = self.machine, record.event
        self.end_sessions()
        match event:
            case Updated():
                self._update(event, record)
            case Opened(image):
                machine.sessions.restore(image.session({}, self._now))
            case Ended(ids):
                machine.sessions.end(ids)
            case Changed(settings, waits):
                machine.replay_change(settings.groups, settings.policy, waits)
            case VersionBumped(version):
                machine.replay_version_bump(version)
                self._store.current.number = version
            case StatePut(counts):
                weights, square_avg, acc_delta = (values.astype(np.float32) for _, values in record.pieces)
                machine.put_state(counts)
                self._store.put(State(weights, square_avg, acc_delta), machine.version)
            case Extended(tensors, groups):
                self._store.extend(np.concatenate([np.empty(0, np.float32), *(v for _, v in record.pieces)]))
                machine.extend(tensors, groups)
        self.index = record.index

    def _update(self, event: Updated, record: Record) -> None:
        staging = self._store.stage()
        for offset, values in record.pieces:
            staging.add(offset, values)
        self._store.fold(staging, 1.0)
        ranges = list(_ranges(self.machine, event))
        self._store.update(ranges, event.divisor, event.summary.version)
        self.machine.replay_update(event.summary, event.absent, event.sources, self._now)


def _ranges(machine: Machine, event: Updated) -> Iterator[Range]:
    for start, stop, group in machine.layout.groups(event.absent):
        yield Range(start, stop, event.summary.hyperparameters[group])
