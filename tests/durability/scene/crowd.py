"""Random calls to one model: workers join, push, repeat pushes and leave."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from histories import ASYNC, BOUNDED, SYNC
from model_host import MEMORY, Clock

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import State
from deltaserve_server.model import Policy, Push, Refused, Session, Tensor
from deltaserve_server.optimizers.formats import Values

POLICIES: tuple[Policy, ...] = (*SYNC, *ASYNC, *BOUNDED)
WORKERS = ("a", "b", "c", "d")
LEASE = 100.0


class Crowd:
    """Workers that make random calls to a model.

    Args:
        engine: The model.
        seed: Seed of the calls.
        clock: The model's time.

    Attributes:
        engine: The model; tests replace it after a recovery.
        done: Number of calls by name and outcome.
    """

    def __init__(self, engine: ModelEngine, seed: int, clock: Clock) -> None:
        self.engine = engine
        self.clock = clock
        self.chance = random.Random(seed)
        self.done: dict[str, int] = {}
        self.sessions: dict[str, Session] = {}
        self._calls: dict[str, tuple[int, Callable[[], object]]] = {
            "push": (60, self.push),
            "push again": (6, self.push_again),
            "open": (8, self.open),
            "close": (3, self.close),
            "tick": (8, self.tick),
            "expire": (2, self.expire),
            "change policy": (5, self.change_policy),
            "change groups": (2, self.change_groups),
            "put state": (2, self.put_state),
            "extend": (2, self.extend),
            "save": (3, self.save),
        }

    def act(self) -> str:
        """Makes one call and returns its name."""
        name = self.chance.choices(list(self._calls), [often for often, _ in self._calls.values()])[0]
        try:
            self._calls[name][1]()
        except Refused as refusal:
            if refusal.reason in ("INTERNAL", "STORAGE_UNAVAILABLE"):
                raise
            name = f"{name}: {refusal.reason}"
        self.done[name] = self.done.get(name, 0) + 1
        return name

    def push(self, sequence: int = 0) -> None:
        """Sends a worker's next push, or an earlier one: `sequence` is added to the next number."""
        session = self._live()
        layout = self.engine.machine.layout
        count = session.tensor_count
        absent = frozenset(k for k in range(count) if self.chance.random() < 0.15)
        number = session.last_accepted + 1 + sequence
        age = self.chance.choice((0, 0, 0, 1, 2, None))
        carried = self.chance.choice((*[None] * 8, *self._variants()[1:]))
        seed = abs(number) * 1000 + session.epoch
        push = Push(
            session_id=session.id,
            epoch=session.epoch,
            sequence=number,
            base_version=None if age is None else max(self.engine.machine.version - age, 0),
            hyperparameters=(carried,) * session.group_count if carried else None,
            absent=absent,
            weight=self.chance.choice((1.0, 1.0, 3.0, 1e-9, 1e9)),
            fingerprint=seed,
            norm=self.chance.choice((0.5, 1.0, 3.0, 7.5)),
        )
        staging = self.engine.stage()
        kind, length = self.chance.choice(("<f4", "<f4", "<f2", "<u2")), self.chance.choice((5, 1 << 18))
        for start, stop in layout.runs(count, absent):
            values = _values(stop - start, seed, kind)
            for at in range(0, stop - start, length):
                staging.add(start + at, values[at : at + length])
        self.engine.push(push, staging, MEMORY.reserve(0))

    def push_again(self) -> None:
        self.push(self.chance.choice((-1, -1, -2, -8, -9, 1)))

    def open(self) -> None:
        worker, machine = self.chance.choice(WORKERS), self.engine.machine
        tensors = self.chance.choice((None, None, 1, len(machine.layout.tensors)))
        lease = self.chance.choice((LEASE, 3 * LEASE))
        self.sessions[worker] = self.engine.open_session(worker, lease, tensors)

    def close(self) -> None:
        session = self._live()
        self.engine.close_session(session.id, session.epoch)

    def tick(self) -> None:
        self.clock.ahead += self.chance.choice((0.0, 0.5, 2.0, 6.0))
        self.engine.tick()

    def expire(self) -> None:
        self.clock.ahead += 1.1 * LEASE
        self.engine.tick()

    def change_policy(self) -> None:
        policy = self.chance.choice(POLICIES)
        self.engine.change(self.engine.machine.configuration()[0], policy)

    def change_groups(self) -> None:
        groups, policy = self.engine.machine.configuration()
        self.engine.change(tuple(self.chance.choice(self._variants()) for _ in groups), policy)

    def put_state(self) -> None:
        machine = self.engine.machine
        size, chance = machine.layout.size, np.random.default_rng(self.chance.randrange(1 << 30))
        least = [max(slot.minimum, -0.5) for slot in machine.slots]
        slots = tuple(chance.random(size, np.float32) + np.float32(low) for low in least)
        state = State(chance.random(size, np.float32), slots)
        self.engine.put_state(state, [self.chance.randrange(9) for _ in machine.layout.tensors])

    def extend(self) -> None:
        machine = self.engine.machine
        if len(machine.layout.tensors) > 7:
            return
        groups = self._variants()[1:2] if self.chance.random() < 0.5 else ()
        name, size = f"t{len(machine.layout.tensors)}", self.chance.choice((0, 1, 9))
        group = len(machine.groups) if groups else 0
        weights = np.full(size, 0.5, np.float32)
        self.engine.extend([Tensor(name, (size,), group)], groups, weights, MEMORY.reserve(0))

    def save(self) -> None:
        self.engine.save()

    def _variants(self) -> tuple[Optimizer, ...]:
        """Returns the model's optimizer with different hyperparameters."""
        optimizer: Any = self.engine.machine.initial_settings[0][0]
        return optimizer, replace(optimizer, lr=optimizer.lr / 4), replace(optimizer, weight_decay=0.5, maximize=True)

    def _live(self) -> Session:
        """Returns a session, usually a live one; opens one if there is none."""
        if not self.sessions:
            self.open()
        return self.chance.choice(list(self.sessions.values()))


def _values(size: int, seed: int, kind: str) -> Values:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if kind == "<u2":  # bfloat16: the upper half
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)
