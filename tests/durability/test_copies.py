"""Copies of snapshots at another place: what is put back from them says that it is older, and is of the right model."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import fsspec
import pytest
from crowd import Crowd
from house import Clock, House, Seen, check_same, seen

from deltaserve_server.durability import copies as room
from deltaserve_server.durability.copies import Copies
from deltaserve_server.durability.folder import HEAD, Ancestor
from deltaserve_server.engine.model_engine import ModelEngine

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


def copy(url: str, engine: ModelEngine) -> None:
    """Copies a model's newest snapshot; returns when that is done."""
    assert engine.storage
    copies = Copies(url)
    copies.offer("m", engine.storage.folder)
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
    return seen(crowd.engine)


def end(house: House, engine: ModelEngine) -> None:
    """Ends a model in good order."""
    assert engine.storage
    engine.storage.close(engine._checkpoint)
    house.directory.close()


# --- a copy is older than what somebody may know


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_copy_that_is_put_back_goes_on_under_another_lineage_and_without_its_sessions(
    quick: Path, clock: Clock, url: str, durability: str
) -> None:
    house = House(quick / "data", durability)
    crowd = Crowd(engine := house.create(), 1, clock)
    saved = push_and_save(crowd, 3)
    assert engine.machine.sessions.live()
    copy(url, engine)
    crowd.push()
    house.die()
    again = House(put_back(url, quick / "back"), durability)
    came = again.restore()
    again.die()
    assert (came.machine.version, seen(came).vectors) == (saved.version, saved.vectors)
    assert came.head.lineage != engine.head.lineage
    assert came.head.ancestors == (Ancestor(engine.head.lineage, saved.version),)
    assert not came.machine.sessions.live()


def test_so_does_one_of_a_model_that_has_ended_in_good_order(quick: Path, clock: Clock, url: str) -> None:
    """Whoever puts it back may do so after the model has gone on from where it ended."""
    house = House(quick / "data", "fsync")
    crowd = Crowd(engine := house.create(), 2, clock)
    crowd.push()
    end(house, engine)
    copy(url, engine)
    again = House(put_back(url, quick / "back"), "fsync")
    came = again.restore()
    again.die()
    assert came.machine.version == engine.machine.version == 1
    assert came.head.lineage != engine.head.lineage
    assert came.head.knows(engine.head.lineage)


def test_a_copy_that_was_put_back_goes_on_like_any_other_model(quick: Path, clock: Clock, url: str) -> None:
    house = House(quick / "data")
    crowd = Crowd(engine := house.create(), 3, clock)
    push_and_save(crowd, 2)
    copy(url, engine)
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
    crowd = Crowd(engine := house.create(), 5, clock)
    numbers: list[int] = []
    for _ in range(4):
        push_and_save(crowd, 1)
        copy(url, engine)
        assert engine.storage
        numbers.append(engine.storage.last.number)
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
    assert new.storage
    assert names(url, "m") == snapshot_files(new.storage.last.number)
    again = House(put_back(url, quick / "back"))
    assert again.directory.names() == ["m"]
    came = again.restore()
    again.die()
    assert (came.machine.version, seen(came).vectors) == (wanted.version, wanted.vectors)
    assert came.head.knows(new.head.lineage)


def test_copies_that_nobody_can_tell_whose_they_are_are_moved_aside(quick: Path, clock: Clock, url: str) -> None:
    house = House(quick / "data")
    crowd = Crowd(engine := house.create(), 8, clock)
    push_and_save(crowd, 2)
    copy(url, engine)
    kept = names(url, "m")
    system, root = fsspec.core.url_to_fs(url)
    system.pipe_file(f"{root}/models/m/{HEAD}", b"nonsense")
    wanted = push_and_save(crowd, 1)
    copy(url, engine)
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
    push_and_save(Crowd(engine := house.create(), 9, clock), 1)
    monkeypatch.setattr(room, "_RETRY_SECONDS", (0.01, 0.01, 0.01))
    copies = Copies(url)
    really, refusals = copies._system.put_file, [1, 2]

    def put_file(*given: object) -> None:
        if refusals:
            refusals.pop()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "bucket")
        really(*given)

    monkeypatch.setattr(copies._system, "put_file", put_file)
    assert engine.storage
    number = engine.storage.last.number
    with caplog.at_level("INFO", room.__name__):
        copies.offer("m", engine.storage.folder)
        _wait(lambda: "is at" in caplog.text)
    copies.close(20.0)
    house.die()
    assert caplog.text.count("the newest snapshot of model m was not copied: ") == 2
    assert names(url, "m") == snapshot_files(number)


