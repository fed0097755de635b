"""Every optimizer comes back to the bit: slots, hyperparameters and each tensor's number of updates."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_host import MEMORY, OPTIMIZERS, TENSORS, ModelHost, check_comes_back, copied, machine, random, seen
from safetensors.numpy import load_file
from tests.support.optimizer_cases import over

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.durability import snapshot
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import State
from deltaserve_server.model import Push, Session, Tensor

through = pytest.mark.parametrize("through", ["journal", "snapshot"])


class Twins:
    """A model, and the same model in a server that was started from a copy of its data directory.

    Args:
        path: Place for both data directories.
        optimizer: The model's optimizer.
        through: What the second model recovers from: "journal" or "snapshot".
    """

    def __init__(self, path: Path, optimizer: Optimizer, through: str) -> None:
        self._path, self._through = path, through
        self._host = ModelHost(path / "data")
        self.engine = self._host.create(machine(optimizer=optimizer))
        self.session = self.engine.open_session("a", 100.0)

    def check(self) -> None:
        """Recovers the second model, and fails unless it is the same, now and after a further update."""
        if self._through == "snapshot":
            self.engine.save()
        host = ModelHost(copied(self._path / "data", self._path / "copy"))
        twin = host.restore()
        assert twin.storage
        assert (twin.storage.last.version == twin.machine.version) == (self._through == "snapshot")
        check_comes_back(seen(twin), self.engine)
        sequence = self.session.last_applied + 1
        for engine in (self.engine, twin):
            push(engine, self.session, sequence)
        check_comes_back(seen(twin), self.engine)
        host.die()
        self.close()

    def close(self) -> None:
        self._host.die()


def push(engine: ModelEngine, session: Session, sequence: int, absent: Collection[int] = ()) -> None:
    """Pushes a random gradient for the tensors that the session knows, without those in `absent`."""
    staging = engine.stage()
    for start, stop in engine.machine.layout.runs(session.tensor_count, absent):
        staging.add(start, random(stop - start, sequence))
    given = Push(
        session_id=session.id, epoch=session.epoch, sequence=sequence, absent=frozenset(absent), fingerprint=sequence
    )
    engine.push(given, staging, MEMORY.reserve(0))


@through
@over(OPTIMIZERS)
def test_it_comes_back_after_absent_tensors_and_an_extension(quick: Path, optimizer: Any, through: str) -> None:
    """Each tensor has had another number of updates, and the new ones begin with their own group's initial slots."""
    twins = Twins(quick, optimizer, through)
    push(twins.engine, twins.session, 1, absent={0})
    push(twins.engine, twins.session, 2)
    group = replace(optimizer, lr=optimizer.lr / 3)
    if optimizer.kind == "adagrad":
        group = replace(group, initial_accumulator_value=3.0)
    tensors = [Tensor("x", (5,), 0), Tensor("y", (3, 2), 1), Tensor("z", (2,), 1)]
    twins.engine.extend(tensors, [group], random(13, 3), MEMORY.reserve(0))
    twins.session = twins.engine.open_session("a", 100.0)
    push(twins.engine, twins.session, 1, absent={2, 5})
    assert twins.engine.machine.update_counts == (2, 3, 2, 1, 1, 0)
    twins.check()


@through
@over(OPTIMIZERS)
def test_it_comes_back_after_its_state_was_put(quick: Path, optimizer: Optimizer, through: str) -> None:
    twins = Twins(quick, optimizer, through)
    push(twins.engine, twins.session, 1)
    before = twins.engine.state()
    slots = tuple(slot + np.float32(0.25) for slot in before.slots)
    twins.engine.put_state(State(before.weights + 1, slots), [0, 7, 1_000_000])
    push(twins.engine, twins.session, 2)
    push(twins.engine, twins.session, 3, absent={0})
    assert twins.engine.machine.update_counts == (1, 9, 1_000_002)
    twins.check()


@over(OPTIMIZERS)
def test_any_reader_of_safetensors_finds_the_slots_of_a_snapshot_by_name(quick: Path, optimizer: Optimizer) -> None:
    twins = Twins(quick, optimizer, "snapshot")
    push(twins.engine, twins.session, 1)
    entry, state = twins.engine.save(), twins.engine.state()
    found = load_file(quick / "data" / "models" / "m" / snapshot.tensors_name(entry.number))
    names, offsets = ["weights", *(slot.name for slot in optimizer.slots)], twins.engine.machine.layout.offsets
    assert found.keys() == {f"{name}/{tensor.name}" for name in names for tensor in TENSORS}
    for name, vector in zip(names, state.vectors, strict=True):
        for tensor, start, stop in zip(TENSORS, offsets, offsets[1:], strict=False):
            np.testing.assert_array_equal(found[f"{name}/{tensor.name}"], vector[start:stop].reshape(tensor.shape))
    twins.close()
