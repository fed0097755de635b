"""Which faults there are, and what a process is told of those that it brings about itself."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from deck import Deck

SERVER_POINTS: Mapping[str, tuple[str, ...]] = {
    "push.headers": ("sleep", "stop", "error"),
    "push.chunk": ("sleep", "stop", "error"),
    "push.admitted": ("sleep", "stop", "error"),
    "push.staged": ("sleep", "stop", "error"),
    "push.accepted": ("sleep", "stop"),
    "push.waiting": ("sleep", "stop", "error"),
    "push.reduce": ("sleep", "stop"),
    "push.mid_update": ("sleep", "stop"),
    "push.updated": ("sleep", "stop"),
    "push.published": ("sleep", "stop"),
    "push.acknowledged": ("sleep", "stop", "error"),
}
"""No error where a half of an event is done: there the model would end, as it has to."""

WORKER_POINTS: Mapping[str, tuple[str, ...]] = {
    "worker.opened": ("kill", "stop"),
    "worker.rejoined": ("kill", "stop", "error"),
    "worker.renewing": ("kill", "stop", "sleep"),
    "worker.before_send": ("kill", "stop", "error"),
    "worker.mid_body": ("kill", "stop", "error"),
    "worker.sent": ("kill", "stop", "error"),
    "worker.acknowledged": ("kill", "stop", "error"),
    "worker.mid_answer": ("kill", "stop", "error"),
    "worker.recorded": ("kill", "stop"),
}
"""No error where a step is done: the caller could not know."""

STREAM_ALONE = ("worker.mid_body", "worker.sent")

SIGNALS = ("kill worker", "stop worker shortly", "stop worker past its lease", "stop server")
"""At random times, from outside."""

DEATHS = ("kill server", "terminate server")
"""Likewise, of a server that comes back."""

KEEPING_POINTS = (
    *("file.created", "file.mid_write", "file.written", "file.synced", "file.renamed", "file.safe"),
    *("snapshot.cut", "snapshot.tensors", "snapshot.manifest", "snapshot.removing"),
    *("recovery.manifest", "recovery.tensors", "recovery.done"),
)
"""Where there is a data directory."""

JOURNAL_POINTS = ("journal.recorded", "journal.written", "journal.synced", "recovery.replay")
"""Where there is a journal beside."""

_FIRST_TIMES: Mapping[str, int] = {"journal": 12, "push": 12, "file": 4, "snapshot": 2, "recovery": 1}
"""A server dies at one of the first so many times that it is at a place, by the first part of the place's name."""

_FIRST_TIMES_AT: Mapping[str, int] = {"file.mid_write": 8, "snapshot.removing": 5, "recovery.replay": 6}

_AGAIN = 0.3
"""How often a server also dies while it comes back, whatever else is to happen to it."""

_CHAIN = "an answer is lost, the next attempt stands still until the lease has run out, and then something happens"

_ONE_IN: Mapping[str, int] = {"sleep": 200, "stop": 500, "error": 300}
_SLEEPS: Mapping[str, str] = {"worker": "sleep(1.5)"}

PROXY_FAULTS = (
    *(
        f"rpc {kind}"
        for kind in ("duplicated at once", "duplicated after", "answer dropped", "delayed", "answer delayed")
    ),
    *(f"tcp {kind} {direction}" for kind in ("cut", "hold", "delay") for direction in ("up", "down")),
)


def all_faults(door: str, durability: str) -> set[str]:
    """Returns the name of every fault that can happen to a model of this door, whose server is so durable."""
    points = {**SERVER_POINTS, **WORKER_POINTS}
    mine = {name: actions for name, actions in points.items() if door == "stream" or name not in STREAM_ALONE}
    return {f"{name} {action}" for name, actions in mine.items() for action in actions} | {
        *(f"signal {name}" for name in SIGNALS),
        *PROXY_FAULTS,
        *all_deaths(durability),
    }


def all_deaths(durability: str) -> set[str]:
    """Returns the name of every death that a server can die."""
    if durability == "none":
        return set()
    return {*(f"{name} kill" for name in death_points(durability)), *(f"signal {name}" for name in DEATHS)}


