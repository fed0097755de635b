"""The history that the server's log tells: each start of the server, its updates, and which of them survive.

If a server comes back at an older version, its updates form a new branch, and the end of the old branch is lost. A
version is therefore identified by its number and the life that made it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scenarios import Push, Scenario

from deltaserve import Contribution, Optimizer
from deltaserve._common.optimizers import OPTIMIZERS

_NEVER = 1 << 62

Claim = tuple[str, int, str]
"""A life, by incarnation, a version that must survive it, and who was promised so."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One version of the model.

    Attributes:
        version: The version's number.
        contributions: Its pushes as the server reported them; empty for a version bump.
        pushes: The names of the same pushes, in the same order.
        hyperparameters: The hyperparameters that it used, by group.
    """

    version: int
    contributions: tuple[Contribution, ...] = ()
    pushes: tuple[Push, ...] = ()
    hyperparameters: tuple[Optimizer, ...] = ()

    @property
    def parts(self) -> list[tuple[Push, Contribution]]:
        """The pushes, each with its contribution."""
        return list(zip(self.pushes, self.contributions, strict=True))


@dataclass(kw_only=True)
class Life:
    """One start of the server.

    Attributes:
        incarnation: The server's incarnation.
        restored: The version that it began with; None without a model, or if it died before.
        updates: Its updates in order. The last one may not have completed.
        announced: The newest version that clients may know of.
        saved: The newest version whose snapshot was safe on disk.
        serving: The time at which it had started; None if it died before.
        ended: Whether it ended in good order.
    """

    incarnation: str
    restored: int | None = None
    updates: list[Update] = field(default_factory=list)
    announced: int = 0
    saved: int = 0
    serving: float | None = None
    ended: bool = False

    @property
    def start(self) -> int:
        """The version that it began with, 0 without a model."""
        return self.restored or 0

    @property
    def top(self) -> int:
        """The newest version that it may have made."""
        return self.updates[-1].version if self.updates else self.start


class History:
    """All lives of a server.

    Attributes:
        lives: The lives in order, without those that ended before they loaded a model.
    """

    def __init__(self, lives: Iterable[Life]) -> None:
        self.lives = [life for life in lives if life.serving is not None or life.restored is not None or life.updates]
        self._index = {life.incarnation: index for index, life in enumerate(self.lives)}
        self._lowest = [[_NEVER] * len(self.lives) for _ in self.lives]
        for made, row in enumerate(self._lowest):
            for at in range(made + 1, len(row)):
                row[at] = min(row[at - 1], self.lives[at].start)

    @classmethod
    def read(cls, path: Path) -> "History":
        lives: list[Life] = []
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if "life" in entry:
                lives.append(Life(incarnation=entry["life"]))
            else:
                _take(lives[-1], entry)
        return cls(lives)

    def index(self, incarnation: str) -> int:
        """Returns the index of the life with an incarnation."""
        return self._index[incarnation]

    def surviving_version(self, made: int, at: int = -1) -> int:
        """Returns the newest version of life `made` that exists in life `at`, by default the last one."""
        return self._lowest[made][at]

    def surviving(self, at: int = -1) -> Iterator[Update]:
        """Yields the versions that lead to the state in life `at`, including all of its own."""
        last = at % len(self.lives)
        for made in range(last + 1):
            yield from (one for one in self.lives[made].updates if one.version <= self.surviving_version(made, last))

    def places(self) -> dict[Push, list[tuple[int, int]]]:
        """Returns the lives and versions of each push."""
        found: dict[Push, list[tuple[int, int]]] = {}
        for index, life in enumerate(self.lives):
            for one in life.updates:
                for push in one.pushes:
                    found.setdefault(push, []).append((index, one.version))
        return found

    def most_lost(self) -> int:
        """Returns the largest number of announced versions that one restart lost."""
        pairs = zip(self.lives, self.lives[1:], strict=False)
        return max((max(before.announced, before.start) - after.start for before, after in pairs), default=0)


def _take(life: Life, entry: dict[str, Any]) -> None:
    match entry:
        case {"restored": version}:
            life.restored = version
        case {"update": version, "pushes": pushes, "hyperparameters": groups}:
            life.updates.append(_update(version, pushes, groups))
        case {"bumped": version}:
            life.updates.append(Update(version=version))
        case {"announced": version}:
            life.announced = max(life.announced, version)
        case {"saved": version}:
            life.saved = max(life.saved, version)
        case {"serving": at}:
            life.serving = at
        case {"ended": _}:
            life.ended = True


def _update(version: int, pushes: Sequence[Sequence[Any]], groups: Sequence[dict[str, Any]]) -> Update:
    return Update(
        version=version,
        contributions=tuple(
            Contribution(
                worker=worker, epoch=epoch, sequence=sequence, staleness=staleness, weight=weight, gradient_norm=norm
            )
            for worker, epoch, sequence, staleness, weight, norm, _ in pushes
        ),
        pushes=tuple(Push(worker, session, sequence) for worker, _, sequence, *_, session in pushes),
        hyperparameters=tuple(OPTIMIZERS[group.pop("kind")](**group) for group in groups),
    )


def check(history: History, scenario: Scenario, claims: Iterable[Claim]) -> Iterator[str]:
    """Yields each broken promise of the server."""
    yield from _check_numbers(history)
    for before, life in enumerate(history.lives):
        kept = [("began with", life.start), ("had a snapshot of", life.saved)]
        if scenario.journals:
            kept.append(("told of", life.announced))
        if life.ended:
            kept.append(("ended at", life.top))
        for what, version in kept:
            yield from _broken(history, before, version, f"life {before} {what}")
    for incarnation, version, who in claims:
        yield from _broken(history, history.index(incarnation), version, who)


def _check_numbers(history: History) -> Iterator[str]:
    """Checks that versions have no gaps, and that each life comes back at a version that existed."""
    top, has_model = 0, False
    for index, life in enumerate(history.lives):
        if life.restored is None and has_model:
            yield f"life {index} came back without the model"
        has_model = has_model or life.restored is not None or bool(life.updates)
        if life.start > top:
            yield f"life {index} came back at version {life.start}; there were {top}"
        versions = [life.start, *(one.version for one in life.updates)]
        if versions != list(range(versions[0], versions[0] + len(versions))):
            yield f"life {index} made the versions {versions}"
        top = life.top


def _broken(history: History, life: int, version: int, who: str) -> Iterator[str]:
    """Yields a problem if a version that was promised to survive a life did not."""
    for after in range(life + 1, len(history.lives)):
        if history.surviving_version(life, after) < version:
            yield f"{who} version {version}; life {after} came back at {history.lives[after].start}"
            return
