"""What the server's account says: the lives of a server, what each has made, and what is left of that.

Where a server comes back at an older version than it had, what it makes is a new branch, and the end of the old one is
lost. So a version is named by it and by the life that made it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scenarios import Push, Scenario

from deltaserve import Contribution, Hyperparameters

_NEVER = 1 << 62

Claim = tuple[str, int, str]
"""What some life, named by its incarnation, has promised to outlive it: a version; and who was told so."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """A version.

    Attributes:
        version: Its number.
        contributions: What its pushes were in it, as the server told; none where no update made it.
        pushes: The same pushes by name, in the same order.
        hyperparameters: What it used, by group.
    """

    version: int
    contributions: tuple[Contribution, ...] = ()
    pushes: tuple[Push, ...] = ()
    hyperparameters: tuple[Hyperparameters, ...] = ()

    @property
    def parts(self) -> list[tuple[Push, Contribution]]:
        """Its pushes."""
        return list(zip(self.pushes, self.contributions, strict=True))


@dataclass(kw_only=True)
class Life:
    """One start of the server.

    Attributes:
        incarnation: Names it.
        restored: The version that it began with; None where there was no model, or it died before.
        updates: What it made; the last of them may have come to nothing.
        told: The newest version that everybody may know of.
        saved: The newest version of a snapshot that was safe.
        serving: The time since when everything was there; None where it died before.
        ended: Whether it ended in good order.
    """

    incarnation: str
    restored: int | None = None
    updates: list[Update] = field(default_factory=list)
    told: int = 0
    saved: int = 0
    serving: float | None = None
    ended: bool = False

    @property
    def start(self) -> int:
        """The version that it began with."""
        return self.restored or 0

    @property
    def top(self) -> int:
        """The last version that it may have made."""
        return self.updates[-1].version if self.updates else self.start


class History:
    """All lives of a server, those that ended before anything was there left out.

    Attributes:
        lives: In order.
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
        """Returns which life an incarnation is."""
        return self._index[incarnation]

    def left(self, made: int, at: int = -1) -> int:
        """Returns up to which version what life `made` has made, or begun with, is there in life `at`, the last."""
        return self._lowest[made][at]

    def surviving(self, at: int = -1) -> Iterator[Update]:
        """Yields the versions that lead to the state in life `at`, all that it made among them."""
        last = at % len(self.lives)
        for made in range(last + 1):
            yield from (one for one in self.lives[made].updates if one.version <= self.left(made, last))

    def places(self) -> dict[Push, list[tuple[int, int]]]:
        """Returns in which lives and versions each push was, by its name."""
        found: dict[Push, list[tuple[int, int]]] = {}
        for index, life in enumerate(self.lives):
            for one in life.updates:
                for push in one.pushes:
                    found.setdefault(push, []).append((index, one.version))
        return found

    def most_lost(self) -> int:
        """Returns how many versions that somebody may have known of were lost at most, in one restart."""
        pairs = zip(self.lives, self.lives[1:], strict=False)
        return max((max(before.told, before.start) - after.start for before, after in pairs), default=0)


def _take(life: Life, entry: dict[str, Any]) -> None:
    match entry:
        case {"restored": version}:
            life.restored = version
        case {"made": version, "pushes": pushes, "hyperparameters": groups}:
            life.updates.append(_update(version, pushes, groups))
        case {"numbered": version}:
            life.updates.append(Update(version=version))
        case {"told": version}:
            life.told = max(life.told, version)
        case {"saved": version}:
            life.saved = max(life.saved, version)
        case {"serving": at}:
            life.serving = at
        case {"ended": _}:
            life.ended = True


def _update(version: int, pushes: Sequence[Sequence[Any]], groups: Sequence[Sequence[Any]]) -> Update:
    return Update(
        version=version,
        contributions=tuple(
            Contribution(
                worker=worker, epoch=epoch, sequence=sequence, staleness=staleness, weight=weight, gradient_norm=norm
            )
            for worker, epoch, sequence, staleness, weight, norm, _ in pushes
        ),
        pushes=tuple(Push(worker, session, sequence) for worker, _, sequence, *_, session in pushes),
        hyperparameters=tuple(
            Hyperparameters(lr=lr, rho=rho, eps=eps, weight_decay=decay, maximize=maximize)
            for lr, rho, eps, decay, maximize in groups
        ),
    )


def check(history: History, scenario: Scenario, claims: Iterable[Claim]) -> Iterator[str]:
    """Yields what a server that keeps its promises does not do."""
    yield from _check_numbers(history)
    for before, life in enumerate(history.lives):
        kept = [("began with", life.start), ("had a snapshot of", life.saved)]
        if scenario.journals:
            kept.append(("told of", life.told))
        if life.ended:
            kept.append(("ended at", life.top))
        for what, version in kept:
            yield from _broken(history, before, version, f"life {before} {what}")
    for incarnation, version, who in claims:
        yield from _broken(history, history.index(incarnation), version, who)


def _check_numbers(history: History) -> Iterator[str]:
    """Versions are counted without a gap, and what comes back was there before."""
    top, there = 0, False
    for index, life in enumerate(history.lives):
        if life.restored is None and there:
            yield f"life {index} came back without the model"
        there = there or life.restored is not None or bool(life.updates)
        if life.start > top:
            yield f"life {index} came back at version {life.start}; there were {top}"
        versions = [life.start, *(one.version for one in life.updates)]
        if versions != list(range(versions[0], versions[0] + len(versions))):
            yield f"life {index} made the versions {versions}"
        top = life.top


def _broken(history: History, life: int, version: int, who: str) -> Iterator[str]:
    """Yields what is wrong where a version that was promised to survive a life did not."""
    for after in range(life + 1, len(history.lives)):
        if history.left(life, after) < version:
            yield f"{who} version {version}; life {after} came back at {history.lives[after].start}"
            return
