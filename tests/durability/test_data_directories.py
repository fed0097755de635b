"""A data directory belongs to one server at a time; an error says in one line why it cannot be used."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_host import ModelHost, machine, read, recovered, seen

import deltaserve
from deltaserve_server import LocalServer, Server, ServerConfig
from deltaserve_server.durability import recovery, snapshot
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.errors import CorruptError, DataDirectoryError
from deltaserve_server.durability.model_storage import Durability, ModelStorage, Schedule
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.engine.recovery_progress import RecoveryProgress
from deltaserve_server.memory.host import HostStore
from deltaserve_server.model import Refused

PROGRAM = """
import sys
from pathlib import Path
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability.errors import DataDirectoryError
try:
    server = LocalServer(ServerConfig(device="cpu", data_dir=Path(sys.argv[1]), durability="journal"))
    server.start()
except DataDirectoryError as error:
    print("no:", error, flush=True)
else:
    print(server.target, flush=True)
    server.wait()
"""
SOMEBODY_ELSE = """
import os, sys
from pathlib import Path
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.errors import DataDirectoryError
from deltaserve_server.durability.model_storage import Durability, Schedule
os.setgid(65534)
os.setuid(65534)
try:
    DataDirectory(Path(sys.argv[1]), Schedule(durability=Durability.JOURNAL, updates=None, seconds=None)).names()
except DataDirectoryError as error:
    print(error)
"""
FORKS = """
import os, sys
from pathlib import Path
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.errors import DataDirectoryError
from deltaserve_server.durability.model_storage import Durability, Schedule
def take():
    return DataDirectory(Path(sys.argv[1]), Schedule(durability=Durability.JOURNAL, updates=None, seconds=None))
held = take()
read_end, write_end = os.pipe()
lives = os.fork()
if not lives:
    os.close(write_end)
    os.read(read_end, 1)  # until the parent ends
    os._exit(0)
held.close()
held = take()
print("free again", flush=True)
child = os.fork()
if not child:
    held.close()
    os._exit(0)
os.waitpid(child, 0)
try:
    take()
except DataDirectoryError:
    print("still ours", flush=True)
