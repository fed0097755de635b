"""Models in a data directory, without gRPC, and with a clock that the test advances."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
import pytest
from tests.support.optimizer_cases import STRUCTURES

from deltaserve._common.optimizers import SGD, Adagrad, Optimizer
from deltaserve_server.durability import checked, model_storage, recovery
from deltaserve_server.durability.commits import Journaled
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.model_storage import Durability, Schedule
from deltaserve_server.engine.clock import SYSTEM_CLOCK
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import Budget, State, Store, initial_state
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import Async, Layout, Machine, Policy, Tensor
from deltaserve_server.model.state import MachineState

TENSORS = (Tensor("w", (7, 11)), Tensor("b", (0,)), Tensor("v", (40,)))
OPTIMIZERS: tuple[Optimizer, ...] = (
    *STRUCTURES,
    SGD(momentum=0.9, dampening=0.5),
    Adagrad(lr_decay=0.1, initial_accumulator_value=0.5),
)
EXECUTOR = ThreadPoolExecutor(1)
MEMORY = Budget(1 << 40)


def optimizer_of(seed: str) -> Optimizer:
    """Returns the optimizer that a seed chooses."""
    return OPTIMIZERS[crc32(seed.encode()) % len(OPTIMIZERS)]


class Clock:
    """The time of a model: the real one, plus what a test adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        monkeypatch.setattr(SYSTEM_CLOCK, "monotonic", lambda: time.monotonic() + self.ahead)


class Seen(NamedTuple):
    """The whole state of a model: its state machine as text, and its vectors."""

    version: int
    image: str
    vectors: tuple[bytes, ...]


def make_store(state: State, _: Optimizer) -> Store:
    return HostStore(state, 0, MEMORY, EXECUTOR, 1)


def machine(
    name: str = "m",
    policy: Policy | None = None,
    tensors: Sequence[Tensor] = TENSORS,
    optimizer: Optimizer = OPTIMIZERS[0],
) -> Machine:
    return Machine(name, Layout(tuple(tensors)), [optimizer], policy or Async())


def random(size: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


class ModelHost:
    """A data directory and its models.

    Args:
        path: The directory.
        durability: What survives.
        updates: Number of updates after which a snapshot is due.
        seconds: Seconds after which one is due.
        time: The clock for snapshots.
    """

    def __init__(
        self,
        path: Path,
        durability: str = "journal",
        updates: int | None = None,
        seconds: float | None = None,
        time: model_storage.Clock = time,
    ) -> None:
        schedule = Schedule(durability=Durability(durability), updates=updates, seconds=seconds)
        self.directory = DataDirectory(path, schedule, time)
        self.engines: list[ModelEngine] = []

    def create(self, summary: Machine | None = None, seed: int = 0) -> ModelEngine:
        """Creates a model, as the catalog does."""
        summary = summary or machine()
        state = initial_state(random(summary.layout.size, seed), summary.layout, summary.groups)
        prepared = self.directory.prepare(summary, state)
        store = make_store(state, summary.groups[0])
        return self._engine(summary, store, self.directory.add(prepared, summary.name))

    def restore(self, name: str = "m", *, accept_data_loss: bool = False) -> ModelEngine:
        """Recovers a model, as the catalog does."""
        recovered_model = recovery.recover(
            self.directory.folder(name),
            make_store,
            lambda _: None,
            accept_data_loss=accept_data_loss,
            sync=self.directory.durability is Durability.FSYNC,
        )
        storage = self.directory.storage(name, recovered_model.stored)
        engine = self._engine(recovered_model.machine, recovered_model.store, storage)
        if recovered_model.version_bumped:
            engine.version_bumped()
        return engine

    def die(self) -> None:
        """Closes all files, as a killed process does."""
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
    """Returns what a server recovers from a data directory. The directory is changed by that."""
    host = ModelHost(path, durability)
    try:
        return seen(host.restore(name, accept_data_loss=accept_data_loss))
    finally:
        host.die()


def read(path: Path, name: str = "m", *, accept_data_loss: bool = False) -> Seen:
    """Returns what `recover` finds, without serving it."""
    from deltaserve_server.durability.files import Files
    from deltaserve_server.durability.folder import Folder

    folder = Folder(Files(path / "models" / name))
    recovered_model = recovery.recover(
        folder, make_store, lambda _: None, accept_data_loss=accept_data_loss, sync=False
    )
    return _seen(recovered_model.machine, recovered_model.store.state())


def seen(engine: ModelEngine) -> Seen:
    """Returns the present state of a model."""
    return _seen(engine.machine, engine.state())


def awaited(engine: ModelEngine) -> Seen:
    """Returns the state that recovery must find if the server is killed now."""
    return _seen(_resumed(engine.machine), engine.state())


def check_comes_back(got: Seen, engine: ModelEngine) -> None:
    """Fails if a recovered state is not that of the model.

    A session that joined too late for the open round, and whose first version exists by now, gets another version if a
    snapshot has it, and none if a record of that version does. Both are right.
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
    """Returns a machine after encoding and decoding its state."""
    return checked.unpacked(checked.packed(MachineState.of(summary)), MachineState, "image").machine(time.monotonic())


def _resumed(summary: Machine) -> Machine:
    again = _read(summary)
    again.resume(time.monotonic())
    return again


def text(summary: Machine) -> str:
    """Returns a machine's state as text, with updates in order of versions."""
    image = MachineState.of(summary)
    ordered = replace(image, updates=tuple(sorted(image.updates, key=lambda update: update.version)))
    return msgspec.json.format(msgspec.json.encode(ordered), indent=1).decode()


def _seen(summary: Machine, state: State) -> Seen:
    return Seen(summary.version, text(summary), tuple(vector.tobytes() for vector in state.vectors))


def check_same(got: Seen, wanted: Seen) -> None:
    """Fails if two states differ, and shows how."""
    assert got.image.splitlines() == wanted.image.splitlines()
    assert got.vectors == wanted.vectors


def copied(source: Path, target: Path, change: Callable[[Path], None] | None = None) -> Path:
    """Copies a data directory: the copy is what a SIGKILL now would leave."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    if change:
        change(target)
    return target
