"""A corrupt file stops the server until the operator accepts the loss; an accepted loss is not forgotten."""

import errno
import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from crowd import Crowd
from model_host import Clock, ModelHost, check_comes_back, check_same, copied, read, seen
from trouble import Crash, Trouble, crashing

from deltaserve_server.durability import directory, snapshot
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Ancestor, Folder
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Refused


class Lost(NamedTuple):
    """The data directory of a killed server, with a corrupt file.

    Attributes:
        path: The data directory.
        name: The corrupt file.
        engine: The model before the kill.
    """

    path: Path
    name: str
    engine: ModelEngine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def push(crowd: Crowd, times: int) -> None:
    for _ in range(times):
        crowd.push()


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def bad_journal(quick: Path, clock: Clock) -> Lost:
    """Three journals; a record in the middle of the first is corrupt."""
    path = quick / "data"
    host = ModelHost(path, "fsync")
    crowd = Crowd(host.create(), 3, clock)
    push(crowd, 6)
    host.die()
    host = ModelHost(path, "fsync")
    crowd = Crowd(host.restore(), 4, clock)
    push(crowd, 2)
    host.die()
    journal = path / "models" / "m" / "journal-00000002"
    flip(journal, len(journal.read_bytes().rstrip(b"\0")) * 2 // 3)
    return Lost(path, journal.name, crowd.engine)


def repaired(quick: Path, clock: Clock) -> tuple[Path, ModelEngine]:
    """A push could not be journaled; only a snapshot has its update."""
    path, trouble = quick / "data", Trouble()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "Files", trouble.files)
        host = ModelHost(path, "journal")
        crowd = Crowd(engine := host.create(), 5, clock)
        push(crowd, 3)
        trouble.errors["write"], trouble.only = errno.EIO, "journal"
        with pytest.raises(Refused, match="STORAGE_UNAVAILABLE"):
            crowd.push()
        trouble.lift()
        assert engine.save().version == 4
        host.die()
    return path, engine


def bad_repair(quick: Path, clock: Clock) -> Lost:
    """A push could not be journaled; the only snapshot with its update is corrupt."""
    path, engine = repaired(quick, clock)
    tensors = max((path / "models" / "m").glob("*.safetensors"))
    flip(tensors, -3)
    return Lost(path, tensors.name, engine)


# --- a crash while a loss is accepted


def accept(path: Path, at: int) -> bool:
    """Starts with --accept-data-loss; returns False if the server crashed first."""
    host = ModelHost(path, "fsync")
    try:
        with crashing(at):
            host.restore(accept_data_loss=True)
    except Crash:
        return False
    finally:
        host.die()
    return True


def start(path: Path, lost: Lost) -> str:
    """Starts without accepting a loss; returns "refused" or "a loss". A silent loss fails the test."""
    host = ModelHost(path, "fsync")
    try:
        engine = host.restore()
    except CorruptError as error:
        if lost.name not in error.where:
            raise
        return "refused"
    finally:
        host.die()
    assert engine.machine.version < lost.engine.machine.version
    assert engine.head.lineage != lost.engine.head.lineage
    assert engine.head.knows(lost.engine.head.lineage)
    assert not engine.machine.sessions.live()
    return "a loss"


@pytest.mark.parametrize("lose", [bad_journal, bad_repair])
def test_a_crash_while_a_loss_is_accepted_does_not_hide_it(
    quick: Path, clock: Clock, lose: Callable[[Path, Clock], Lost]
) -> None:
    lost, outcomes = lose(quick, clock), Counter[str]()
    for at in count():
        left = copied(lost.path, quick / "left")
        finished = accept(left, at)
        outcomes[start(left, lost)] += 1
        if finished:
            break
    assert outcomes["refused"] >= 1, "before anything was done"
    assert outcomes["a loss"] >= 5


def test_a_crash_before_serving_keeps_an_accepted_loss_recorded(quick: Path, clock: Clock) -> None:
    lost = bad_journal(quick, clock)
    accepted = read(lost.path, accept_data_loss=True)
    host = ModelHost(lost.path, "fsync")
    restored = host.restore()
    host.die()
    assert restored.machine.version == accepted.version
    assert restored.head.ancestors[-1].version == accepted.version
    assert start(lost.path, lost) == "a loss", "and what is served now is that"


# --- a snapshot that has updates which the journal lacks


def test_a_flipped_bit_in_the_manifest_of_a_repairing_snapshot_stops_the_server(
    quick: Path, clock: Clock, full: bool
) -> None:
    path, engine = repaired(quick, clock)
    manifest, chance = max((path / "models" / "m").glob("snapshot-*.json")), random.Random(7)
    good = manifest.read_bytes()
    assert read(copied(path, quick / "copy")).version == engine.machine.version == 4
    for at in range(len(good)) if full else chance.sample(range(len(good)), 60):
        flip(manifest, at, chance.randrange(8))
        with pytest.raises(CorruptError, match=manifest.name):
            read(path)
        manifest.write_bytes(good)


@pytest.mark.parametrize("pushes", [0, 2])
def test_a_loss_is_accepted_once(quick: Path, clock: Clock, pushes: int) -> None:
    lost = bad_repair(quick, clock)
    assert start(lost.path, lost) == "refused"
    host = ModelHost(lost.path)
    accepted = host.restore(accept_data_loss=True)
    push(Crowd(accepted, 6, clock), pushes)
    host.die()
    host = ModelHost(lost.path)
    restored = host.restore()
    host.die()
    assert restored.head.ancestors[-1] == Ancestor(accepted.head.lineage, accepted.machine.version)
    check_comes_back(seen(restored), accepted)


# --- a corrupt snapshot with a good one before it


def good_snapshots(path: Path) -> list[int]:
    """Returns the numbers of the snapshots; fails if one is corrupt."""
    folder = Folder(Files(path / "models" / "m"))
    for number in folder.snapshots():
        snapshot.read_state(folder.files, snapshot.read_manifest(folder.files, number), lambda _: None)
    return folder.snapshots()


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_corrupt_snapshot_is_replaced_before_it_can_hurt(quick: Path, clock: Clock, kind: str) -> None:
    host = ModelHost(quick / "data")
    crowd = Crowd(host.create(), 8, clock)
    push(crowd, 3)
    crowd.save()
    push(crowd, 2)
    for seed in (9, 10):
        host.die()
        flip(max((quick / "data" / "models" / "m").glob(f"snapshot-*.{kind}")), -3)
        before, host = crowd.engine, ModelHost(quick / "data")
        engine = host.restore()
        check_same(seen(engine), seen(before))
        assert engine.is_due(), "another snapshot is wanted"
        crowd = Crowd(engine, seed, clock)
        push(crowd, 2)
        crowd.save()
        assert len(good_snapshots(quick / "data")) == 2
        push(crowd, 1)
    host.die()


def test_a_lost_head_ends_the_sessions(quick: Path, clock: Clock) -> None:
    """How the model was served is unknown, so its sessions may know lost weights."""
    path = quick / "data"
    host = ModelHost(path, "snapshot")
    crowd = Crowd(host.create(), 3, clock)
    push(crowd, 3)
    host.engines[0].save()
    push(crowd, 2)
    assert crowd.engine.machine.sessions.live()
    host.die()
    flip(path / "models" / "m" / "head.json", 5)
    host = ModelHost(path, "snapshot")
    with pytest.raises(CorruptError, match=r"head\.json"):
        host.restore()
    engine = host.restore(accept_data_loss=True)
    assert not engine.machine.sessions.live()
    assert engine.machine.version < crowd.engine.machine.version
    assert not engine.head.knows(crowd.engine.head.lineage)
    host.die()
