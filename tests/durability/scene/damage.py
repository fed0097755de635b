"""The data directory of a killed server, and trials of damaged copies."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import NamedTuple

import numpy as np
from model_host import Seen, awaited, read

import deltaserve
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability import snapshot
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Folder
from deltaserve_server.durability.journal import JournalReader

KINDS = {"tensors": ".safetensors", "manifest": ".json", "head": "head.json", "journal": "journal-"}


class Left(NamedTuple):
    """The data directory of a killed server.

    Attributes:
        path: The data directory.
        files: Content of the model's folder.
        history: State of the model after each call, newest last.
        ends: Where each record of the newest journal ends.
    """

    path: Path
    files: dict[str, bytes]
    history: list[Seen]
    ends: list[int]

    @property
    def used(self) -> int:
        """Bytes of the newest journal that contain records."""
        return self.ends[-1]

    @property
    def folder(self) -> Path:
        return self.path / "models" / "m"

    def names(self, kind: str) -> list[str]:
        """Returns the files of a kind, oldest first."""
        mark = KINDS[kind]
        found = [n for n in sorted(self.files) if (n.endswith(mark) if kind != "journal" else n.startswith(mark))]
        return [name for name in found if kind == "head" or name != "head.json"]

    @contextmanager
    def damaged(self, name: str, content: bytes | None) -> Iterator[None]:
        """Replaces or removes a file for the block."""
        target, there = self.folder / name, {path.name for path in self.folder.iterdir()}
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)
        try:
            yield
        finally:
            for path in self.folder.iterdir():
                if path.name not in self.files:
                    path.unlink()
            for held, whole in self.files.items():
                path = self.folder / held
                if held == name or held.startswith("journal") or (held in there and not path.exists()):
                    path.write_bytes(whole)


class Verdicts:
    """Judges recoveries from damaged copies and counts the outcomes.

    Args:
        left: The data directory.
    """

    def __init__(self, left: Left) -> None:
        self.left = left
        self.full = left.history[-1]
        self.counts: Counter[str] = Counter()

    def judge(
        self, name: str, content: bytes | None, allowed: Callable[[Seen], bool] | None = None, also: str = ""
    ) -> None:
        """Recovers from a damaged copy.

        Args:
            name: The damaged file.
            content: Its content; None if it is missing.
            allowed: Returns whether a shorter history is acceptable.
            also: Another file that an error may name, because it does not continue a damaged one.
        """
        with self.left.damaged(name, content):
            try:
                got = read(self.left.path)
            except CorruptError as error:
                if name not in error.where and (not also or also not in error.where):
                    raise
                self.counts["named"] += 1
                return
        if got == self.full:
            self.counts["all there"] += 1
            return
        assert allowed, f"{name}: version {got.version} came back silently"
        assert allowed(got), f"{name}: version {got.version} never was, or is not one that may come back"
        self.counts["shorter"] += 1


def leave(path: Path, durability: str = "journal") -> Left:
    """Runs a server and copies its data directory while it runs, which equals a kill."""
    config = ServerConfig(device="cpu", data_dir=path / "live", durability=durability, snapshot_seconds=None)  # type: ignore[arg-type]
    history: list[Seen] = []
    chance = np.random.default_rng(5)
    with LocalServer(config) as server, deltaserve.connect(server.target) as client:
        shapes = {"w": (7, 11), "b": (0,), "v": (40,)}
        weights = {name: chance.random(shape, np.float32) for name, shape in shapes.items()}
        model = client.create_model("m", weights, optimizer=deltaserve.Adam())
        engine = server._catalog.get("m")

        def note() -> None:
            history.append(awaited(engine))

        def step(worker: deltaserve.Worker, count: int, **more: tuple[int, ...]) -> None:
            for _ in range(count):
                given = {name: chance.standard_normal(s).astype(np.float32) for name, s in (shapes | more).items()}
                worker.step(given)
                note()

        note()
        with model.worker("a", lease_seconds=900.0) as worker:
            note()
            step(worker, 4)
            model.save_snapshot()
            step(worker, 3)
            model.update(policy=deltaserve.Async())
            note()
            _settled(server)
            model.put_state(model.pull_state())
            note()
            _settled(server)
            step(worker, 2)
            model.save_snapshot()
            step(worker, 2)
            model.update(groups=[deltaserve.Adam(lr=0.5)])
            note()
            _settled(server)
            step(worker, 3)
            with model.worker("b", lease_seconds=900.0) as other:
                note()
                step(other, 2)
            note()
            step(worker, 2)
            shutil.copytree(path / "live", path / "left")
    return left(path / "left", history)


def _settled(server: LocalServer) -> None:
    """Waits for the snapshot that a change requests, so that the files are always the same."""
    storage = server._catalog.get("m").storage
    assert storage
    while storage._saved_index != storage.commits.index:
        sleep(0.01)
    with storage._saving:
        pass  # old files are removed by now


def left(path: Path, history: list[Seen]) -> Left:
    """Reads a data directory."""
    files = {found.name: found.read_bytes() for found in sorted((path / "models" / "m").iterdir())}
    held = Files(path / "models" / "m")
    manifest = snapshot.read_manifest(held, Folder(held).snapshots()[-1])
    assert manifest.journal
    reading = JournalReader(held, manifest.journal, manifest.index, lost_power=False)
    return Left(path, files, history, [reading.size for _ in reading.records()])
