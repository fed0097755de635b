"""Times contenders in turns, once each per round, so that other load on the machine affects all of them alike."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep

from benchmarks.machine import percentile


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of one contender in all rounds."""

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
        """The 99th percentile, in seconds."""
        return percentile(list(self.seconds), 99)


REST_SECONDS = 0.003
"""Pause before each contender. Threads of the one before, such as torch's, spin for about a millisecond more."""


def by_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 2, rest_seconds: float = 0.0
) -> dict[str, Timing]:
    """Runs every contender once per round and returns the timings.

    Args:
        contenders: Functions by name; each returns when its work is done.
        rounds: Number of rounds.
        warmups: Number of rounds before, which do not count.
        rest_seconds: Pause before each contender.
    """

    def timed(run: Callable[[], object]) -> float:
        sleep(rest_seconds)
        started = perf_counter()
        run()
        return perf_counter() - started

    return collect({name: partial(timed, run) for name, run in contenders.items()}, rounds, warmups)


def collect(contenders: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 2) -> dict[str, Timing]:
    """Runs every contender once per round; the contenders return their times in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmups + rounds):
        for name, run in contenders.items():
            taken = run()
            if index >= warmups:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
