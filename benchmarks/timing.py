"""Timing by turns: every contender once a round, so that what else the machine does meets all of them."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep

from benchmarks.machine import percentile


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

    @property
    def p99(self) -> float:
        """What 99 % of the rounds do not exceed, in seconds."""
        return percentile(list(self.seconds), 99)


REST_SECONDS = 0.003
"""After a contender with threads of its own, torch's for instance: they go on spinning for about a millisecond."""


def by_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 2, rest_seconds: float = 0.0
) -> dict[str, Timing]:
    """Runs every contender once a round and returns its timings.

    Args:
        contenders: What to time, by name; each returns when its work is done.
        rounds: How often.
        warmups: Rounds before that are not counted.
        rest_seconds: Before each contender.
    """

    def timed(run: Callable[[], object]) -> float:
        sleep(rest_seconds)
        started = perf_counter()
        run()
        return perf_counter() - started

    return collect({name: partial(timed, run) for name, run in contenders.items()}, rounds, warmups)


def collect(contenders: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 2) -> dict[str, Timing]:
    """Does the same with contenders that return the seconds that count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmups + rounds):
        for name, run in contenders.items():
            taken = run()
            if index >= warmups:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