def test_a_model_that_is_gone_by_then_is_no_trouble(
    quick: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(quick / "data")
    push_and_save(Crowd(engine := house.create(), 10, clock), 1)
    house.directory.remove("m")
    copies = Copies((quick / "copies").as_uri())
    assert engine.storage
    copies.offer("m", engine.storage.folder)
    copies.close(20.0)
    house.die()
    assert caplog.text == ""


def test_a_place_that_is_slower_than_snapshots_come_has_whole_ones(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being copied stays here until it is, whatever comes after it; the next is the newest by then."""
    house = House(quick / "data")
    crowd = Crowd(engine := house.create(), 11, clock)
    copies = Copies(url)
    really, waits, go_on = copies._system.put_file, threading.Event(), threading.Event()

    def put_file(*given: object) -> None:
        waits.set()
        assert go_on.wait(20)
        really(*given)

    monkeypatch.setattr(copies._system, "put_file", put_file)
    assert engine.storage
    numbers: list[int] = []
    for _ in range(4):
        push_and_save(crowd, 1)
        numbers.append(engine.storage.last.number)
        copies.offer("m", engine.storage.folder)
        assert waits.wait(20)
    assert engine.storage.folder.snapshots() == [numbers[0], *numbers[-2:]]
    go_on.set()
    copies.close(20.0)
    push_and_save(crowd, 1)
    assert engine.storage.folder.snapshots() == [numbers[-1], engine.storage.last.number]
    house.die()
    assert names(url, "m") == snapshot_files(numbers[0], numbers[-1])


def test_what_is_there_already_is_not_written_again(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop copies the last snapshot, which is likely to be there; if it is broken off, what was whole stays so."""
    house = House(quick / "data")
    push_and_save(Crowd(engine := house.create(), 12, clock), 1)
    copy(url, engine)
    system, _ = fsspec.core.url_to_fs(url)
    written: list[object] = []
    monkeypatch.setattr(type(system), "put_file", lambda *given, **_: written.append(given))
    copy(url, engine)
    house.die()
    assert not written
    assert engine.storage
    assert names(url, "m") == snapshot_files(engine.storage.last.number)


@pytest.mark.parametrize("broken", ["tensors", "manifest"])
def test_a_copy_that_is_broken_off_is_none_and_is_removed_with_the_next(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    house = House(quick / "data")
    crowd = Crowd(engine := house.create(), 13, clock)
    wanted = push_and_save(crowd, 1)
    copy(url, engine)
    assert engine.storage
    first = engine.storage.last.number
    push_and_save(crowd, 1)
    system, _ = fsspec.core.url_to_fs(url)
    method = {"tensors": "put_file", "manifest": "mv"}[broken]
    really = getattr(type(system), method)

    def breaks_off(place: Any, one: str, other: str, **options: object) -> None:
        if HEAD in other:
            really(place, one, other, **options)
        elif broken == "tensors":
            place.pipe_file(other, Path(one).read_bytes()[:100])
            raise OSError(errno.EPIPE, "gone")
        else:
            raise OSError(errno.EPIPE, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(room, "_RETRY_SECONDS", ())
        patch.setattr(type(system), method, breaks_off)
        copy(url, engine)
    again = House(put_back(url, quick / "back"))
    came = again.restore()
    again.die()
    assert (came.machine.version, seen(came).vectors) == (wanted.version, wanted.vectors)
    push_and_save(crowd, 1)
    copy(url, engine)
    house.die()
    assert names(url, "m") == snapshot_files(first, engine.storage.last.number)


def test_copies_of_a_course_that_was_left_make_way_for_those_of_the_present_one(
    quick: Path, clock: Clock, url: str
) -> None:
    """As where the data directory is put back from an older image of it: numbers are given again."""
    house = House(quick / "data")
    crowd = Crowd(engine := house.create(), 14, clock)
    push_and_save(crowd, 1)
    older = shutil.copytree(quick / "data", quick / "older")
    for _ in range(5):
        push_and_save(crowd, 1)
        copy(url, engine)
    house.die()
    again = House(older)
    crowd = Crowd(came := again.restore(), 15, clock)
    wanted = push_and_save(crowd, 3)
    copy(url, came)
    again.die()
    assert came.storage
    assert names(url, "m") == snapshot_files(came.storage.last.number)
    once_more = House(put_back(url, quick / "back"))
    last = once_more.restore()
    once_more.die()
    assert (last.machine.version, seen(last).vectors) == (wanted.version, wanted.vectors)


def _wait(happened: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not happened():
        assert monotonic() < end, "it did not happen within 20 s"
        sleep(0.01)
