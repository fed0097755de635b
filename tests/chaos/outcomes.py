"""The outcomes of runs, and the tables that show them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scenarios import DURABILITIES, POLICIES

_COUNTS = {
    "acknowledged": "acknowledged",
    "applied": "applied",
    "rolled_back": "rolled back, as allowed",
    "lost": "lost",
    "doubled": "doubled",
    "bits": "bits that differ",
}


@dataclass
class Verdict:
    """The verdict on a run.

    Attributes:
        acknowledged: Number of gradients whose push was acknowledged.
        applied: Number of gradients in a surviving update.
        rolled_back: Number of acknowledged gradients that a restart lost, as the durability allows.
        lost: Number of other acknowledged gradients without a surviving update.
        doubled: Number of gradients in more than one surviving update, by any pushes.
        bits: Number of bits in which the model differs from the replay.
        problems: Descriptions of all violations.
        figures: The largest value seen of each bounded quantity.
    """

    acknowledged: int = 0
    applied: int = 0
    rolled_back: int = 0
    lost: int = 0
    doubled: int = 0
    bits: int = 0
    problems: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Outcome(Verdict):
    """A run and its verdict; `again` is the command that repeats the run."""

    policy: str
    door: str
    durability: str
    optimizer: str
    seed: int
    folder: Path
    again: str
    fired: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Returns a summary in one line."""
        verdict = f"{len(self.problems)} violations" if self.problems else "all holds"
        counts = f"{self.fired.total():4} fired, {self.acknowledged:5} acknowledged, {self.applied:5} applied"
        kind = f"{self.policy:8} {self.door:6} {self.durability:8} {self.optimizer:8}"
        return f"{kind} seed {self.seed}: {counts}: {verdict}"

    def plain(self) -> dict[str, Any]:
        """Returns the outcome as a JSON object."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"folder": str(self.folder)}


def tables(outcomes: Sequence[Outcome]) -> str:
    """Returns one table of policies for each durability, and one of all durabilities."""
    durabilities = [name for name in DURABILITIES if any(outcome.durability == name for outcome in outcomes)]
    parts = []
    for durability in durabilities:
        those = [outcome for outcome in outcomes if outcome.durability == durability]
        policies = [name for name in POLICIES if any(outcome.policy == name for outcome in those)]
        parts.append("\n".join(_table(f"durability: {durability}", those, policies, lambda one: one.policy)))
    if len(durabilities) > 1:
        parts.append("\n".join(_table("all", outcomes, durabilities, lambda one: one.durability)))
    return "\n\n".join(parts)


def _table(
    title: str, outcomes: Sequence[Outcome], names: Sequence[str], column_of: Callable[[Outcome], str]
) -> Iterator[str]:
    """Yields the lines of a table: how often each fault fired, and below it the counts of pushes."""
    columns = [[outcome for outcome in outcomes if column_of(outcome) == name] for name in names]
    faults = sorted({fault for outcome in outcomes for fault in outcome.fired})
    rows = [(fault, [sum(outcome.fired[fault] for outcome in column) for column in columns]) for fault in faults]
    total = "fired, all", [sum(outcome.fired.total() for outcome in column) for column in columns]
    results = [
        (label, [sum(getattr(outcome, name) for outcome in column) for column in columns])
        for name, label in _COUNTS.items()
    ]
    results.append(("other violations", [sum(len(outcome.problems) for outcome in column) for column in columns]))
    figures = sorted({f"most: {name}" for outcome in outcomes for name in outcome.figures})
    width = max(map(len, [title, *faults, *figures, *(label for label, _ in results)]))
    yield " ".join([f"{title:{width}}", *(f"{name:>8}" for name in names), f"{'all':>8}"])
    for label, numbers in rows:
        yield _row(label, width, numbers)
    yield "-" * (width + 9 * (len(names) + 1))
    for label, numbers in (total, *results):
        yield _row(label, width, numbers)
    for figure in figures:
        name = figure.removeprefix("most: ")
        most = [max((outcome.figures.get(name, 0.0) for outcome in column), default=0.0) for column in columns]
        yield " ".join([f"{figure:{width}}", *(f"{value:8.2f}" for value in most), f"{max(most):8.2f}"])


def _row(label: str, width: int, numbers: Sequence[int]) -> str:
    return " ".join([f"{label:{width}}", *(f"{number:8}" for number in numbers), f"{sum(numbers):8}"])
