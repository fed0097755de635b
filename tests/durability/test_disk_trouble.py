"""A full or failing disk: pushes are refused without any change, and later applied exactly once."""

import errno
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_host import ModelHost, copied, recovered
from trouble import Trouble, fill, small_file_system

from deltaserve_server.durability import model_storage

sys.path.append(str(Path(__file__).parents[1] / "service"))

from messages import asynchronous, pieces, sync
from wire import Refusal, Session, Wire, eventually

import deltaserve
from deltaserve.v1.common_pb2 import TensorSpec
from deltaserve.v1.model_service_pb2 import (
    DeleteModelRequest,
    ExtendModelHeader,
    ExtendModelRequest,
    SaveSnapshotRequest,
    Snapshot,
)
from deltaserve.v1.worker_service_pb2 import PullRequest, StepRequest
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability import directory, journal
from deltaserve_server.durability.errors import CorruptError, DataDirectoryError, disk_operation
from deltaserve_server.model import Refused

SIZE = 4000
JOURNALS = ("journal", "fsync")


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    made = Trouble()
    monkeypatch.setattr(directory, "Files", made.files)
    monkeypatch.setattr(model_storage, "_RETRY_SECONDS", 0.2)
    yield made
    made.lift()


@contextmanager
def serving(data: Path, durability: str, **more: Any) -> Iterator[Wire]:
    kept: Any = {"durability": durability, **more}
    config = ServerConfig(device="cpu", data_dir=data, snapshot_seconds=None, lease_seconds=900.0, **kept)
    with LocalServer(config) as server, Wire(server.target) as wire:
        yield wire


def gradient(number: int) -> Any:
    return np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)


def begin(wire: Wire) -> Session:
    wire.create("m", {"w": (SIZE,)}, weights=gradient(0), policy=asynchronous())
    session = wire.open("m", "a")
    for number in (1, 2, 3):
        wire.step(session.header(number), gradient(number))
    return session


def refused(wire: Wire, session: Session, number: int) -> Refusal:
    request = StepRequest(header=session.header(number), gradient=gradient(number).tobytes())
    refusal = wire.refused("Step", request)
    assert refusal.reason == "STORAGE_UNAVAILABLE", refusal
    assert refusal.retry_seconds
    return refusal


def durable(wire: Wire) -> int:
    return int(wire.models()[0].position.durable_version)


def check_restart(data: Path, copy: Path, wire: Wire, durability: str) -> int:
    """Checks that a crash now keeps what is called durable; returns the version that survives."""
    said = durable(wire)
    restored = recovered(copied(data, copy), durability=durability)
    assert restored.version >= said
    return restored.version


def pushes_until_refused(wire: Wire, session: Session, number: int) -> int:
    """Pushes until a push is refused; returns its number."""
    for _ in range(500):
        request = StepRequest(header=session.header(number), gradient=gradient(number).tobytes())
        try:
            wire.call("Step", request)
        except Exception:
            refused(wire, session, number)
            return number
        number += 1
    raise AssertionError("the disk is never full")


def goes_on(wire: Wire, session: Session, number: int) -> None:
    """Checks that the refused push is applied exactly once."""
    eventually(lambda: _accepts(wire, session, number), "the storage does not come back")
    assert wire.models()[0].position.version == number
    again = wire.step(session.header(number), gradient(number))
    assert again.result.duplicate
    assert again.result.version == number == wire.models()[0].position.version
    assert wire.step(session.header(number + 1), gradient(number + 1)).position.durable_version == number + 1


def _accepts(wire: Wire, session: Session, number: int) -> bool:
    try:
        wire.step(session.header(number), gradient(number))
    except Exception:
        return False
    return True


@pytest.mark.parametrize("durability", JOURNALS)
def test_a_disk_that_is_full(tmp_path: Path, quick: Path, durability: str) -> None:
    with small_file_system(tmp_path / "small") as place:
        if place is None:
            pytest.skip("no file system can be mounted here")
        with serving(place / "data", durability) as wire:
            session = begin(wire)
            ballast = fill(place)
            number = pushes_until_refused(wire, session, 4)
            with pytest.raises(AssertionError, match="answered"):
                wire.refused("GetServerInfo", _info())
            before = wire.snapshot("m")
            for _ in range(3):
                refused(wire, session, number)
            assert wire.snapshot("m") == before
            assert before.version == number - 1 == durable(wire)
            assert wire.pull("m")[1].tobytes() == before.vectors[0], "acknowledged weights can be pulled"
            assert check_restart(place / "data", quick / "copy", wire, durability) == number - 1
            assert wire.refused("SaveSnapshot", SaveSnapshotRequest(model="m")).reason == "STORAGE_UNAVAILABLE"
            ballast.unlink()
            goes_on(wire, session, number)
            check_restart(place / "data", quick / "copy", wire, durability)