"""


def config(path: Path, **more: object) -> ServerConfig:
    return ServerConfig(device="cpu", data_dir=path, durability="journal", **more)  # type: ignore[arg-type]


def open_directory(path: Path) -> DataDirectory:
    return DataDirectory(path, Schedule(durability=Durability.JOURNAL, updates=None, seconds=None))


@pytest.fixture
def start(quick: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts servers in other processes."""
    started: list[subprocess.Popen[str]] = []

    def begin(path: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROGRAM, str(path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.deep
def test_a_second_server_is_refused_until_the_first_is_killed(
    quick: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    first = start(quick / "data")
    target = line(first)
    with deltaserve.connect(target) as client:
        model = client.create_model("m", {"w": np.zeros(3, np.float32)})
        with model.worker("a") as worker:
            worker.step({"w": np.ones(3, np.float32)})
            with pytest.raises(DataDirectoryError, match=rf"in use by another server \(process {first.pid}\)"):
                LocalServer(config(quick / "data"))
            assert line(start(quick / "data")).startswith("no: data directory")
            weights = model.pull_state().weights["w"].copy()
            first.send_signal(signal.SIGKILL)
            first.wait()
    with LocalServer(config(quick / "data")) as server, deltaserve.connect(server.target) as client:
        assert client.models()[0].version == 1
        assert np.array_equal(client.model("m").pull_state().weights["w"], weights)


def test_a_stopped_server_releases_its_directory(quick: Path) -> None:
    for _ in range(3):
        with LocalServer(config(quick / "data")), pytest.raises(DataDirectoryError):
            LocalServer(config(quick / "data"))


@pytest.mark.deep
def test_a_forked_process_neither_keeps_nor_releases_the_lock(quick: Path) -> None:
    """For example the workers of a DataLoader beside a server in a notebook."""
    command = [sys.executable, "-c", FORKS, str(quick / "data")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert output.splitlines() == ["free again", "still ours"]


def test_a_server_without_its_directory_starts_no_copies(quick: Path) -> None:
    with LocalServer(config(quick / "data")), pytest.raises(DataDirectoryError):
        LocalServer(config(quick / "data", copy_to=(quick / "copies").as_uri()))
    assert "copies" not in [thread.name for thread in threading.enumerate()]


def test_a_server_without_a_destination_for_copies_releases_its_directory(quick: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        LocalServer(config(quick / "data", copy_to="nowhere://at/all"))
    open_directory(quick / "data").close()


def test_a_path_that_is_not_a_directory(quick: Path) -> None:
    (quick / "file").write_bytes(b"")
    for path in (quick / "file", quick / "file" / "below"):
        with pytest.raises(DataDirectoryError, match="file"):
            LocalServer(config(path))
    (quick / "made").mkdir()
    (quick / "made" / "models").write_bytes(b"")
    with pytest.raises(DataDirectoryError, match="made"):
        LocalServer(config(quick / "made"))
    (quick / "loop").symlink_to(quick / "loop")
    with pytest.raises(DataDirectoryError, match="loop"):
        LocalServer(config(quick / "loop"))


@pytest.mark.deep
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_directory_of_another_user(quick: Path, mode: int) -> None:
    quick.chmod(0o755)
    (quick / "data").mkdir()
    host = ModelHost(quick / "data")
    host.create()
    host.die()
    for path in (quick / "data", *(quick / "data").rglob("*")):
        if path.is_dir():
            path.chmod(mode)
    command = [sys.executable, "-c", SOMEBODY_ELSE, str(quick / "data")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.startswith(f"data directory {quick / 'data'}: Permission denied")


def test_unknown_files_are_left_alone(quick: Path) -> None:
    host = ModelHost(quick / "data")
    wanted = seen(host.create())
    host.die()
    unknown = [quick / "data" / "README", quick / "data" / "models" / "note.txt"]
    unknown += [quick / "data" / "models" / "m" / name for name in ("note", "snapshot.json", "journal-1", "x.json")]
    for path in unknown:
        path.write_bytes(b"mine")
    (quick / "data" / "lost+found").mkdir()
    host = ModelHost(quick / "data")
    engine = host.restore()
    assert seen(engine) == wanted
    for _ in range(3):
        engine.change(engine.machine.groups, engine.machine.policy)
        engine.save()
    host.die()
    assert all(path.read_bytes() == b"mine" for path in unknown)
    assert recovered(quick / "data").vectors == wanted.vectors


def test_a_folder_without_a_model_stops_the_server(quick: Path) -> None:
    (quick / "data" / "models" / "stranger").mkdir(parents=True)
    server = LocalServer(config(quick / "data"))
    try:
        with pytest.raises(DataDirectoryError, match=r"stranger/head\.json: it is missing.*--accept-data-loss"):
            server.start()
    finally:
        server.stop(grace_seconds=0)


def test_accept_data_loss_sets_a_model_without_good_snapshots_aside(quick: Path) -> None:
    host = ModelHost(quick / "data")
    host.create(machine("good"))
    host.create(machine("bad"))
    host.die()
    for path in (quick / "data" / "models" / "bad").glob("snapshot-*"):
        path.write_bytes(b"")
    accepting = config(quick / "data", accept_data_loss=True)
    with LocalServer(accepting) as server, deltaserve.connect(server.target) as client:
        assert [model.name for model in client.models()] == ["good"]
        client.create_model("bad", {"w": np.zeros(3, np.float32)})
    kept = [path.name for path in (quick / "data" / "models").iterdir() if path.name.endswith(".corrupt")]
    assert len(kept) == 1
    assert kept[0].startswith(".bad.")
    with LocalServer(config(quick / "data")) as server, deltaserve.connect(server.target) as client:
        assert [model.name for model in client.models()] == ["bad", "good"]


@pytest.mark.parametrize("later", ["empty", "full"])
def test_accept_data_loss_ends_a_journal_at_the_corrupt_record(quick: Path, later: str) -> None:
    """Later journals are set aside, even empty ones."""
    host = ModelHost(quick / "data")
    engine = host.create()
    states = [seen(engine)]
    for _ in range(6):
        engine.put_state(engine.state(), [0, 0, 0])
        states.append(seen(engine))
    host.die()
    host = ModelHost(quick / "data")
    engine = host.restore()
    if later == "full":
        engine.put_state(engine.state(), [0, 0, 0])
    host.die()
    name = quick / "data" / "models" / "m" / "journal-00000002"
    content = bytearray(name.read_bytes())
    content[len(content.rstrip(b"\0")) // 2] ^= 1
    name.write_bytes(content)
    with pytest.raises(CorruptError, match=name.name):
        read(quick / "data")
    for _ in range(2):  # the second start finds nothing wrong
        restored = read(quick / "data", accept_data_loss=True)
        assert restored in states[1:-1]
    assert name.with_name(name.name + ".corrupt").exists()
    assert read(quick / "data") == restored


def test_unfinished_models_and_files_are_removed(quick: Path) -> None:
    host = ModelHost(quick / "data")
    host.create()
    models = quick / "data" / "models"
    shutil.copytree(models / "m", models / ".half.0123abcd.new")
    (models / ".empty.0123abcd.new").mkdir()
    (models / "m" / "snapshot-00000009.safetensors.new").write_bytes(b"half")
    host.die()
    assert recovered(quick / "data").version == 0
    assert sorted(path.name for path in models.iterdir()) == ["m"]
    assert not list((models / "m").glob("*.new"))


def test_a_deleted_model_stays_deleted_and_its_name_is_free(quick: Path) -> None:
    for _ in range(2):
        with LocalServer(config(quick / "data")) as server, deltaserve.connect(server.target) as client:
            assert client.models() == []
            client.create_model("m", {"w": np.zeros(3, np.float32)})
            client.delete_model("m")
            client.create_model("m", {"w": np.ones(5, np.float32)})
            client.delete_model("m")
    assert not list((quick / "data" / "models").iterdir())


def test_a_slow_snapshot_of_a_deleted_model_does_not_reach_a_new_one_of_its_name(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model is frozen long before the first file of its snapshot is created."""
    begun, go_on = threading.Event(), threading.Event()
    really = snapshot.write

    def slowly(*given: object) -> object:
        if threading.current_thread().name == "old":
            begun.set()
            go_on.wait(1)  # the deletion waits for this, or the new model exists by then
        return really(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "write", slowly)
    with LocalServer(config(quick / "data")) as server, deltaserve.connect(server.target) as client:
        model = client.create_model("m", {"w": np.zeros(3, np.float32)})
        model.update(policy=deltaserve.Async())
        old = server._catalog.get("m")

        def save() -> None:
            try:
                server._catalog.save(old)
            except Refused:
                go_on.set()

        thread = threading.Thread(target=save, name="old")
        thread.start()
        assert begun.wait(10)
        client.delete_model("m")
        client.create_model("m", {"w": np.ones(3, np.float32)})
        go_on.set()
        thread.join(20)
        shutil.copytree(quick / "data", quick / "copy")
        assert np.frombuffer(read(quick / "copy").vectors[0], "<f4").tolist() == [1, 1, 1]


def test_a_model_that_recovers_during_a_lookup_is_never_unknown(quick: Path) -> None:
    """It appears right after the lookup."""
    with LocalServer(config(quick / "data")) as server, deltaserve.connect(server.target) as client:
        client.create_model("m", {"w": np.zeros(3, np.float32)})
        catalog = server._catalog
        recovering, engine = RecoveryProgress({"m": 1}), catalog.get("m")

        class Late(dict[str, ModelEngine]):
            def get(self, name: str, *_: object) -> ModelEngine | None:  # type: ignore[override]
                found = dict.get(self, name)
                if found is None:
                    self[name] = engine
                    recovering.done(name)
                return found

        catalog._models, catalog._recovery = Late(), recovering
        with pytest.raises(Refused, match="RECOVERING"):
            catalog.get("m")
        assert catalog.get("m") is engine


def test_memory_and_places_of_models_being_recovered_are_reserved(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise new models could take them, and the server could not recover."""
    size, really = 1000, recovery.recover
    small, large = 16 * size, 40 * size  # the weights of four versions; with three slots, each of them twice
    tight = config(quick / "data", memory_bytes=small + large + 100, models=2)
    with LocalServer(tight) as server, deltaserve.connect(server.target) as client:
        for name, optimizer in (("a", deltaserve.SGD()), ("b", deltaserve.Adam(amsgrad=True))):
            client.create_model(name, {"w": np.zeros(size, np.float32)}, optimizer=optimizer)
    again, asked = LocalServer(tight), []

    def recover(*given: Any, **more: Any) -> Any:
        asked.append(again._catalog.quotas.memory.available)
        with pytest.raises(Refused, match="MODEL_LIMIT"):
            again._catalog.check_room()
        return really(*given, **more)

    monkeypatch.setattr(recovery, "recover", recover)
    with again, deltaserve.connect(again.target) as client:
        assert asked == [100, 100]
        assert [model.name for model in client.models()] == ["a", "b"]
        client.delete_model("a")
        assert again._catalog.quotas.memory.available == small + 100


def test_a_shutdown_logs_a_model_without_a_last_snapshot(
    quick: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError

    server = LocalServer(config(quick / "data"))
    server.start()
    with deltaserve.connect(server.target) as client:
        worker = client.create_model("m", {"w": np.zeros(3, np.float32)}).worker()
        worker.step({"w": np.ones(3, np.float32)})
        monkeypatch.setattr(HostStore, "update", fault)
        with pytest.raises(deltaserve.ServerError):
            worker.step({"w": np.ones(3, np.float32)})
        assert not server.stop(0)
    assert "model m: the last snapshot failed, " in caplog.text


def test_a_cancelled_start_reports_a_missing_last_snapshot(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalServer(config(quick / "data")) as server, deltaserve.connect(server.target) as client:
        for name in "ab":
            client.create_model(name, {"w": np.zeros(3, np.float32)})
    again = LocalServer(config(quick / "data"))

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def check() -> None:
        if again._catalog.all():
            monkeypatch.setattr(ModelStorage, "close", fails)
            raise KeyboardInterrupt

    with pytest.raises(DataDirectoryError, match="the last snapshot of a model"):
        again.start(check)


def test_a_server_that_fails_to_start_releases_its_directory(quick: Path) -> None:
    (quick / "data" / "models" / "stranger").mkdir(parents=True)
    server = Server(config(quick / "data", bind="127.0.0.1:0"))
    with pytest.raises(DataDirectoryError):
        server.start()
    try:
        open_directory(quick / "data").close()
    finally:
        server.stop(grace_seconds=0)
