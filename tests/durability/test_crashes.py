"""G2, G4: a server recovers everything acknowledged from any state that a crash at any moment can leave.

DELTASERVE_FULL=1 tries tens of thousands of states.
"""

import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from boots import Boots
from crowd import Crowd
from disk import BROKEN, Disk, Op, RecordedFiles, RecordedPath, Recorder
from model_host import Clock, ModelHost, Seen, awaited, machine, optimizer_of

from deltaserve_server.durability import directory
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import State
from deltaserve_server.model import Async, Refused, Sync


class Acknowledged(NamedTuple):
    """From here on the record is acknowledged, and `durable` is reported as the newest version that survives."""

    record: int
    durable: int


class Saved(NamedTuple):
    """From here on a snapshot of this version is acknowledged."""

    version: int


class Story:
    """Calls to a model while every operation on its disk is recorded.

    Args:
        path: The data directory.
        durability: What must survive.
        clock: The time.
        seed: Seed of the random calls.

    Attributes:
        states: State of the model after each record.
    """

    def __init__(self, path: Path, durability: str, clock: Clock, seed: int = 0) -> None:
        self.path, self.durability = path, durability
        self.recorder = Recorder.current = Recorder()
        self.states: dict[int, Seen] = {}
        self.host = ModelHost(RecordedPath(path), durability)
        self.crowd = Crowd.__new__(Crowd)
        self._clock, self._seed = clock, seed

    def create(self) -> None:
        optimizer = optimizer_of(f"{self.durability} {self._seed}")
        self._begin(self.host.create(machine(policy=Async(), optimizer=optimizer)))
        self.act(self.crowd.open)

    def restore(self, states: dict[int, Seen]) -> None:
        """Recovers the model, whose earlier states are known."""
        engine = self.host.restore()
        self.states = {index: state for index, state in states.items() if index <= engine._commits.index}
        self._begin(engine)
        self.act(self.crowd.open)

    def _begin(self, engine: ModelEngine) -> None:
        self.engine = engine
        self.crowd.__init__(engine, self._seed, self._clock)  # type: ignore[misc]
        self.note()
        self.acknowledged()

    def note(self) -> None:
        """Records the present state."""
        self.states[self.engine._commits.index] = awaited(self.engine)

    def acknowledged(self) -> None:
        assert self.engine.storage
        self.recorder.log.append(
            Acknowledged(self.engine._commits.index, self.engine.storage.durable_version(self.engine.machine.version))
        )

    def push(self, times: int = 1) -> None:
        for _ in range(times):
            self.act(self.crowd.push)

    def act(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Refused as refusal:
            if refusal.reason == "INTERNAL":
                raise
            self.note()
            return
        self.note()
        self.acknowledged()

    def together(self, times: int) -> None:
        """Several pushes in one batch."""
        with self.engine.lock:
            for _ in range(times):
                with suppress(Refused):
                    self.crowd.push()
                self.note()
        self.acknowledged()

    def save(self) -> None:
        entry = self.engine.save()
        self.recorder.log.append(Saved(entry.version))
        self.acknowledged()

    def end(self) -> None:
        """Shuts down in order."""
        self.engine.close()
        self.host.die()

    def life(self) -> None:
        """Makes every kind of call."""
        self.create()
        self.push(4)
        self.together(3)
        self.act(self.crowd.extend)
        self.save()
        self.push(2)
        self.act(self.crowd.put_state)
        self.save()
        self.act(self.crowd.open)
        self.act(lambda: self.engine.change(self.engine.machine.groups, Sync()))
        self.push(2)
        self.together(2)
        self.act(self.crowd.close)
        self.save()
        self.push(2)


class Trials:
    """Recovers from states that a crash may leave.

    Args:
        folder: Place for data directories.
        boots: Restarts of the machine.
        samples: Number of states tried after each operation.
    """

    def __init__(self, folder: Path, boots: Boots, samples: float) -> None:
        self.counts: Counter[str] = Counter()
        self.boots = boots
        self._folder = folder
        self._samples = samples
        self._numbers = count()
        self._chance = random.Random(1)

    def enumerate(self, story: Story, start: Disk, *, power: bool, then: Callable[[Path, int, int], None]) -> None:
        """Applies the recorded operations one by one; after each, recovers from states that a crash may leave."""
        index = version = -1
        for op in story.recorder.log:
            if isinstance(op, Op):
                start.do(op)
            elif isinstance(op, Acknowledged):
                index = max(index, op.record)
                if not (
                    power and story.durability == "journal"
                ):  # journal: durable means that it survives a crash of the process alone
                    version = max(version, op.durable)
                continue
            else:
                version = max(version, op.version)
                continue
            for share in self._shares(power):
                left = start.leave(self._folder / f"left-{next(self._numbers)}", self._chance, share)
                try:
                    with self.boots.another(power):
                        then(left / "data", index, version)
                finally:
                    shutil.rmtree(left)

    def _shares(self, power: bool) -> Iterator[float]:
        if not power:
            yield 1
            return
        shares = [0.0, 1.0, 0.5, *(self._chance.choice((0.2, 0.5, 0.8, 0.95)) for _ in range(12))]
        whole = int(self._samples)
        yield from self._chance.sample(shares, whole + (self._chance.random() < self._samples - whole))


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Boots]:
    monkeypatch.setattr(directory, "Files", RecordedFiles)
    yield Boots(monkeypatch)
    Recorder.current = None