def test_without_a_journal_training_continues_on_a_full_disk(tmp_path: Path, quick: Path) -> None:
    with small_file_system(tmp_path / "small", "1m") as place:
        if place is None:
            pytest.skip("no file system can be mounted here")
        with serving(place / "data", "snapshot", snapshot_updates=5) as wire:
            session = begin(wire)
            ballast = fill(place)
            for number in range(4, 40):
                assert wire.step(session.header(number), gradient(number)).result.version == number
            assert wire.refused("SaveSnapshot", SaveSnapshotRequest(model="m")).reason == "STORAGE_UNAVAILABLE"
            held = durable(wire)
            assert held <= 3
            assert check_restart(place / "data", quick / "copy", wire, "snapshot") == held
            ballast.unlink()
            wire.one("SaveSnapshot", SaveSnapshotRequest(model="m"))
            assert durable(wire) == 39 == check_restart(place / "data", quick / "copy", wire, "snapshot")


def test_a_shutdown_on_a_full_disk_logs_the_missing_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_file_system(tmp_path / "small", "1m") as place:
        if place is None:
            pytest.skip("no file system can be mounted here")
        kept: Any
        for kept, rest in (
            ("snapshot", "what came after version 0 is lost"),
            ("journal", "the journal has what came"),
        ):
            server = LocalServer(
                ServerConfig(device="cpu", data_dir=place / kept, durability=kept, snapshot_seconds=None)
            )
            server.start()
            with Wire(server.target) as wire:
                begin(wire)
                ballast = fill(place)
                assert not server.stop(0)
            assert f"the last snapshot failed, {rest}" in caplog.text
            ballast.unlink()


@pytest.mark.parametrize("durability", ["snapshot", "journal"])
def test_a_start_on_a_full_disk_names_the_file_system_and_the_space(tmp_path: Path, durability: str) -> None:
    with small_file_system(tmp_path / "small", "1m") as place:
        if place is None:
            pytest.skip("no file system can be mounted here")
        with serving(place / "data", durability) as wire:
            begin(wire)
        fill(place)
        with pytest.raises(DataDirectoryError) as caught, serving(place / "data", durability):
            pass
    file = place / "data" / "models" / "m" / ("head.json" if durability == "snapshot" else "journal-0000000")
    text = str(caught.value)
    assert text.startswith(f"model m: {file}"), text
    assert re.search(r"No space left on device while \w+ing [\d,]+ bytes \(0 bytes free\)", text), text
    assert text.endswith(f"; free some space on the file system mounted at {place} and start the server again")


