"""The faults of a run, and the failpoints that each process gets in its environment."""

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
"""Actions at the server's failpoints. None raises an error in the middle of an event, which would end the model."""

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
"""Actions at a worker's failpoints. None raises an error after a step is done, where the caller could not tell."""

STREAM_ONLY = ("worker.mid_body", "worker.sent")

SIGNALS = ("kill worker", "stop worker shortly", "stop worker past its lease", "stop server")
"""Signals at random times."""

DEATHS = ("kill server", "terminate server")
"""Signals that end a server, which comes back."""

STORAGE_POINTS = (
    *("file.created", "file.mid_write", "file.written", "file.synced", "file.renamed", "file.safe"),
    *("snapshot.cut", "snapshot.tensors", "snapshot.manifest", "snapshot.removing"),
    *("recovery.manifest", "recovery.tensors", "recovery.done"),
)
"""Failpoints of a server with a data directory."""

JOURNAL_POINTS = ("journal.recorded", "journal.written", "journal.synced", "recovery.replay")
"""Failpoints of a server with a journal."""

_FIRST_TIMES: Mapping[str, int] = {"journal": 12, "push": 12, "file": 4, "snapshot": 2, "recovery": 1}
"""A server dies at one of the first N times that it reaches a failpoint: N by the first part of its name."""

_FIRST_TIMES_AT: Mapping[str, int] = {"file.mid_write": 8, "snapshot.removing": 5, "recovery.replay": 6}

_RECOVERY_DEATHS = 0.3
"""Probability that a server also dies during recovery."""

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
    """Returns the names of all faults that can happen with a kind of push and a durability."""
    points = {**SERVER_POINTS, **WORKER_POINTS}
    mine = {name: actions for name, actions in points.items() if door == "stream" or name not in STREAM_ONLY}
    return {f"{name} {action}" for name, actions in mine.items() for action in actions} | {
        *(f"signal {name}" for name in SIGNALS),
        *PROXY_FAULTS,
        *all_deaths(durability),
    }


def all_deaths(durability: str) -> set[str]:
    """Returns the names of all deaths of a server with a durability."""
    if durability == "none":
        return set()
    return {*(f"{name} kill" for name in death_points(durability)), *(f"signal {name}" for name in DEATHS)}


def death_points(durability: str) -> list[str]:
    """Returns the failpoints at which a server with a data directory dies."""
    journal = JOURNAL_POINTS if durability != "snapshot" else ()
    return [*SERVER_POINTS, *STORAGE_POINTS, *journal]


def server_environment(chance: random.Random, deaths: Sequence[str], rate: float, log: Path) -> dict[str, str]:
    """Returns the environment of one life of a server: random sleeps, stops and errors, and its deaths.

    Args:
        chance: Source of randomness.
        deaths: Entries from `Deaths.draw`.
        rate: Factor of the usual rate of faults.
        log: File for the faults that fire.
    """
    others = dict.fromkeys((*STORAGE_POINTS, *JOURNAL_POINTS), ("sleep", "stop")) if deaths else {}
    entries = [
        f"{name}={_action(name, action)}@1/{max(round(_ONE_IN[action] / rate), 1)}"
        for name, actions in {**SERVER_POINTS, **others}.items()
        for action in actions
    ]
    return _environment(";".join([*entries, *deaths]), chance.randrange(1 << 30), log)


class Deaths:
    """Chooses where a server dies in each of its lives.

    Args:
        chance: Source of randomness.
        durability: As in a scenario.
        first: Failpoints to die at first, as NAME for the first time that the server reaches it, or NAME@N.
    """

    def __init__(self, chance: random.Random, durability: str, first: Sequence[str]) -> None:
        self._random = chance
        self._first = chance.sample(first, len(first))
        points = death_points(durability)
        self._deck = Deck(chance, points)
        self._recovery = [name for name in points if name.startswith("recovery.")]

    def draw(self) -> list[str]:
        """Returns the failpoint entries of one life."""
        if self._first:
            name, _, nth = self._first.pop().partition("@")
            return [f"{name}=kill@{nth or 1}"]
        names = [self._deck.draw()]
        if self._random.random() < _RECOVERY_DEATHS:
            names.append(self._random.choice(self._recovery))
        return [f"{name}=kill@{self._random.randint(1, _first_times(name))}" for name in names]


def _first_times(name: str) -> int:
    return _FIRST_TIMES_AT.get(name) or _FIRST_TIMES[name.split(".")[0]]


def worker_deck(chance: random.Random, door: str) -> Deck[str]:
    """Returns the deck of faults for the lives of workers."""
    names = [name for name in WORKER_POINTS if door == "stream" or name not in STREAM_ONLY]
    return Deck(chance, [*names, *names, _CHAIN, _CHAIN])


def worker_environment(chance: random.Random, deck: Deck[str], rate: float, log: Path) -> dict[str, str]:
    """Returns the environment of one life of a worker: two faults, or the chain of three."""
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
        entries.append(f"{name}={_action(name, chance.choice(WORKER_POINTS[name]))}@{nth}")
    return _environment(";".join(entries), chance.randrange(1 << 30), log)


def fired(log: Path) -> Counter[str]:
    """Returns how often each action fired at each failpoint, as NAME ACTION."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(" ".join(line.split()[2:4]) for line in lines)


def _action(name: str, action: str) -> str:
    return _SLEEPS.get(name.split(".")[0], "sleep(0.02)") if action == "sleep" else action


def _environment(text: str, seed: int, log: Path) -> dict[str, str]:
    return {
        "DELTASERVE_FAILPOINTS": text,
        "DELTASERVE_FAILPOINTS_SEED": str(seed),
        "DELTASERVE_FAILPOINTS_LOG": str(log),
    }