@pytest.fixture
def trials(quick: Path, boots: Boots, full: bool) -> Iterator[Trials]:
    made = Trials(quick, boots, 15 if full else 0.6)
    yield made
    print(f"\n{sum(made.counts.values())} states: {dict(made.counts)}")


def came_back(left: Path, durability: str) -> tuple[int, Seen] | None:
    """Recovers the model; returns the index of its last record and its state, or None if there is no model."""
    Recorder.current = Recorder()
    host = ModelHost(left, durability)
    try:
        if "m" not in host.directory.names():
            return None
        engine = host.restore()
        return engine._commits.index, awaited(engine)
    finally:
        host.die()


def judge(story: Story, counts: Counter[str], *, whole: bool) -> Callable[[Path, int, int], None]:
    """Returns a check of a recovered state.

    Args:
        story: The calls that were made.
        counts: Receives the outcomes.
        whole: Whether everything acknowledged must be there; otherwise the last snapshot.
    """

    def on_durable(left: Path, index: int, version: int) -> None:
        restored = came_back(left, story.durability)
        if restored is None:
            assert index < 0, "an acknowledged model is gone"
            counts["no model yet"] += 1
            return
        at, found = restored
        assert found.version >= version, f"version {version} was durable, {found.version} was recovered"
        if whole:
            assert at >= index, f"record {index} was acknowledged, {at} was recovered"
        if at not in story.states:  # the first record of a call that makes two
            counts["half of a call"] += 1
            return
        assert found.vectors == story.states[at].vectors
        if whole:
            assert found.image.splitlines() == story.states[at].image.splitlines()
        counts["all there" if at >= index else "the last snapshot"] += 1

    return on_durable


@pytest.mark.deep
@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
@pytest.mark.parametrize("durability", ["fsync", "journal", "snapshot"])
def test_a_crash_after_any_operation(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials, durability: str, power: bool, full: bool
) -> None:
    whole = durability == "fsync" or (durability == "journal" and not power)
    for seed in range(8 if full else 1):
        story = Story(quick / "data", durability, Clock(monkeypatch), seed)
        story.life()
        story.host.die()
        trials.enumerate(story, Disk(quick, empty=True), power=power, then=judge(story, trials.counts, whole=whole))
        shutil.rmtree(quick / "data")
    assert trials.counts["all there"] > 5


