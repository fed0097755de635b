"""A small data directory that a real server has left behind, and trials of what a damaged copy of it gives."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import NamedTuple

import numpy as np
from house import Seen, awaited, read

import deltaserve
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability import snapshot
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Folder
from deltaserve_server.durability.journal import JournalReader

KINDS = {"tensors": ".safetensors", "manifest": ".json", "head": "head.json", "journal": "journal-"}


class Left(NamedTuple):
    """What a server has left behind.

    Attributes:
        path: The data directory.
        files: What is in the model's folder.
        history: What the model was after each call, the newest last.
        ends: Where each record of the newest journal ends.
    """

    path: Path
    files: dict[str, bytes]
    history: list[Seen]
    ends: list[int]

    @property
    def used(self) -> int:
        """Bytes of the newest journal that hold records."""
        return self.ends[-1]

    @property
    def folder(self) -> Path:
        return self.path / "models" / "m"

    def names(self, kind: str) -> list[str]:
        """The files of a kind, oldest first."""
        mark = KINDS[kind]
        found = [n for n in sorted(self.files) if (n.endswith(mark) if kind != "journal" else n.startswith(mark))]
        return [name for name in found if kind == "head" or name != "head.json"]

    @contextmanager
    def damaged(self, name: str, content: bytes | None) -> Iterator[None]:
        """Has other bytes in a file meanwhile, or none; afterwards all is as it was."""
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
    """What has come of trials, by kind of file.

    Args:
        left: The data directory.
        full: What an undamaged copy gives.
    """

    def __init__(self, left: Left) -> None:
        self.left = left
        self.full = left.history[-1]
        self.counts: Counter[str] = Counter()

    def judge(
        self, name: str, content: bytes | None, allowed: Callable[[Seen], bool] | None = None, also: str = ""
    ) -> None:
        """Brings a damaged copy back.

        Args:
            name: The file that is damaged.
            content: What is in it; None: it is missing.
            allowed: Says of a shorter history whether it is one that may come back.
            also: Another file, which an error may name: where the first one ends too early, this one does not follow.
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
        assert allowed, f"{name}: version {got.version} came back without a word"
        assert allowed(got), f"{name}: version {got.version} never was, or is not one that may come back"
        self.counts["shorter"] += 1


def leave(path: Path, durability: str = "journal") -> Left:
    """Has a real server make a data directory, and copies it while that server lives."""
    config = ServerConfig(device="cpu", data_dir=path / "live", durability=durability, snapshot_seconds=None)  # type: ignore[arg-type]
    history: list[Seen] = []
    chance = np.random.default_rng(5)
    with LocalServer(config) as server, deltaserve.connect(server.target) as client:
        shapes = {"w": (7, 11), "b": (0,), "v": (40,)}
        model = client.create_model("m", {name: chance.random(shape, np.float32) for name, shape in shapes.items()})
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
            model.update(groups=[deltaserve.Hyperparameters(lr=0.5)])
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
    """Waits for the snapshot that a change asks for: which files there are is then always the same."""
    storage = server._catalog.get("m").storage
    assert storage
    while storage._saved_index != storage.commits.index:
        sleep(0.01)
    with storage._saving:
        pass  # what is not needed any more is removed


def left(path: Path, history: list[Seen]) -> Left:
    """Looks at what was left."""
    files = {found.name: found.read_bytes() for found in sorted((path / "models" / "m").iterdir())}
    held = Files(path / "models" / "m")
    manifest = snapshot.read_manifest(held, Folder(held).snapshots()[-1])
    assert manifest.journal
    reading = JournalReader(held, manifest.journal, manifest.index, lost_power=False)
    return Left(path, files, history, [reading.size for _ in reading.records()])
