"""Copies of snapshots at another place: what is put back from them says that it is older, and is of the right model."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import fsspec
import pytest
from crowd import Crowd
from house import Clock, House, Seen, check_same, seen

from deltaserve_server.durability import copies as room
from deltaserve_server.durability.copies import Copies
from deltaserve_server.durability.folder import HEAD, Ancestor
from deltaserve_server.service.applier import Applier

DURABILITIES = ("snapshot", "journal", "fsync")


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, quick: Path) -> Iterator[str]:
    """Where the copies are."""
    if request.param == "file":
        yield (quick / "copies").as_uri()
        return
    yield "memory://copies"
    fsspec.filesystem("memory").rm("/copies", recursive=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def copy(url: str, applier: Applier) -> None:
    """Copies a model's newest snapshot; returns when that is done."""
    assert applier.keeper
    copies = Copies(url)
    copies.offer("m", applier.keeper.folder, applier.keeper.last.number)
    copies.close(20.0)


def names(url: str, folder: str = "") -> list[str]:
    """What there is in the folder of models, or in one of them."""
    system, root = fsspec.core.url_to_fs(f"{url}/models/{folder}".rstrip("/"))
    return sorted(str(path).rsplit("/", 1)[-1] for path in system.ls(root, detail=False))


def snapshot_files(*numbers: int) -> list[str]:
    """What a folder with these snapshots holds."""
    kinds = ("json", "safetensors")
    return [HEAD, *(f"snapshot-{number:08}.{kind}" for number in numbers for kind in kinds)]


def put_back(url: str, path: Path) -> Path:
    """Makes a data directory of copies."""
    system, root = fsspec.core.url_to_fs(url)
    system.get(root, str(path), recursive=True)
    return path


def push_and_save(crowd: Crowd, pushes: int) -> Seen:
    """Makes some updates and a snapshot; returns what the model is."""
    for _ in range(pushes):
        crowd.push()
    crowd.save()
    return seen(crowd.applier)


def end(house: House, applier: Applier) -> None:
    """Ends a model in good order."""
    assert applier.keeper
    applier.keeper.close(applier._cut)
    house.directory.close()


# --- a copy is older than what somebody may know


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_copy_that_is_put_back_goes_on_under_another_lineage_and_without_its_sessions(
    quick: Path, clock: Clock, url: str, durability: str
) -> None:
    house = House(quick / "data", durability)
    crowd = Crowd(applier := house.create(), 1, clock)
    saved = push_and_save(crowd, 3)
    assert applier.machine.sessions.live()
    copy(url, applier)
    crowd.push()
    house.die()
    again = House(put_back(url, quick / "back"), durability)
    came = again.restore()
    again.die()
    assert (came.machine.version, seen(came).vectors) == (saved.version, saved.vectors)
    assert came.head.lineage != applier.head.lineage
    assert came.head.ancestors == (Ancestor(applier.head.lineage, saved.version),)
    assert not came.machine.sessions.live()


def test_so_does_one_of_a_model_that_has_ended_in_good_order(quick: Path, clock: Clock, url: str) -> None:
    """Whoever puts it back may do so after the model has gone on from where it ended."""
    house = House(quick / "data", "fsync")
    crowd = Crowd(applier := house.create(), 2, clock)
    crowd.push()
    end(house, applier)
    copy(url, applier)
    again = House(put_back(url, quick / "back"), "fsync")
    came = again.restore()
    again.die()
    assert came.machine.version == applier.machine.version == 1
    assert came.head.lineage != applier.head.lineage
    assert came.head.knows(applier.head.lineage)


def test_a_copy_that_was_put_back_goes_on_like_any_other_model(quick: Path, clock: Clock, url: str) -> None:
    house = House(quick / "data")
    crowd = Crowd(applier := house.create(), 3, clock)
    push_and_save(crowd, 2)
    copy(url, applier)
    house.die()
    again = House(put_back(url, quick / "back"))
    crowd = Crowd(came := again.restore(), 4, clock)
    push_and_save(crowd, 2)
    copy(url, came)
    crowd.push()
    again.die()
    assert names(url) == ["m"], "its lineage is known: the copies are of one model"
    once_more = House(quick / "back")
    last = once_more.restore()
    once_more.die()
    assert (last.machine.version, last.head.lineage) == (5, came.head.lineage)


