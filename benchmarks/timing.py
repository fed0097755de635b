"""Timing by turns: every contender once a round, so that what else the machine does meets all of them."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one contender over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest round, in seconds."""
        return min(self.seconds), max(self.seconds)


def by_turns(contenders: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 2) -> dict[str, Timing]:
    """Runs every contender once a round and returns its timings.

    Args:
        contenders: What to time, by name; each returns when its work is done.
        rounds: How often.
        warmups: Rounds before that are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmups + rounds):
        for name, run in contenders.items():
            started = perf_counter()
            run()
            if index >= warmups:
                seconds[name].append(perf_counter() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def table(timings: Mapping[str, Timing], baseline: str, unit: str = "ms") -> str:
    """Returns a Markdown table: median, spread, and the ratio to the baseline."""
    factor = {"ms": 1e3, "us": 1e6}[unit]
    lines = [f"| what | median {unit} | fastest to slowest | of `{baseline}` |", "| --- | ---: | ---: | ---: |"]
    for name, timing in timings.items():
        low, high = (value * factor for value in timing.spread)
        ratio = timing.median / timings[baseline].median
        lines.append(f"| {name} | {timing.median * factor:.3g} | {low:.3g} to {high:.3g} | {ratio:.2f} |")
    return "\n".join(lines)
