"""The results of benchmarks: timings or other figures, as Markdown, and as JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing

_FACTORS = {"ms": 1e3, "us": 1e6, "s": 1.0}
_MANY = 100
"""The least number of rounds for which a table shows the p99 instead of the range."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Timings of several contenders.

    Attributes:
        title: Title of the table.
        baseline: The row that ratios refer to.
        rows: Timings by contender.
        unit: Unit of the table: "s", "ms" or "us".
        notes: Lines below the table, such as what was not measured.
    """

    title: str
    baseline: str
    rows: dict[str, Timing]
    unit: str = "ms"
    notes: tuple[str, ...] = ()

    def ratio(self, row: str, other: str | None = None) -> float | None:
        """Returns the ratio of a row's median to another row's or the baseline's; None if either is missing."""
        above, below = self.rows.get(row), self.rows.get(other or self.baseline)
        return above.median / below.median if above and below else None

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        factor = _FACTORS[self.unit]
        many = any(len(timing.seconds) >= _MANY for timing in self.rows.values())
        spread = "p99" if many else "fastest to slowest"
        lines = [f"| what | median {self.unit} | {spread} | of `{self.baseline}` |", "| --- | ---: | ---: | ---: |"]
        for name, timing in self.rows.items():
            low, high = (_number(value * factor) for value in timing.spread)
            wide = _number(timing.p99 * factor) if many else f"{low} to {high}"
            ratio = self.ratio(name)
            lines.append(f"| {name} | {_number(timing.median * factor)} | {wide} | {_number(ratio)} |")
        return "\n".join([*lines, *("\n" + note for note in self.notes)])


@dataclass(frozen=True, slots=True)
class Figures:
    """A table of figures.

    Attributes:
        title: Title of the table.
        columns: Names of the columns, with units.
        rows: Figures by row, in the order of the columns; None means no figure.
        notes: Lines below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> dict[str, float]:
        """Returns the figures of a column by row, without missing ones."""
        place = self.columns.index(name)
        found = {row: figures[place] for row, figures in self.rows.items()}
        return {row: value for row, value in found.items() if value is not None}

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        lines = [f"| what | {' | '.join(self.columns)} |", f"| --- |{' ---: |' * len(self.columns)}"]
        for name, figures in self.rows.items():
            lines.append(f"| {name} | {' | '.join(map(_number, figures))} |")
        return "\n".join([*lines, *("\n" + note for note in self.notes)])


Result = Timings | Figures

Results = Mapping[str, Result]
"""Results by key, the name under which targets, plots and predictions find them."""


def timings(results: Results, key: str) -> Timings | None:
    """Returns the timings with this key, or None."""
    found = results.get(key)
    return found if isinstance(found, Timings) else None


def figures(results: Results, key: str) -> Figures | None:
    """Returns the figures with this key, or None."""
    found = results.get(key)
    return found if isinstance(found, Figures) else None


def save(file: Path, machine: Mapping[str, str], results: Results) -> None:
    """Writes all results as JSON, timings in seconds."""
    kept = {key: {"kind": type(result).__name__, **asdict(result)} for key, result in results.items()}
    file.write_text(json.dumps({"machine": dict(machine), "results": kept}, indent=1) + "\n")


def load(file: Path) -> tuple[dict[str, str], dict[str, Result]]:
    """Reads a file of `save`: the description of the machine, and the results."""
    kept = json.loads(file.read_text())
    return kept["machine"], {key: _result(dict(result)) for key, result in kept["results"].items()}


def _result(kept: dict[str, Any]) -> Result:
    kept["notes"] = tuple(kept["notes"])
    if kept.pop("kind") == "Timings":
        kept["rows"] = {name: Timing(tuple(row["seconds"])) for name, row in kept["rows"].items()}
        return Timings(**kept)
    kept["columns"] = tuple(kept["columns"])
    kept["rows"] = {name: tuple(row) for name, row in kept["rows"].items()}
    return Figures(**kept)


def _number(value: float | None) -> str:
    """Formats a number with three significant digits, or with all digits before the decimal point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"
