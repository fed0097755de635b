"""Models in a data directory without a server around them: the real parts, no gRPC, and time that the test owns."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.durability import checked, recovery
from deltaserve_server.durability.commits import Journaled
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.model_storage import Durability, Schedule
from deltaserve_server.engine import model_engine as applier_module
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import Budget, State, Store
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import Async, Layout, Machine, Policy, Tensor
from deltaserve_server.model.state import MachineState

TENSORS = (Tensor("w", (7, 11)), Tensor("b", (0,)), Tensor("v", (40,)))
EXECUTOR = ThreadPoolExecutor(1)
MEMORY = Budget(1 << 40)


class Clock:
    """The time that an engine is told: the real one, and what a test adds to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        monkeypatch.setattr(applier_module, "monotonic", lambda: time.monotonic() + self.ahead)


class Seen(NamedTuple):
    """All that a model is: its image, in which nothing waits, and its vectors, bit for bit."""

    version: int
    image: str
    vectors: tuple[bytes, bytes, bytes]


def make_store(weights: Vector) -> Store:
    return HostStore(weights, 0, MEMORY, EXECUTOR, 1)


def machine(name: str = "m", policy: Policy | None = None, tensors: Sequence[Tensor] = TENSORS) -> Machine:
    return Machine(name, Layout(tuple(tensors)), [Hyperparameters()], policy or Async())


def random(size: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


class House:
    """A data directory, and models in it.

    Args:
        path: Where.
        durability: What survives.
        updates: After so many a snapshot is due.
    """

    def __init__(self, path: Path, durability: str = "journal", updates: int | None = None) -> None:
        self.directory = DataDirectory(path, Schedule(durability=Durability(durability), updates=updates, seconds=None))
        self.engines: list[ModelEngine] = []

    def create(self, summary: Machine | None = None, seed: int = 0) -> ModelEngine:
        """Makes a model, as the registry does."""
        summary = summary or machine()
        weights = random(summary.layout.size, seed)
        zeros = np.zeros_like(weights)
        prepared = self.directory.prepare(summary, State(weights, zeros, zeros))
        return self._engine(summary, make_store(weights), self.directory.add(prepared, summary.name))

    def restore(self, name: str = "m", *, accept_data_loss: bool = False) -> ModelEngine:
        """Brings a model back, as the registry does."""
        came = recovery.recover(
            self.directory.folder(name),
            make_store,
            lambda _: None,
            accept_data_loss=accept_data_loss,
            sync=self.directory.durability is Durability.FSYNC,
        )
        storage = self.directory.storage(name, came.kept)
        engine = self._engine(came.machine, came.store, storage)
        if came.waited:
            engine.version_bumped()
        return engine

    def die(self) -> None:
        """Lets go of all files, as a process that dies."""
        for engine in self.engines:
            assert engine.storage
            commits = engine.storage.commits
            if isinstance(commits, Journaled):
                commits._journal._file.close()
        self.directory.close()

    def _engine(self, summary: Machine, store: Store, storage: Any) -> ModelEngine:
        engine = ModelEngine(summary, store, MEMORY.reserve(0), "incarnation", lambda _: None, storage)
        self.engines.append(engine)
        return engine


def recovered(path: Path, name: str = "m", durability: str = "journal", *, accept_data_loss: bool = False) -> Seen:
    """Returns what a server that starts in a data directory finds there; the directory is used up."""
    house = House(path, durability)
    try:
        return seen(house.restore(name, accept_data_loss=accept_data_loss))
    finally:
        house.die()


def read(path: Path, name: str = "m", *, accept_data_loss: bool = False) -> Seen:
    """The same without a server: only what `recover` finds."""
    from deltaserve_server.durability.files import Files
    from deltaserve_server.durability.folder import Folder

    folder = Folder(Files(path / "models" / name))
    came = recovery.recover(folder, make_store, lambda _: None, accept_data_loss=accept_data_loss, sync=False)
    return _seen(came.machine, came.store.state())


def seen(engine: ModelEngine) -> Seen:
    """Returns what a model is, as far as its workers were told."""
    return _seen(engine.machine, engine.state())


def awaited(engine: ModelEngine) -> Seen:
    """Returns what is to come back of a model whose server dies now."""
    return _seen(_resumed(engine.machine), engine.state())


def check_comes_back(got: Seen, engine: ModelEngine) -> None:
    """Fails where what came back is not what is to come back of a model.

    Whoever came too late for the open round, and whose first version is there by now, gets a further one where a
    snapshot says so, and none where a record of that version does. Either is right.
    """
    wanted = awaited(engine)
    late = [session for session in engine.machine.sessions.live() if not session.member]
    if got.version != wanted.version and late and all(s.first_version <= engine.machine.version for s in late):
        again = _read(engine.machine)
        for session in again.sessions.live():
            session.member = True
        again.resume(time.monotonic())
        wanted = _seen(again, engine.state())
    check_same(got, wanted)


def _read(summary: Machine) -> Machine:
    """Returns a machine that was written down and read."""
    return checked.unpacked(checked.packed(MachineState.of(summary)), MachineState, "image").machine(time.monotonic())


def _resumed(summary: Machine) -> Machine:
    again = _read(summary)
    again.resume(time.monotonic())
    return again


def text(summary: Machine) -> str:
    """Returns a machine's image as text; the updates in it are in order of versions."""
    image = MachineState.of(summary)
    ordered = replace(image, updates=tuple(sorted(image.updates, key=lambda update: update.version)))
    return msgspec.json.format(msgspec.json.encode(ordered), indent=1).decode()


def _seen(summary: Machine, state: State) -> Seen:
    vectors = state.weights.tobytes(), state.square_avg.tobytes(), state.acc_delta.tobytes()
    return Seen(summary.version, text(summary), vectors)


def check_same(got: Seen, wanted: Seen) -> None:
    """Fails where two differ, and says in what."""
    assert got.image.splitlines() == wanted.image.splitlines()
    assert got.vectors == wanted.vectors


def copied(source: Path, target: Path, change: Callable[[Path], None] | None = None) -> Path:
    """Copies a data directory, as it would be after a SIGKILL now."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    if change:
        change(target)
    return target
