"""Half-failed writes of manifests, deletions and journals have no effect after a later crash."""

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from crowd import Crowd
from model_host import Clock, ModelHost, check_comes_back, copied, recovered
from trouble import Trouble

sys.path.append(str(Path(__file__).parents[1] / "service"))

from messages import asynchronous
from wire import Wire

from deltaserve.v1.model_service_pb2 import DeleteModelRequest
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability import directory
from deltaserve_server.durability.commits import Journaled, StorageError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Ancestor, Folder, Head
from deltaserve_server.durability.journal import Journal, JournalReader
from deltaserve_server.durability.records import Ended, VersionBumped

JOURNALS = ("journal", "fsync")


@pytest.fixture
def trouble() -> Trouble:
    return Trouble()


def fail_once_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the first sync of a folder after the rename of a manifest fail."""
    renamed, really_rename, really_sync = [""], Files.rename, Files.sync

    def rename(files: Files, name: str, new: str) -> None:
        really_rename(files, name, new)
        renamed[0] = new

    def sync(files: Files) -> None:
        if renamed[0].startswith("snapshot-") and renamed[0].endswith(".json"):
            monkeypatch.setattr(Files, "sync", really_sync)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        really_sync(files)

    monkeypatch.setattr(Files, "rename", rename)
    monkeypatch.setattr(Files, "sync", sync)


def push(crowd: Crowd, times: int) -> None:
    for _ in range(times):
        crowd.push()


def newest_manifest(data: Path) -> Path:
    return max((data / "models" / "m").glob("snapshot-*.json"))


def written(folder: Path, number: int, after: int = 0) -> list[int]:
    """Returns the indices of the records in a journal."""
    return [record.index for record in JournalReader(Files(folder), number, after, lost_power=False).records()]


# --- a snapshot whose manifest is there, though its folder was not synced


@pytest.mark.parametrize("found", [True, False], ids=["found", "not found"])
@pytest.mark.parametrize("durability", JOURNALS)
def test_records_after_a_manifest_whose_sync_failed_survive(
    quick: Path, monkeypatch: pytest.MonkeyPatch, durability: str, found: bool
) -> None:
    data, host = quick / "data", ModelHost(quick / "data", durability)
    crowd = Crowd(engine := host.create(), 1, Clock(monkeypatch))
    crowd.open()
    push(crowd, 3)
    fail_once_in_place(monkeypatch)
    with pytest.raises(OSError, match="Too many open files"):
        engine.save()
    manifest = newest_manifest(data).name
    push(crowd, 3)
    left = copied(data, quick / "copy")
    assert newest_manifest(left).name == manifest != "snapshot-00000001.json"
    if not found:
        newest_manifest(left).unlink()
    check_comes_back(recovered(left, durability=durability), engine)
    host.die()


@pytest.mark.parametrize("durability", JOURNALS)
def test_snapshots_continue_after_a_manifest_whose_sync_failed(
    quick: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    host = ModelHost(quick / "data", durability)
    crowd = Crowd(engine := host.create(), 2, Clock(monkeypatch))
    push(crowd, 2)
    fail_once_in_place(monkeypatch)
    with pytest.raises(OSError, match="Too many open files"):
        engine.save()
    push(crowd, 2)
    left = copied(quick / "data", quick / "copy")
    assert engine.save().version == 4
    push(crowd, 2)
    host.die()
    for path, version in ((left, 4), (quick / "data", 6)):
        host = ModelHost(path, durability)
        restored = host.restore()
        host.die()
        assert restored.machine.version == version
        assert restored.head.ancestors[-1] == Ancestor(engine.head.lineage, version)
        assert len(restored.machine.sessions) == len(engine.machine.sessions)


# --- a model whose deletion fails


@pytest.mark.parametrize("durability", JOURNALS)
def test_a_failed_deletion_is_undone_and_can_be_repeated(
    quick: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, durability: str
) -> None:
    monkeypatch.setattr(directory, "Files", trouble.files)
    data, ones = quick / "data", np.ones(4, np.float32)
    config = ServerConfig(device="cpu", data_dir=data, durability=durability, snapshot_seconds=None)  # type: ignore[arg-type]
    with LocalServer(config) as server, Wire(server.target) as wire:
        wire.create("m", {"w": (4,)}, policy=asynchronous())
        session = wire.open("m", "a")
        wire.step(session.header(1), ones)
        trouble.errors["sync folder"], trouble.only = errno.EIO, "models"
        assert wire.refused("DeleteModel", DeleteModelRequest(model="m")).reason == "STORAGE_UNAVAILABLE"
        trouble.lift()
        assert wire.step(session.header(2), ones).position.durable_version == 2
        assert recovered(copied(data, quick / "copy"), durability=durability).version == 2
        wire.delete("m")
        assert list(wire.models()) == []
        wire.create("m", {"w": (4,)})
    with LocalServer(config) as server, Wire(server.target) as wire:
        assert [model.position.version for model in wire.models()] == [0]


# --- a model that cannot be stored


def test_failed_creations_of_a_model_do_not_fill_the_disk(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client on a full disk tries again and again."""
    really = Folder.write_head

    def write_head(folder: Folder, head: Head) -> None:
        if folder.files.folder.name == "m":  # only under its final name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(folder, head)

    monkeypatch.setattr(Folder, "write_head", write_head)
    host = ModelHost(quick / "data")
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            host.create()
    host.die()
    assert sum(journal.stat().st_size for journal in quick.rglob("journal-*")) <= 3 * 128
    assert not [held for held in Path("/proc/self/fd").iterdir() if f"{quick}/" in os.path.realpath(held)]