def death_points(durability: str) -> list[str]:
    """Returns the places at which a server dies that comes back."""
    journal = JOURNAL_POINTS if durability != "snapshot" else ()
    return [*SERVER_POINTS, *KEEPING_POINTS, *journal]


def server_environment(chance: random.Random, deaths: Sequence[str], rate: float, log: Path) -> dict[str, str]:
    """Returns the environment of one life of a server: everything that may happen at a place, by chance, and deaths.

    Args:
        chance: Decides.
        deaths: As from `Deaths.draw`.
        rate: How much more often than usual things happen.
        log: Where they are noted.
    """
    others = dict.fromkeys((*KEEPING_POINTS, *JOURNAL_POINTS), ("sleep", "stop")) if deaths else {}
    entries = [
        f"{name}={_spelled(name, action)}@1/{max(round(_ONE_IN[action] / rate), 1)}"
        for name, actions in {**SERVER_POINTS, **others}.items()
        for action in actions
    ]
    return _environment(";".join([*entries, *deaths]), chance.randrange(1 << 30), log)


class Deaths:
    """Where a server dies in each of its lives.

    Args:
        chance: Decides.
        durability: As in a scenario.
        first: Places where it is to die before others, the first time that it is there, or the Nth: NAME@N.
    """

    def __init__(self, chance: random.Random, durability: str, first: Sequence[str]) -> None:
        self._chance = chance
        self._first = chance.sample(first, len(first))
        points = death_points(durability)
        self._deck = Deck(chance, points)
        self._again = [name for name in points if name.startswith("recovery.")]

    def draw(self) -> list[str]:
        """Returns the entries of one life."""
        if self._first:
            name, _, nth = self._first.pop().partition("@")
            return [f"{name}=kill@{nth or 1}"]
        names = [self._deck.draw()]
        if self._chance.random() < _AGAIN:
            names.append(self._chance.choice(self._again))
        return [f"{name}=kill@{self._chance.randint(1, _first_times(name))}" for name in names]


def _first_times(name: str) -> int:
    return _FIRST_TIMES_AT.get(name) or _FIRST_TIMES[name.split(".")[0]]


def worker_deck(chance: random.Random, door: str) -> Deck[str]:
    """Returns what is drawn from for the lives of workers."""
    names = [name for name in WORKER_POINTS if door == "stream" or name not in STREAM_ALONE]
    return Deck(chance, [*names, *names, _CHAIN, _CHAIN])


def worker_environment(chance: random.Random, deck: Deck[str], rate: float, log: Path) -> dict[str, str]:
    """Returns the environment of one life of a worker: two things that happen to it sooner or later, or the chain."""
    entries = []
    names = [deck.draw(), deck.draw()]
    if _CHAIN in names:
        nth = chance.randint(1, max(round(15 / rate), 2))
        last = chance.choice(WORKER_POINTS["worker.rejoined"])
        text = f"worker.acknowledged=error@{nth};worker.before_send=stop@{nth + 1};worker.rejoined={last}@1"
        return _environment(text, chance.randrange(1 << 30), log)
    for name in names:
        rare = name in ("worker.opened", "worker.rejoined", "worker.renewing")
        nth = chance.randint(1, 2 if rare else max(round(15 / rate), 2))
        entries.append(f"{name}={_spelled(name, chance.choice(WORKER_POINTS[name]))}@{nth}")
    return _environment(";".join(entries), chance.randrange(1 << 30), log)


def fired(log: Path) -> Counter[str]:
    """Returns how often what has happened at failpoints, by name and action."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(" ".join(line.split()[2:4]) for line in lines)


def _spelled(name: str, action: str) -> str:
    return _SLEEPS.get(name.split(".")[0], "sleep(0.02)") if action == "sleep" else action


def _environment(text: str, seed: int, log: Path) -> dict[str, str]:
    return {
        "DELTASERVE_FAILPOINTS": text,
        "DELTASERVE_FAILPOINTS_SEED": str(seed),
        "DELTASERVE_FAILPOINTS_LOG": str(log),
    }