@pytest.mark.parametrize(("durability", "power"), [("fsync", True), ("journal", False), ("snapshot", False)])
def test_a_crash_during_a_few_pushes_and_a_snapshot(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials, durability: str, power: bool
) -> None:
    story = Story(quick / "data", durability, Clock(monkeypatch))
    story.create()
    story.push(2)
    story.together(2)
    story.save()
    story.push(1)
    story.host.die()
    whole = durability != "snapshot"
    trials.enumerate(story, Disk(quick, empty=True), power=power, then=judge(story, trials.counts, whole=whole))
    assert trials.counts["all there"] > 2


@pytest.mark.deep
@pytest.mark.parametrize("durability", ["fsync", "snapshot"])
def test_a_crash_during_an_orderly_shutdown(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials, durability: str
) -> None:
    story = Story(quick / "data", durability, Clock(monkeypatch))
    story.create()
    story.push(5)
    begun = len(story.recorder.log)
    story.end()
    disk = Disk(quick, empty=True)
    for op in story.recorder.log[:begun]:
        if isinstance(op, Op):
            disk.do(op)
    acknowledged = [op for op in story.recorder.log[:begun] if not isinstance(op, Op)]
    story.recorder.log[:begun] = acknowledged
    trials._samples = 6
    trials.enumerate(story, disk, power=True, then=judge(story, trials.counts, whole=durability == "fsync"))


@pytest.mark.deep
@pytest.mark.parametrize("durability", ["fsync", "journal"])
def test_a_crash_around_a_failed_fsync_that_a_snapshot_repairs(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials, durability: str
) -> None:
    story = Story(quick / "data", durability, Clock(monkeypatch))
    story.create()
    story.push(3)
    story.save()
    story.push(2)
    failing = "sync" if durability == "fsync" else "write"
    story.recorder.fails = lambda op: BROKEN if op.kind == failing and op.name.startswith("journal") else None
    with pytest.raises(Refused, match="STORAGE_UNAVAILABLE"):
        story.crowd.push()
    story.note()
    with pytest.raises(Refused, match="STORAGE_UNAVAILABLE"):
        story.crowd.push()
    story.recorder.fails = lambda _: None
    story.save()
    story.push(3)
    story.save()
    story.push(2)
    story.host.die()
    power = durability == "fsync"
    trials.enumerate(story, Disk(quick, empty=True), power=power, then=judge(story, trials.counts, whole=True))


@pytest.mark.deep
@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
def test_a_crash_during_recovery_from_a_crash(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials, power: bool, full: bool
) -> None:
    clock = Clock(monkeypatch)
    story = Story(quick / "data", "fsync", clock)
    story.life()
    story.host.die()
    chance = random.Random(3)
    trials._samples = 3 if full else 1

    def again(left: Path, index: int, version: int) -> None:
        if index < 0 or chance.random() < (0.5 if full else 0.9):
            return
        kept = shutil.copytree(left, quick / "kept" / "data").parent
        disk = Disk(kept)
        second = Story(kept / "data", "fsync", clock, 9)
        second.recorder.log.append(Acknowledged(index, version))
        second.restore(story.states)
        second.push(1)
        second.host.die()
        trials.enumerate(second, disk, power=power, then=judge(second, trials.counts, whole=True))
        shutil.rmtree(kept)

    trials.enumerate(story, Disk(quick, empty=True), power=power, then=again)


@pytest.mark.deep
@pytest.mark.parametrize("durability", ["fsync", "journal"])
def test_a_power_failure_after_a_process_crash_and_recovery(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials, durability: str, full: bool
) -> None:
    """Under fsync the second server has acknowledged records that the first one had not synced."""
    clock, chance = Clock(monkeypatch), random.Random(5)
    story = Story(quick / "data", durability, clock)
    story.create()
    story.push(2)
    story.together(3)
    story.save()
    story.push(2)
    story.recorder.fails = lambda op: BROKEN if op.kind == "sync" and op.name.startswith("journal") else None
    story.act(story.crowd.push)
    story.host.die()
    disk, acknowledged = Disk(quick, empty=True), Acknowledged(-1, -1)
    trials._samples = 8 if full else 2
    for number, op in enumerate(list(story.recorder.log)):
        if not isinstance(op, Op):
            acknowledged = op if isinstance(op, Acknowledged) else acknowledged
            continue
        disk.do(op)
        written = op.kind in ("write", "sync failed") and op.name.startswith("journal")
        if acknowledged.record < 0 or not (written or full or chance.random() < 0.1):
            continue
        kept = disk.leave(quick / f"kept-{number}", chance, 1)
        second = Story(kept / "data", "fsync", clock, 9)
        if durability == "fsync":
            second.recorder.log.append(acknowledged)
        second.restore(story.states)
        second.push(1)
        second.host.die()
        then = judge(second, trials.counts, whole=durability == "fsync")
        trials.enumerate(second, disk.moved(kept), power=True, then=then)
        shutil.rmtree(kept)
    assert trials.counts["all there"] > 20