# --- rotation


class Late:
    """A lock that makes the thread "late" wait."""

    def __init__(self, lock: threading.Lock) -> None:
        self.arrived, self.go = threading.Event(), threading.Event()
        self._lock = lock

    def __enter__(self) -> None:
        if threading.current_thread().name == "late":
            self.arrived.set()
            self.go.wait(20)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_record_is_written_before_its_effect_although_a_rotation_is_taken_back(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(quick)
    commits = Journaled(Journal(files, 1), 0, sync=True)
    late = Late(commits._writing)
    monkeypatch.setattr(commits, "_writing", late)
    commits.add(VersionBumped(1))
    thread = threading.Thread(target=commits.flush, name="late")
    thread.start()
    assert late.arrived.wait(10)
    commits.rotate(journal := Journal(files, 2))
    assert commits.take_back(journal)
    late.go.set()
    thread.join(10)
    assert not thread.is_alive()
    assert written(quick, 1) == [1], "its effect was called before it was written"
    commits.close()


def test_taking_a_rotation_back_restores_the_counts(quick: Path) -> None:
    """Otherwise a failed snapshot would make a long journal look short."""
    commits = Journaled(Journal(Files(quick), 1), 7, sync=False, before=(7, 1000))
    commits.add(VersionBumped(8))
    before = commits.records, commits.bytes
    commits.rotate(journal := Journal(Files(quick), 2))
    assert commits.take_back(journal)
    assert (commits.records, commits.bytes) == before
    journal.close()
    commits.close()


@pytest.fixture
def switching(quick: Path, trouble: Trouble) -> Iterator[Journaled]:
    """A queue with a record for one journal and a rotation to another."""
    commits = Journaled(Journal(trouble.files(quick), 1), 0, sync=True)
    commits.add(VersionBumped(1))
    commits.rotate(Journal(trouble.files(quick), 2))
    yield commits
    commits.close()


def test_space_is_reserved_in_the_journal_of_the_next_record(
    quick: Path, trouble: Trouble, switching: Journaled
) -> None:
    switching.ready(1, 1 << 16, 0)
    assert (quick / "journal-00000001").stat().st_size < 1 << 18 <= (quick / "journal-00000002").stat().st_size
    trouble.errors["allocate"] = errno.ENOSPC
    switching.add(Ended(()), [(0, np.zeros(1 << 16, np.float32))])
    switching.flush()
    assert (written(quick, 1), written(quick, 2, 1)) == ([1], [2])


def test_a_full_disk_refuses_records_and_breaks_no_journal(trouble: Trouble, switching: Journaled) -> None:
    trouble.errors["allocate"], trouble.only = errno.ENOSPC, "journal-00000002"
    with pytest.raises(StorageError, match="No space left"):
        switching.ready(1, 1 << 16, 0)
    switching.flush()
    assert not switching.error
