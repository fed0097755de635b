"""Which runs are made, until everything that is to happen has."""

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import count, product

from faults import all_deaths, all_faults
from outcomes import Outcome
from scenarios import Scenario

DOORS = ("unary", "stream")

_MOST_RUNS = 4000
_MOST_FIRST = 10
"""So many of the deaths that have not been died are a run's first, at most."""


class Course:
    """Which runs are made, one after the other, and when there have been enough."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._kinds = list(_kinds(options))
        self._least = len(options.policies) if options.alternate else len(self._kinds)
        self._outcomes: list[Outcome] = []
        self._seeds = count(1000 * options.seed)
        self._chance = random.Random(options.seed)
        self._turn = 0
        self._first: dict[int, set[tuple[str, str]]] = {}

    def goes_on(self) -> bool:
        """Whether another run is to be made."""
        if self._turn < self._least:
            return True
        enough = sum(outcome.fired.total() for outcome in self._outcomes) >= self._options.trials
        return not (enough and not missing(self._outcomes, self._options)) and self._turn < _MOST_RUNS

    def next(self) -> tuple[Scenario, int, list[str]]:
        """Returns what is tried next, with which seed, and where the server is to die before it does elsewhere."""
        seed, wanting = next(self._seeds), missing(self._outcomes, self._options)
        scenario = self._next_scenario({durability for durability, _ in wanting})
        handed = set[tuple[str, str]]().union(*self._first.values())
        places = sorted(death for death in wanting if death[0] == scenario.durability and death[1].endswith(" kill"))
        places = [death for death in places if death not in handed] or places
        self._first[seed] = set(self._chance.sample(places, min(len(places), _MOST_FIRST)))
        first = sorted(fault.removesuffix(" kill") for _, fault in self._first[seed])
        return scenario, seed, [*self._options.first, *first]

    def _next_scenario(self, durabilities: set[str]) -> Scenario:
        """Returns the next one; once each has been tried, one of these durabilities, or any where "" is among them."""
        while True:
            scenario = self._kinds[self._turn % len(self._kinds)]
            self._turn += 1
            if self._turn <= self._least or not durabilities or durabilities & {"", scenario.durability}:
                return scenario

    def ended(self, outcome: Outcome) -> None:
        """Takes note of what became of a run."""
        self._outcomes.append(outcome)
        del self._first[outcome.seed]


def _kinds(options: argparse.Namespace) -> Iterator[Scenario]:
    """Yields what is tried, in turn."""
    policies, doors, durabilities = options.policies, options.doors, options.durabilities
    if not options.alternate:
        yield from (Scenario(*kind) for kind in product(policies, doors, durabilities))
        return
    for index in range(len(policies) * len(durabilities)):
        turn = index // len(policies)
        yield Scenario(
            policies[index % len(policies)],
            doors[(index + turn) % len(doors)],
            durabilities[(index + turn) % len(durabilities)],
        )


def missing(outcomes: Sequence[Outcome], options: argparse.Namespace) -> set[tuple[str, str]]:
    """Returns the faults that have never fired and are all to: with the durability, where it is a death of the server.

    Of what else may happen at a failpoint, one is as good as another.
    """
    if not options.every_fault:
        return set()
    wanted = {_kind(fault, "") for door in options.doors for fault in all_faults(door, "none")}
    wanted |= {(durability, death) for durability in options.durabilities for death in all_deaths(durability)}
    return wanted - {_kind(fault, outcome.durability) for outcome in outcomes for fault in outcome.fired}


def _kind(fault: str, durability: str) -> tuple[str, str]:
    if fault in all_deaths(durability or "none"):
        return durability, fault
    return "", fault.split()[0] if "." in fault else fault