@pytest.mark.parametrize(
    ("number", "needed", "text"),
    [
        (errno.EIO, 5000, "Input/output error while writing"),
        (errno.ENOSPC, 5000, "No space left on device while writing 5,000 bytes (8,192 bytes free)"),
        (errno.EDQUOT, 5000, "Disk quota exceeded while writing 5,000 bytes (8,192 bytes free)"),
        (errno.ENOSPC, 0, "No space left on device while writing"),
    ],
)
def test_a_disk_error_names_file_action_and_space(
    quick: Path, monkeypatch: pytest.MonkeyPatch, number: int, needed: int, text: str
) -> None:
    """Clients see the text without the path."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=9, f_favail=9, f_bavail=2, f_frsize=4096))
    with pytest.raises(OSError, match=re.escape(text)) as caught, disk_operation("writing", quick / "file", needed):
        raise OSError(number, os.strerror(number))
    assert (caught.value.strerror, caught.value.filename) == (text, str(quick / "file"))


def test_a_file_system_without_inodes_is_reported_as_such(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=9, f_favail=0, f_bavail=2, f_frsize=4096))
    text = re.escape("while writing 1 bytes (no inodes free)")
    with pytest.raises(OSError, match=text), disk_operation("writing", quick / "file", 1):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "name")


def test_a_journal_allocates_less_on_a_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_ALLOCATED", 16 << 20)
    with small_file_system(tmp_path / "small", "2m") as place:
        if place is None:
            pytest.skip("no file system can be mounted here")
        with serving(place / "data", "journal") as wire:
            session = begin(wire)
            for number in range(4, 60):
                assert wire.step(session.header(number), gradient(number)).result.version == number
            wire.one("SaveSnapshot", SaveSnapshotRequest(model="m"))
        with serving(place / "data", "journal") as wire:
            assert wire.snapshot("m").version == 59


@pytest.mark.parametrize(
    ("durability", "errors"),
    [
        ("journal", {"allocate": errno.ENOSPC, "create": errno.ENOSPC}),
        ("fsync", {"allocate": errno.ENOSPC, "create": errno.ENOSPC}),
        ("journal", {"write": errno.ENOSPC}),
        ("journal", {"write": errno.EIO, "create": errno.EROFS}),
        ("fsync", {"sync": errno.EIO}),
        ("fsync", {"sync": errno.EIO, "write": errno.EIO, "create": errno.EROFS, "allocate": errno.EROFS}),
        ("fsync", {"sync": errno.EDQUOT, "sync folder": errno.EIO}),
        ("fsync", {"sync": errno.EIO, "rename": errno.EIO}),
    ],
    ids=str,
)
def test_a_disk_that_fails(quick: Path, trouble: Trouble, durability: str, errors: dict[str, int]) -> None:
    data = quick / "data"
    with serving(data, durability) as wire:
        session = begin(wire)
        trouble.errors.update(errors)
        number = pushes_until_refused(wire, session, 4)
        listed = wire.models()[0].position
        for _ in range(3):
            refused(wire, session, number)
        assert listed.durable_version <= number - 1
        check_restart(data, quick / "copy", wire, durability)
        trouble.lift()
        goes_on(wire, session, number)
        assert check_restart(data, quick / "copy", wire, durability) == number + 1


@pytest.mark.parametrize("broken", [False, True])
def test_repeatedly_failing_snapshots_do_not_fill_the_disk(quick: Path, trouble: Trouble, broken: bool) -> None:
    """They leave no files open either."""
    host = ModelHost(quick / "data", "fsync")
    engine = host.create()
    trouble.errors["sync"] = errno.ENOSPC
    trouble.only = "" if broken else "snapshot"
    with suppress(Refused):
        engine.open_session("a", 100.0)
    trouble.only = "snapshot"
    descriptors, names = len(list(Path("/proc/self/fd").iterdir())), len(list((quick / "data").rglob("*")))
    for _ in range(20):
        with pytest.raises(OSError, match="No space"):
            engine.save()
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1
    assert len(list((quick / "data").rglob("*"))) <= names + 1
    trouble.lift()
    engine.save()
    engine.open_session("b", 100.0)
    assert len(recovered(copied(quick / "data", quick / "copy"), durability="fsync").image) > 100
    host.die()


def test_a_snapshot_without_room_for_its_manifest_removes_its_tensors(quick: Path, trouble: Trouble) -> None:
    """They would take the space that the next attempt needs."""
    host = ModelHost(quick / "data", "fsync")
    engine = host.create()
    names = {path.name for path in (quick / "data" / "models" / "m").iterdir()}
    trouble.errors["allocate"] = errno.ENOSPC
    trouble.only = ".json"
    engine.open_session("a", 100.0)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            engine.save()
        assert {path.name for path in (quick / "data" / "models" / "m").iterdir()} == names
    trouble.lift()
    engine.save()
    host.die()


def test_an_extension_that_is_not_durable_yet_keeps_its_memory(quick: Path, trouble: Trouble) -> None:
    config = ServerConfig(device="cpu", data_dir=quick / "data", durability="fsync", snapshot_seconds=None)
    with LocalServer(config) as server, Wire(server.target) as wire:
        begin(wire)
        available = server._catalog.quotas.memory.available
        trouble.errors.update({"sync": errno.EIO, "create": errno.EROFS})
        extension = ExtendModelHeader(
            model="m", tensor_count=1, group_count=1, tensors=[TensorSpec(name="x", shape=[9])]
        )
        messages = [
            ExtendModelRequest(header=extension),
            *(ExtendModelRequest(weights=piece) for piece in pieces(np.zeros(9), SIZE)),
        ]
        assert wire.refused("ExtendModel", *messages).reason == "STORAGE_UNAVAILABLE"
        assert len(server._catalog.get("m").machine.layout.tensors) == 2
        assert available - server._catalog.quotas.memory.available == 8 * 4 * 9
        trouble.lift()


def test_a_client_rides_out_a_disk_failure(quick: Path, trouble: Trouble) -> None:
    config = ServerConfig(device="cpu", data_dir=quick / "data", durability="fsync", snapshot_seconds=None)
    with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=60.0) as client:
        model = client.create_model("m", {"w": np.zeros(SIZE, np.float32)})
        with model.worker("a") as worker:
            worker.step({"w": gradient(1)})
            trouble.errors["sync"] = errno.EIO
            timer = threading.Timer(0.3, trouble.lift)
            timer.start()
            worker.step({"w": gradient(2)})
            timer.join()
            worker.step({"w": gradient(3)})
            assert worker.version == 3 == model.info().version == model.info().durable_version


def test_a_shutdown_ends_although_the_disk_fails(quick: Path, trouble: Trouble) -> None:
    with serving(quick / "data", "fsync") as wire:
        session = begin(wire)
        trouble.errors.update({"sync": errno.EIO, "create": errno.EIO})
        refused(wire, session, 4)
    trouble.lift()
    with serving(quick / "data", "fsync") as wire:
        assert wire.models()[0].position.version in (3, 4)
        assert wire.fate(session, 3).final


def test_a_stalled_disk_delays_only_its_own_model(quick: Path, trouble: Trouble) -> None:
    """While a session is being journaled, other sessions are opened and other models created."""
    with serving(quick / "data", "journal") as wire, Wire(wire.target) as other:
        begin(wire)
        wire.one("SaveSnapshot", SaveSnapshotRequest(model="m"))
        trouble.only = max(path.name for path in (quick / "data" / "models" / "m").glob("journal-*"))
        trouble.gate.clear()
        opened: list[Session] = []
        opening = threading.Thread(target=lambda: opened.append(wire.open("m", "b")))
        opening.start()
        assert trouble.waiting.wait(10)
        other.create("n", {"w": (SIZE,)}, weights=gradient(0), policy=asynchronous())
        session = other.open("n", "a")
        assert other.step(session.header(1), gradient(1)).result.version == 1
        grace = sync(min_workers=1, quorum=1, grace_seconds=0.1)
        other.create("r", {"w": (SIZE,)}, weights=gradient(0), policy=grace)
        first, _ = other.open("r", "a"), other.open("r", "b")
        assert other.step(first.header(1), gradient(1)).result.version == 1, "the round is over in time"
        assert not opened
        trouble.lift()
        opening.join(20)
        assert opened


def test_a_push_that_is_not_durable_yet_keeps_its_memory(quick: Path, trouble: Trouble) -> None:
    """It is refused for now although it is applied: its values stay until the disk has them."""
    data = quick / "data"
    config = ServerConfig(device="cpu", data_dir=data, durability="fsync", snapshot_seconds=None, lease_seconds=900.0)
    with LocalServer(config) as server, Wire(server.target) as wire:
        session = begin(wire)
        staged = server._catalog.quotas.staged
        free = staged.available
        trouble.errors.update({"sync": errno.EIO, "create": errno.EROFS})
        refused(wire, session, 4)
        assert staged.available <= free - SIZE * 4
        trouble.lift()
        goes_on(wire, session, 4)
        assert staged.available == free


def test_concurrent_requests_share_a_snapshot(quick: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    really = model_storage.ModelStorage.save

    def save(*given: Any) -> Any:
        asked.append(given)
        return really(*given)

    monkeypatch.setattr(model_storage.ModelStorage, "save", save)
    config = ServerConfig(device="cpu", data_dir=quick / "data", durability="journal")
    with LocalServer(config) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.target)) for _ in range(8)]
        session = begin(wires[0])
        trouble.only = "snapshot"
        trouble.gate.clear()
        taken: list[Snapshot] = []

        def ask(wire: Wire) -> None:
            taken.append(wire.one("SaveSnapshot", SaveSnapshotRequest(model="m")).snapshot)

        threads = [threading.Thread(target=ask, args=(wire,)) for wire in wires]
        threads[0].start()
        assert trouble.waiting.wait(10)
        wires[0].step(session.header(4), gradient(4))
        for thread in threads[1:]:
            thread.start()
        eventually(lambda: len(asked) == 8, "not all have asked")
        trouble.lift()
        for thread in threads:
            thread.join(20)
        assert sorted(entry.version for entry in taken) == [3, *[4] * 7], "each has what had happened when it asked"
        assert len({entry.number for entry in taken}) <= 3


@pytest.mark.parametrize("part", ["manifest", "tensors", "journal"])
def test_an_unreadable_file_counts_as_corrupt(quick: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """An older snapshot replaces an unreadable one; nothing replaces a journal.

    With --accept-data-loss the model continues without the journal, which is renamed.
    """
    data = quick / "data"
    with serving(data, "journal") as wire:
        session = begin(wire)
        wire.one("SaveSnapshot", SaveSnapshotRequest(model="m"))
        wire.step(session.header(4), gradient(4))
        shutil.copytree(data, quick / "copy")
    folder = quick / "copy" / "models" / "m"
    pattern = {"manifest": "snapshot-*.json", "tensors": "*.safetensors", "journal": "journal-*"}[part]
    bad = max(folder.glob(pattern))
    really = Path.open

    def fails(path: Path, *given: Any, **more: Any) -> Any:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(path, *given, **more)

    monkeypatch.setattr(Path, "open", fails)
    if part == "journal":
        with pytest.raises(CorruptError, match=bad.name):
            recovered(quick / "copy")
        assert recovered(quick / "copy", accept_data_loss=True).version == 3
        assert Path(f"{bad}.corrupt").exists()
        assert not bad.exists()
    else:
        assert recovered(quick / "copy").version == 4


def test_creating_a_model_on_a_stalled_disk_delays_no_other_model(quick: Path, trouble: Trouble) -> None:
    """Sessions are opened and pushes applied meanwhile."""
    with serving(quick / "data", "journal") as wire, Wire(wire.target) as other:
        session = begin(wire)
        wire.one("SaveSnapshot", SaveSnapshotRequest(model="m"))  # after this its journal has a number of its own
        trouble.only = "journal-00000002"
        trouble.gate.clear()
        making = threading.Thread(target=wire.create, args=("n", {"w": (SIZE,)}), kwargs={"weights": gradient(0)})
        making.start()
        assert trouble.waiting.wait(10)
        other.open("m", "b")
        assert other.step(session.header(4), gradient(4)).result.version == 4
        assert [model.name for model in other.models()] == ["m"]
        trouble.lift()
        making.join(20)
        assert [model.name for model in other.models()] == ["m", "n"]


def test_refused_watchers_and_waiters_are_forgotten(quick: Path, trouble: Trouble) -> None:
    """They get an error and call again."""
    config = ServerConfig(device="cpu", data_dir=quick / "data", durability="fsync", snapshot_seconds=None)
    with LocalServer(config) as server, Wire(server.target) as wire:
        session = begin(wire)
        trouble.errors.update({"sync": errno.EIO, "create": errno.EROFS})
        refused(wire, session, 4)
        for _ in range(3):
            assert wire.watch("m").refused().reason == "STORAGE_UNAVAILABLE"
            assert wire.refused("Pull", PullRequest(model="m", wait_for_version=4)).reason == "STORAGE_UNAVAILABLE"
        audience = server._catalog.get("m")._subscribers
        assert not audience._watchers
        assert not audience._awaited
        trouble.lift()


def test_deleting_a_model_releases_the_memory_of_unwritten_records(quick: Path, trouble: Trouble) -> None:
    config = ServerConfig(device="cpu", data_dir=quick / "data", durability="fsync", snapshot_seconds=None)
    with LocalServer(config) as server, Wire(server.target) as wire:
        memory, staged = server._catalog.quotas.memory.available, server._catalog.quotas.staged.available
        session = begin(wire)
        trouble.errors.update({"sync": errno.EIO, "create": errno.EROFS})
        refused(wire, session, 4)
        trouble.lift()
        wire.one("DeleteModel", DeleteModelRequest(model="m"))
        assert server._catalog.quotas.staged.available == staged
        assert server._catalog.quotas.memory.available == memory


def test_a_file_system_without_fallocate(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library writes zeros instead; it would have to read existing bytes, which the descriptor does not allow."""

    def emulated(descriptor: int, offset: int, length: int) -> None:
        assert length > 0
        if offset < os.fstat(descriptor).st_size:
            os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes(length), offset)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    with serving(quick / "data", "journal") as wire:
        session = begin(wire)
        for number in range(4, 20):  # beyond one allocation
            wire.step(session.header(number), gradient(number))
        assert durable(wire) == 19 == check_restart(quick / "data", quick / "copy", wire, "journal")


def test_the_listed_durable_version_survives(quick: Path, trouble: Trouble) -> None:
    """Asked while a record is being written that then fails."""
    data = quick / "data"
    with serving(data, "journal") as wire, Wire(wire.target) as other:
        session = begin(wire)
        trouble.only = "journal"
        trouble.gate.clear()
        push = threading.Thread(target=refused, args=(wire, session, 4))
        push.start()
        assert trouble.waiting.wait(10)
        listed: list[int] = []
        asked = threading.Thread(target=lambda: listed.append(durable(other)))
        asked.start()
        asked.join(0.3)
        trouble.errors.update({"write": errno.EIO, "create": errno.EIO})
        trouble.gate.set()
        push.join(20)
        asked.join(20)
        assert listed
        assert listed[0] <= recovered(copied(data, quick / "copy")).version
        trouble.lift()


def _info() -> Any:
    from deltaserve.v1.system_service_pb2 import GetServerInfoRequest

    return GetServerInfoRequest()
