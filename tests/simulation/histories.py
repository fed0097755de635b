"""Random histories for the simulation: events, their frequencies, and policies."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from deltaserve._common.optimizers import OPTIMIZERS, Adadelta, Optimizer
from deltaserve_server.model import Async, Bounded, Policy, Sync

NAMES = ("a10", "B", "a9", "c", "d", "b7")
LEASES = (6.0, 10.0, 20.0)
WEIGHTS = (1.0, 1.0, 32.0, 0.1, 1e-9, 1e9)
NORMS = (0.0, 0.5, 3.0, 7.5)
GROUPS: tuple[Mapping[str, float], ...] = ({"lr": 1.0}, {"lr": 0.25}, {"weight_decay": 0.5})
CARRIED: tuple[Mapping[str, float] | None, ...] = (*[None] * 8, {"lr": 0.5}, {"lr": 0.5, "maximize": True})
ABSENT = (frozenset[int](), frozenset[int](), frozenset({0}), frozenset({0, 1}))

Kind = Literal[
    "push", "check", "open", "close", "keep", "lose the answer", "tick", "put state", "extend", "change", "ask"
]  # fmt: skip


class Event(NamedTuple):
    """One event. Most fields concern pushes alone.

    Attributes:
        kind: What happens.
        wait: Seconds that pass before it.
        worker: Index of the worker in NAMES.
        session: 0 for the worker's newest session, 1 for the one before, and so on.
        number: For a push, an offset to the next sequence number; for other events, a choice among variants.
        age: How many versions old the base of a push is; None means that it has none.
        weight: Weight of a push.
        norm: Norm of a push.
        carried: What a push changes of the optimizer in the hyperparameters that it carries for every group; None
            means that it carries none.
        surplus: How many more groups a push carries than its session knows.
        absent: Tensors without a gradient.
        twisted: Whether the values differ from the usual ones of this sequence number.
        stranger: 1 for an unknown session, 2 for a wrong epoch, 0 for neither.
        patient: Whether a worker that waits for an answer lets the next worker push instead.
    """

    kind: Kind
    wait: float = 0.0
    worker: int = 0
    session: int = 0
    number: int = 0
    age: int | None = 0
    weight: float = 1.0
    norm: float = 0.0
    carried: Mapping[str, float] | None = None
    surplus: int = 0
    absent: frozenset[int] = frozenset()
    twisted: bool = False
    stranger: int = 0
    patient: bool = False


@dataclass(frozen=True)
class Scenario:
    """What a simulation is about.

    Attributes:
        policies: Its policies, of which it begins with the first.
        often: The events that are more frequent than usual.
        optimizer: The model's optimizer.
    """

    policies: tuple[Policy, ...]
    often: tuple[tuple[Kind, int], ...] = ()
    optimizer: Optimizer = field(default_factory=Adadelta)


SYNC = (
    Sync(),
    Sync(min_workers=3),
    Sync(min_workers=2, quorum=3, grace_seconds=1.0),
    Sync(quorum=1, grace_seconds=0.5),
    Sync(min_workers=2, quorum=2),
    Sync(min_workers=3, round_timeout_seconds=4.0),
    Sync(min_workers=2, quorum=4, grace_seconds=2.0, round_timeout_seconds=3.0),
    Sync(clip_norm=2.0, round_timeout_seconds=5.0),
    Sync(min_workers=3, reduction="median", clip_norm=4.0),
    Sync(min_workers=3, reduction="trimmed_mean", trim=1, quorum=3, round_timeout_seconds=2.0),
)
ASYNC = (Async(), Async(max_staleness=2), Async(max_staleness=0), Async(damping=True, max_staleness=4))
BOUNDED = (Bounded(), Bounded(slack=1), Bounded(slack=3))

SCENARIOS = {
    "sync": Scenario(SYNC[:1]),
    "sync, min_workers": Scenario(SYNC[1:2]),
    "sync, quorum": Scenario(SYNC[2:5]),
    "sync, round_timeout": Scenario(SYNC[5:8]),
    "sync, robust": Scenario(SYNC[8:]),
    "sync, any": Scenario(SYNC, often=(("change", 12), ("extend", 6))),
    "async": Scenario(ASYNC),
    "bounded": Scenario(BOUNDED),
    "any": Scenario((*SYNC, *ASYNC, *BOUNDED), often=(("change", 12),)),
}

_OFTEN: dict[Kind, int] = {
    "push": 300,
    "check": 12,
    "open": 14,
    "close": 6,
    "keep": 14,
    "lose the answer": 8,
    "tick": 40,
    "put state": 2,
    "extend": 2,
    "change": 3,
    "ask": 16,
}


def scenario_of(name: str, seed: int) -> Scenario:
    """Returns a scenario with the optimizer that a seed chooses: the scenarios of one seed have different ones."""
    kinds = list(OPTIMIZERS.values())
    kind = kinds[(list(SCENARIOS).index(name) + seed) % len(kinds)]
    return replace(SCENARIOS[name], optimizer=kind())


def history(scenario: Scenario, seed: int, events: int) -> list[Event]:
    """Returns random events.

    The seed chooses the number of workers and the frequency of each event, so that histories differ in kind: some have
    workers that come and go, some have long waits, some have hardly anything but pushes. Events are drawn from a pool
    of 997, which is faster than making each anew.
    """
    chance = random.Random(seed)
    workers = chance.choice((2, 3, 4, 4, 5, 6))
    often = _OFTEN | dict(scenario.often)
    often = {kind: count * (kind == "push" or chance.choice((0, 1, 1, 4, 10))) for kind, count in often.items()}
    kinds = chance.choices(list(often), list(often.values()), k=997)
    return chance.choices([_event(kind, chance, workers) for kind in kinds], k=events)


def _event(kind: Kind, chance: random.Random, workers: int) -> Event:
    waits, likely = ((0.25, 0.5, 1.0, 12.0), (40, 30, 25, 1)) if kind == "tick" else ((0.0, 0.25), (9, 1))
    numbers, how_often = (0, -1, -2, -7, -8, -9, 1), (120, 14, 2, 2, 2, 2, 2)
    relative = kind in ("push", "check", "ask")
    return Event(
        kind=kind,
        wait=chance.choices(waits, likely)[0],
        worker=chance.randrange(workers),
        session=chance.choices((0, 1, 2), (60, 1, 1))[0],
        number=chance.choices(numbers, how_often)[0] if relative else chance.randrange(1000),
        age=chance.choices((0, 1, 2, 3, 6, -1, None), (30, 5, 3, 2, 1, 1, 5))[0],
        weight=chance.choice(WEIGHTS),
        norm=chance.choice(NORMS),
        carried=chance.choice(CARRIED),
        surplus=chance.choices((0, 1), (15, 1))[0],
        absent=chance.choice(ABSENT),
        twisted=chance.random() < 0.02,
        stranger=chance.choices((0, 1, 2), (80, 1, 1))[0],
        patient=chance.random() < 0.8,
    )
