"""Random histories for the simulation: what happens, how often, under which policies."""

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

from deltaserve_server.model import Async, Bounded, Hyperparameters, Policy, Sync

NAMES = ("a10", "B", "a9", "c", "d", "b7")
LEASES = (6.0, 10.0, 20.0)
WEIGHTS = (1.0, 1.0, 32.0, 0.1, 1e-9, 1e9)
NORMS = (0.0, 0.5, 3.0, 7.5)
GROUPS = (Hyperparameters(), Hyperparameters(lr=0.25), Hyperparameters(rho=0.5))
CARRIED = (*[None] * 8, Hyperparameters(lr=0.5), Hyperparameters(lr=0.5, maximize=True))
ABSENT = (frozenset[int](), frozenset[int](), frozenset({0}), frozenset({0, 1}))

Kind = Literal[
    "push", "check", "open", "close", "keep", "lose the answer", "tick", "put state", "extend", "change", "ask"
]  # fmt: skip


class Event(NamedTuple):
    """One event; most fields are for pushes alone.

    Attributes:
        kind: What happens.
        wait: Seconds that pass before it.
        worker: Whose it is, an index of NAMES.
        session: 0 for the worker's newest session, 1 for the one before, and so on.
        number: Added to the number that is due; for other events, which of several.
        age: How many versions the push's base is old; None is unset.
        weight: The push's weight.
        norm: Its norm.
        carried: Hyperparameters of the first group, and of the others.
        surplus: How many more groups it carries than there are.
        absent: Tensors without a gradient.
        twisted: The values are others than this number's usual ones.
        stranger: 1: the session is none; 2: the epoch is not the session's.
        patient: Whoever waits for an answer does not push; the next worker that does not wait pushes instead.
    """

    kind: Kind
    wait: float = 0.0
    worker: int = 0
    session: int = 0
    number: int = 0
    age: int | None = 0
    weight: float = 1.0
    norm: float = 0.0
    carried: Hyperparameters | None = None
    surplus: int = 0
    absent: frozenset[int] = frozenset()
    twisted: bool = False
    stranger: int = 0
    patient: bool = False


@dataclass(frozen=True)
class Scenario:
    """What a simulation is like: its policies, the first of which it begins with, and what happens more often."""

    policies: tuple[Policy, ...]
    often: tuple[tuple[Kind, int], ...] = ()


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


def history(scenario: Scenario, seed: int, events: int) -> list[Event]:
    """Returns random events.

    The seed chooses how many workers there are and how often what happens, so that histories are of many kinds: with
    workers that come and go, with time that flies, with nothing but pushes. Events are drawn from some hundreds that
    the seed chose: that is fast, and still all mix.
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
