"""Copies of snapshots in another file system: a directory restored from them knows that it may be outdated."""

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
from model_host import Clock, ModelHost, Seen, check_same, machine, optimizer_of, seen

from deltaserve._common.optimizers import Adam
from deltaserve_server.durability import copies as room
from deltaserve_server.durability.copies import Copies
from deltaserve_server.durability.folder import HEAD, Ancestor
from deltaserve_server.engine.model_engine import ModelEngine

DURABILITIES = ("snapshot", "journal", "fsync")


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, quick: Path) -> Iterator[str]:
    """URL of the copies."""
    if request.param == "file":
        yield (quick / "copies").as_uri()
        return
    yield "memory://copies"
    fsspec.filesystem("memory").rm("/copies", recursive=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def copy(url: str, engine: ModelEngine) -> None:
    """Copies a model's newest snapshot and waits for it."""
    assert engine.storage
    copies = Copies(url)
    copies.offer("m", engine.storage.folder)
    copies.close(20.0)


def names(url: str, folder: str = "") -> list[str]:
    """Lists the folder of models, or one model's folder."""
    system, root = fsspec.core.url_to_fs(f"{url}/models/{folder}".rstrip("/"))
    return sorted(str(path).rsplit("/", 1)[-1] for path in system.ls(root, detail=False))


def snapshot_files(*numbers: int) -> list[str]:
    """Returns the files of a folder with these snapshots."""
    kinds = ("json", "safetensors")
    return [HEAD, *(f"snapshot-{number:08}.{kind}" for number in numbers for kind in kinds)]


def put_back(url: str, path: Path) -> Path:
    """Makes a data directory from copies."""
    system, root = fsspec.core.url_to_fs(url)
    system.get(root, str(path), recursive=True)
    return path


def push_and_save(crowd: Crowd, pushes: int) -> Seen:
    """Makes some updates and a snapshot; returns the model's state."""
    for _ in range(pushes):
        crowd.push()
    crowd.save()
    return seen(crowd.engine)


def end(host: ModelHost, engine: ModelEngine) -> None:
    """Shuts down in order."""
    assert engine.storage
    engine.close()
    host.directory.close()


# --- a restored copy


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_restored_copy_continues_under_another_lineage_without_sessions(
    quick: Path, clock: Clock, url: str, durability: str
) -> None:
    host = ModelHost(quick / "data", durability)
    crowd = Crowd(engine := host.create(machine(optimizer=optimizer_of(f"a copy of {durability}"))), 1, clock)
    saved = push_and_save(crowd, 3)
    assert engine.machine.sessions.live()
    copy(url, engine)
    crowd.push()
    host.die()
    again = ModelHost(put_back(url, quick / "back"), durability)
    restored = again.restore()
    again.die()
    assert (restored.machine.version, seen(restored).vectors) == (saved.version, saved.vectors)
    assert restored.head.lineage != engine.head.lineage
    assert restored.head.ancestors == (Ancestor(engine.head.lineage, saved.version, lossy=True),)
    assert not restored.machine.sessions.live()


def test_a_restored_copy_of_an_orderly_shutdown_ends_sessions_as_well(quick: Path, clock: Clock, url: str) -> None:
    """The original may have continued before somebody restores the copy."""
    host = ModelHost(quick / "data", "fsync")
    crowd = Crowd(engine := host.create(), 2, clock)
    crowd.push()
    end(host, engine)
    copy(url, engine)
    again = ModelHost(put_back(url, quick / "back"), "fsync")
    restored = again.restore()
    again.die()
    assert restored.machine.version == engine.machine.version == 1
    assert restored.head.lineage != engine.head.lineage
    assert restored.head.knows(engine.head.lineage)


def test_a_restored_copy_is_copied_again_to_the_same_place(quick: Path, clock: Clock, url: str) -> None:
    host = ModelHost(quick / "data")
    crowd = Crowd(engine := host.create(), 3, clock)
    push_and_save(crowd, 2)
    copy(url, engine)
    host.die()
    again = ModelHost(put_back(url, quick / "back"))
    crowd = Crowd(restored := again.restore(), 4, clock)
    push_and_save(crowd, 2)
    copy(url, restored)
    crowd.push()
    again.die()
    assert names(url) == ["m"], "its lineage is known: the copies are of one model"
    once_more = ModelHost(quick / "back")
    last = once_more.restore()
    once_more.die()
    assert last.machine.version == 5
    assert last.head.ancestors[-1] == Ancestor(restored.head.lineage, 5)


# --- copies of another model


def test_two_copies_are_kept(quick: Path, clock: Clock, url: str) -> None:
    host = ModelHost(quick / "data")
    crowd = Crowd(engine := host.create(), 5, clock)
    numbers: list[int] = []
    for _ in range(4):
        push_and_save(crowd, 1)
        copy(url, engine)
        assert engine.storage
        numbers.append(engine.storage.last.number)
        assert names(url, "m") == snapshot_files(*numbers[-2:])
    host.die()


def test_copies_of_a_deleted_model_are_moved_aside_for_a_new_one_of_its_name(
    quick: Path, clock: Clock, url: str
) -> None:
    host = ModelHost(quick / "data")
    crowd = Crowd(old := host.create(machine(optimizer=Adam())), 6, clock)
    for _ in range(4):
        push_and_save(crowd, 2)
        copy(url, old)
    kept = names(url, "m")
    host.directory.remove("m")
    crowd = Crowd(new := host.create(seed=99), 7, clock)
    wanted = push_and_save(crowd, 1)
    copy(url, new)
    host.die()
    aside = f".m.{old.head.lineage.hex()}"
    assert names(url) == [aside, "m"]
    assert names(url, aside) == kept
    assert new.storage
    assert names(url, "m") == snapshot_files(new.storage.last.number)
    again = ModelHost(put_back(url, quick / "back"))
    assert again.directory.names() == ["m"]
    restored = again.restore()
    again.die()
    assert (restored.machine.version, seen(restored).vectors) == (wanted.version, wanted.vectors)
    assert restored.head.knows(new.head.lineage)


def test_copies_with_a_corrupt_head_are_moved_aside(quick: Path, clock: Clock, url: str) -> None:
    host = ModelHost(quick / "data")
    crowd = Crowd(engine := host.create(), 8, clock)
    push_and_save(crowd, 2)
    copy(url, engine)
    kept = names(url, "m")
    system, root = fsspec.core.url_to_fs(url)
    system.pipe_file(f"{root}/models/m/{HEAD}", b"nonsense")
    wanted = push_and_save(crowd, 1)
    copy(url, engine)
    host.die()
    aside, name = names(url)
    assert (aside[:3], name) == (".m.", "m")
    assert names(url, aside) == kept
    again = ModelHost(put_back(url, quick / "back"))
    restored = again.restore()
    again.die()
    check_same(seen(restored)._replace(image=""), wanted._replace(image=""))


# --- a destination that fails


def test_a_missing_destination_is_logged_and_tried_again(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example an object store without the bucket."""
    host = ModelHost(quick / "data")
    push_and_save(Crowd(engine := host.create(), 9, clock), 1)
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
        _wait(lambda: "copied snapshot" in caplog.text)
    copies.close(20.0)
    host.die()
    assert caplog.text.count("the newest snapshot of model m was not copied: ") == 2
    assert names(url, "m") == snapshot_files(number)


def test_a_deleted_model_is_skipped_silently(quick: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    host = ModelHost(quick / "data")
    push_and_save(Crowd(engine := host.create(), 10, clock), 1)
    host.directory.remove("m")
    copies = Copies((quick / "copies").as_uri())
    assert engine.storage
    copies.offer("m", engine.storage.folder)
    copies.close(20.0)
    host.die()
    assert caplog.text == ""


def test_a_slow_destination_gets_whole_snapshots(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot being copied is kept meanwhile; the next copy takes the newest."""
    host = ModelHost(quick / "data")
    crowd = Crowd(engine := host.create(), 11, clock)
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
    host.die()
    assert names(url, "m") == snapshot_files(numbers[0], numbers[-1])


def test_a_copy_that_exists_is_not_written_again(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shutdown copies the last snapshot once more; interrupting that must not damage it."""
    host = ModelHost(quick / "data")
    push_and_save(Crowd(engine := host.create(), 12, clock), 1)
    copy(url, engine)
    system, _ = fsspec.core.url_to_fs(url)
    written: list[object] = []
    monkeypatch.setattr(type(system), "put_file", lambda *given, **_: written.append(given))
    copy(url, engine)
    host.die()
    assert not written
    assert engine.storage
    assert names(url, "m") == snapshot_files(engine.storage.last.number)


@pytest.mark.parametrize("broken", ["tensors", "manifest"])
def test_an_interrupted_copy_does_not_count_and_is_removed_by_the_next(
    quick: Path, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    host = ModelHost(quick / "data")
    crowd = Crowd(engine := host.create(), 13, clock)
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
    again = ModelHost(put_back(url, quick / "back"))
    restored = again.restore()
    again.die()
    assert (restored.machine.version, seen(restored).vectors) == (wanted.version, wanted.vectors)
    push_and_save(crowd, 1)
    copy(url, engine)
    host.die()
    assert names(url, "m") == snapshot_files(first, engine.storage.last.number)


def test_copies_of_a_lineage_that_was_left_are_replaced(quick: Path, clock: Clock, url: str) -> None:
    """After a restore from a backup, snapshot numbers are used again."""
    host = ModelHost(quick / "data")
    crowd = Crowd(engine := host.create(), 14, clock)
    push_and_save(crowd, 1)
    older = shutil.copytree(quick / "data", quick / "older")
    for _ in range(5):
        push_and_save(crowd, 1)
        copy(url, engine)
    host.die()
    again = ModelHost(older)
    crowd = Crowd(restored := again.restore(), 15, clock)
    wanted = push_and_save(crowd, 3)
    copy(url, restored)
    again.die()
    assert restored.storage
    assert names(url, "m") == snapshot_files(restored.storage.last.number)
    once_more = ModelHost(put_back(url, quick / "back"))
    last = once_more.restore()
    once_more.die()
    assert (last.machine.version, seen(last).vectors) == (wanted.version, wanted.vectors)


def _wait(happened: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not happened():
        assert monotonic() < end, "it did not happen within 20 s"
        sleep(0.01)