# --- copies of another model


def test_two_copies_are_kept(quick: Path, clock: Clock, url: str) -> None:
    house = House(quick / "data")
    crowd = Crowd(applier := house.create(), 5, clock)
    numbers: list[int] = []
    for _ in range(4):
        push_and_save(crowd, 1)
        copy(url, applier)
        assert applier.keeper
        numbers.append(applier.keeper.last.number)
        assert names(url, "m") == snapshot_files(*numbers[-2:])
    house.die()


def test_copies_of_a_model_that_was_deleted_are_moved_aside_for_the_next_one_of_its_name(
    quick: Path, clock: Clock, url: str
) -> None:
    house = House(quick / "data")
    crowd = Crowd(old := house.create(), 6, clock)
    for _ in range(4):
        push_and_save(crowd, 2)
        copy(url, old)
    kept = names(url, "m")
    house.directory.remove("m")
    crowd = Crowd(new := house.create(seed=99), 7, clock)
    wanted = push_and_save(crowd, 1)
    copy(url, new)
    house.die()
    aside = f".m.{old.head.lineage.hex()}"
    assert names(url) == [aside, "m"]
    assert names(url, aside) == kept
    assert new.keeper
    assert names(url, "m") == snapshot_files(new.keeper.last.number)
    again = House(put_back(url, quick / "back"))
    assert again.directory.names() == ["m"]
    came = again.restore()
    again.die()
    assert (came.machine.version, seen(came).vectors) == (wanted.version, wanted.vectors)
    assert came.head.knows(new.head.lineage)


def test_copies_that_nobody_can_tell_whose_they_are_are_moved_aside(quick: Path, clock: Clock, url: str) -> None:
    house = House(quick / "data")
    crowd = Crowd(applier := house.create(), 8, clock)
    push_and_save(crowd, 2)
    copy(url, applier)
    kept = names(url, "m")
    system, root = fsspec.core.url_to_fs(url)
    system.pipe_file(f"{root}/models/m/{HEAD}", b"nonsense")
    wanted = push_and_save(crowd, 1)
    copy(url, applier)
    house.die()
    aside, name = names(url)
    assert (aside[:3], name) == (".m.", "m")
    assert names(url, aside) == kept
    again = House(put_back(url, quick / "back"))
    came = again.restore()
    again.die()
    check_same(seen(came)._replace(image=""), wanted._replace(image=""))


# --- a place that refuses


def test_what_the_place_for_copies_does_not_find_is_told_and_tried_again(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An object store without the bucket, for instance: the snapshot is there all the same."""
    house = House(quick / "data")
    push_and_save(Crowd(applier := house.create(), 9, clock), 1)
    monkeypatch.setattr(room, "_RETRY_SECONDS", (0.01, 0.01, 0.01))
    copies = Copies(url)
    really, refusals = copies._system.put_file, [1, 2]

    def put_file(*given: object) -> None:
        if refusals:
            refusals.pop()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "bucket")
        really(*given)

    monkeypatch.setattr(copies._system, "put_file", put_file)
    assert applier.keeper
    number = applier.keeper.last.number
    with caplog.at_level("INFO", room.__name__):
        copies.offer("m", applier.keeper.folder, number)
        _wait(lambda: "is at" in caplog.text)
    copies.close(20.0)
    house.die()
    assert caplog.text.count(f"snapshot {number} of model m was not copied: ") == 2
    assert names(url, "m") == snapshot_files(number)


@pytest.mark.parametrize("gone", ["snapshot", "model"])
def test_a_snapshot_that_is_gone_by_then_is_no_trouble(
    quick: Path, clock: Clock, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    house = House(quick / "data")
    crowd = Crowd(applier := house.create(), 10, clock)
    assert applier.keeper
    first = applier.keeper.last.number
    for _ in range(2):
        push_and_save(crowd, 1)
    if gone == "model":
        house.directory.remove("m")
    copies = Copies((quick / "copies").as_uri())
    copies.offer("m", applier.keeper.folder, first)
    copies.close(20.0)
    house.die()
    assert caplog.text == ""


def _wait(happened: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not happened():
        assert monotonic() < end, "it did not happen within 20 s"
        sleep(0.01)
