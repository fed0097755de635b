"""A loss is refused until it is accepted, then never forgotten; a bad snapshot that was got over is none any more."""

import errno
import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from crowd import Crowd
from house import Clock, House, check_comes_back, check_same, copied, read, seen
from trouble import Crash, Trouble, crashing

from deltaserve_server.durability import directory, snapshot
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Ancestor, Folder
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Refused


class Lost(NamedTuple):
    """A data directory of a server that has died, with a bad file in it.

    Attributes:
        path: The data directory.
        name: The file.
        engine: The model as it was.
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
    """There are three journals; in the first, a record in the middle is bad."""
    path = quick / "data"
    house = House(path, "fsync")
    crowd = Crowd(house.create(), 3, clock)
    push(crowd, 6)
    house.die()
    house = House(path, "fsync")
    crowd = Crowd(house.restore(), 4, clock)
    push(crowd, 2)
    house.die()
    journal = path / "models" / "m" / "journal-00000002"
    flip(journal, len(journal.read_bytes().rstrip(b"\0")) * 2 // 3)
    return Lost(path, journal.name, crowd.engine)


def repaired(quick: Path, clock: Clock) -> tuple[Path, ModelEngine]:
    """The journal failed at a push, and a snapshot alone has what came of it."""
    path, trouble = quick / "data", Trouble()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "Files", trouble.files)
        house = House(path, "journal")
        crowd = Crowd(engine := house.create(), 5, clock)
        push(crowd, 3)
        trouble.errors["write"], trouble.only = errno.EIO, "journal"
        with pytest.raises(Refused, match="STORAGE_UNAVAILABLE"):
            crowd.push()
        trouble.lift()
        assert engine.save().version == 4
        house.die()
    return path, engine


def bad_repair(quick: Path, clock: Clock) -> Lost:
    """The journal failed at a push; the snapshot that made it safe is bad."""
    path, engine = repaired(quick, clock)
    tensors = max((path / "models" / "m").glob("*.safetensors"))
    flip(tensors, -3)
    return Lost(path, tensors.name, engine)


# --- a crash while a loss is being accepted


def accept(path: Path, at: int) -> bool:
    """Starts with the loss accepted; returns whether that was done before the crash."""
    house = House(path, "fsync")
    try:
        with crashing(at):
            house.restore(accept_data_loss=True)
    except Crash:
        return False
    finally:
        house.die()
    return True


def start(path: Path, lost: Lost) -> str:
    """Starts with nothing accepted; returns what came of it. A history that is shorter without a word is a failure."""
    house = House(path, "fsync")
    try:
        engine = house.restore()
    except CorruptError as error:
        if lost.name not in error.where:
            raise
        return "refused"
    finally:
        house.die()
    assert engine.machine.version < lost.engine.machine.version
    assert engine.head.lineage != lost.engine.head.lineage
    assert engine.head.knows(lost.engine.head.lineage)
    assert not engine.machine.sessions.live()
    return "a loss"


@pytest.mark.parametrize("lose", [bad_journal, bad_repair])
def test_a_crash_at_any_moment_of_accepting_a_loss_does_not_hide_it(
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


def test_a_server_that_dies_before_it_serves_what_was_accepted_has_told_of_the_loss(quick: Path, clock: Clock) -> None:
    lost = bad_journal(quick, clock)
    accepted = read(lost.path, accept_data_loss=True)
    house = House(lost.path, "fsync")
    came = house.restore()
    house.die()
    assert came.machine.version == accepted.version
    assert came.head.ancestors[-1].version == accepted.version
    assert start(lost.path, lost) == "a loss", "and what is served now is that"


# --- a snapshot that alone has what a journal could not take


def test_a_bit_that_flips_in_the_manifest_of_a_repair_is_refused_and_named(
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
def test_a_loss_that_was_accepted_is_not_to_be_accepted_again(quick: Path, clock: Clock, pushes: int) -> None:
    lost = bad_repair(quick, clock)
    assert start(lost.path, lost) == "refused"
    house = House(lost.path)
    accepted = house.restore(accept_data_loss=True)
    push(Crowd(accepted, 6, clock), pushes)
    house.die()
    house = House(lost.path)
    came = house.restore()
    house.die()
    assert came.head.ancestors[-1] == Ancestor(accepted.head.lineage, accepted.machine.version)
    check_comes_back(seen(came), accepted)


# --- a bad snapshot that was got over


def good_snapshots(path: Path) -> list[int]:
    """The snapshots of a model, each of which must be good."""
    folder = Folder(Files(path / "models" / "m"))
    for number in folder.snapshots():
        snapshot.read_state(folder.files, snapshot.read_manifest(folder.files, number), lambda _: None)
    return folder.snapshots()


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_after_a_bad_snapshot_two_good_ones_are_there_again_and_a_second_one_is_survived(
    quick: Path, clock: Clock, kind: str
) -> None:
    house = House(quick / "data")
    crowd = Crowd(house.create(), 8, clock)
    push(crowd, 3)
    crowd.save()
    push(crowd, 2)
    for seed in (9, 10):
        house.die()
        flip(max((quick / "data" / "models" / "m").glob(f"snapshot-*.{kind}")), -3)
        before, house = crowd.engine, House(quick / "data")
        engine = house.restore()
        check_same(seen(engine), seen(before))
        assert engine.is_due(), "another snapshot is wanted"
        crowd = Crowd(engine, seed, clock)
        push(crowd, 2)
        crowd.save()
        assert len(good_snapshots(quick / "data")) == 2
        push(crowd, 1)
    house.die()


def test_a_head_that_is_lost_ends_the_sessions(quick: Path, clock: Clock) -> None:
    """How the model was served is not known: whoever goes on might have weights that are lost."""
    path = quick / "data"
    house = House(path, "snapshot")
    crowd = Crowd(house.create(), 3, clock)
    push(crowd, 3)
    house.engines[0].save()
    push(crowd, 2)
    assert crowd.engine.machine.sessions.live()
    house.die()
    flip(path / "models" / "m" / "head.json", 5)
    house = House(path, "snapshot")
    with pytest.raises(CorruptError, match=r"head\.json"):
        house.restore()
    engine = house.restore(accept_data_loss=True)
    assert not engine.machine.sessions.live()
    assert engine.machine.version < crowd.engine.machine.version
    assert not engine.head.knows(crowd.engine.head.lineage)
    house.die()