def test_a_corrupt_snapshot_that_repaired_a_journal_is_not_skipped(
    quick: Path, monkeypatch: pytest.MonkeyPatch, boots: Boots
) -> None:
    """The journal lacks records that only this snapshot has."""
    story = Story(quick / "data", "fsync", Clock(monkeypatch))
    story.create()
    story.push(3)
    story.recorder.fails = lambda op: BROKEN if op.kind == "write" and op.name.startswith("journal") else None
    with pytest.raises(Refused, match="STORAGE_UNAVAILABLE"):
        story.crowd.push()
    story.recorder.fails = lambda _: None
    story.save()
    story.host.die()
    newest = max((quick / "data" / "models" / "m").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CorruptError, match=newest.name):
        came_back(quick / "data", "fsync")


def test_a_dropped_last_record_is_logged_after_a_power_failure(
    quick: Path, monkeypatch: pytest.MonkeyPatch, boots: Boots, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit in a record with zeros looks like a torn write."""
    story = Story(quick / "data", "fsync", Clock(monkeypatch))
    story.create()
    slots = tuple(np.zeros(117, np.float32) for _ in story.engine.machine.slots)
    story.act(lambda: story.engine.put_state(State(np.zeros(117, np.float32), slots), [0, 0, 0]))
    story.host.die()
    journal = max((quick / "data" / "models" / "m").glob("journal-*"))
    content = bytearray(journal.read_bytes())
    content[len(content.rstrip(b"\0")) - 1] ^= 1
    journal.write_bytes(content)
    with boots.another(True), caplog.at_level(logging.WARNING):
        came_back(quick / "data", "fsync")
    assert f"{journal}: record 2 is dropped: a power failure has torn it, or it was changed since" in caplog.text


def test_the_simulated_disk_loses_what_was_not_synced(quick: Path) -> None:
    disk, chance = Disk(quick, empty=True), random.Random(0)
    ops = [Op("create", str(quick), "a", 1), Op("write", file=1, offset=0, data=b"x" * 2048)]
    for op in ops:
        disk.do(op)

    def states(share: float) -> set[tuple[tuple[str, bytes], ...]]:
        found: set[Any] = set()
        for number in range(60):
            left = disk.leave(quick / f"{share}-{number}-{len(disk.files)}", chance, share)
            found.add(tuple((path.name, path.read_bytes()) for path in sorted(left.iterdir())))
            shutil.rmtree(left)
        return found

    assert states(0) == {()}
    assert states(1) == {(("a", b"x" * 2048),)}
    assert len(states(0.5)) > 10
    disk.do(Op("sync", file=1))
    assert states(0.5) == {(), (("a", b"x" * 2048),)}
    disk.do(Op("sync folder", str(quick)))
    assert states(0) == states(0.5) == states(1) == {(("a", b"x" * 2048),)}
    disk.do(Op("write", file=1, offset=512, data=b"y" * 512))
    disk.do(Op("sync failed", file=1))
    disk.do(Op("sync", file=1))
    torn = b"x" * 512 + b"y" * 512 + b"x" * 1024
    assert states(0.5) == {(("a", b"x" * 2048),), (("a", torn),)}, "an fsync that failed says nothing, for good"
