"""ListSnapshots while snapshots, the model or the disk disappear."""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "service"))

from messages import asynchronous
from wire import Wire

from deltaserve.v1.model_service_pb2 import ListSnapshotsRequest
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability import snapshot
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Folder

ASKED = ListSnapshotsRequest(model="m")


@pytest.fixture
def server(quick: Path) -> Iterator[LocalServer]:
    with LocalServer(ServerConfig(device="cpu", data_dir=quick / "data", snapshot_seconds=None)) as server:
        yield server


@pytest.fixture
def wire(server: LocalServer) -> Iterator[Wire]:
    with Wire(server.target) as wire:
        wire.create("m", {"w": (4,)}, policy=asynchronous())
        yield wire


def numbers(wire: Wire) -> list[int]:
    return [one.number for one in wire.one("ListSnapshots", ASKED).snapshots]


def before(monkeypatch: pytest.MonkeyPatch, room: object, name: str, happens: Callable[[], object]) -> None:
    """Runs something before the first call of a function."""
    really, left = getattr(room, name), [happens]

    def call(*given: object) -> object:
        if left:
            left.pop()()
        return really(*given)

    monkeypatch.setattr(room, name, call)


def test_snapshots_that_are_replaced_while_they_are_listed(
    server: LocalServer, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save() -> None:
        for _ in range(2):
            server._catalog.save(server._catalog.get("m"))

    assert numbers(wire) == [1]
    before(monkeypatch, snapshot, "read_manifest", save)
    assert numbers(wire) == [2, 3]


@pytest.mark.parametrize("place", ["entries", "snapshots"])
def test_a_model_that_is_deleted_before_its_folder_is_read(
    server: LocalServer, wire: Wire, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before(monkeypatch, Folder, place, lambda: server._catalog.delete("m"))
    assert wire.refused("ListSnapshots", ASKED).reason == "MODEL_NOT_FOUND"


def test_a_model_that_is_being_deleted(server: LocalServer, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is gone, its name is not yet."""
    removed, go_on, really = threading.Event(), threading.Event(), DataDirectory.remove

    def remove(directory: DataDirectory, name: str) -> None:
        really(directory, name)
        removed.set()
        go_on.wait(0.5)  # the listing waits for this

    monkeypatch.setattr(DataDirectory, "remove", remove)
    deletion = threading.Thread(target=server._catalog.delete, args=("m",))

    def delete() -> None:
        deletion.start()
        assert removed.wait(10)

    before(monkeypatch, Folder, "entries", delete)
    assert wire.refused("ListSnapshots", ASKED).reason == "MODEL_NOT_FOUND"
    go_on.set()
    deletion.join(10)


def test_a_folder_that_cannot_be_read(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(_: Files) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(Files, "names", names)
        refusal = wire.refused("ListSnapshots", ASKED)
    assert (refusal.reason, refusal.metadata["why"]) == ("STORAGE_UNAVAILABLE", "Input/output error")
    assert refusal.retry_seconds
    assert numbers(wire) == [1]
