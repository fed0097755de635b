"""The schedule of runs: which scenario comes next, and when enough faults have fired."""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, product

from faults import all_deaths, all_faults
from outcomes import Outcome
from scenarios import Scenario

DOORS = ("unary", "stream")

_MOST_RUNS = 4000
_MOST_FIRST = 10
"""Largest number of missing deaths that one run starts with."""


class Schedule:
    """Chooses the runs one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._kinds = list(_kinds(options))
        self._least = len(options.policies) if options.alternate else len(self._kinds)
        self._outcomes: list[Outcome] = []
        self._seeds = count(1000 * options.seed)
        self._random = random.Random(options.seed)
        self._turn = 0
        self._first: dict[int, set[tuple[str, str]]] = {}

    def goes_on(self) -> bool:
        """Returns whether another run is needed."""
        if self._turn < self._least:
            return True
        enough = sum(outcome.fired.total() for outcome in self._outcomes) >= self._options.trials
        return not (enough and not missing(self._outcomes, self._options)) and self._turn < _MOST_RUNS

    def next(self) -> tuple[Scenario, int, list[str]]:
        """Returns the next scenario, its seed, and the failpoints at which the server dies first."""
        seed, wanting = next(self._seeds), missing(self._outcomes, self._options)
        optimizers = self._options.optimizers
        turn, place = divmod(seed, len(optimizers))  # each turn starts elsewhere, as policies have turns of their own
        optimizer = optimizers[(place + turn) % len(optimizers)]
        scenario = self._next_scenario({durability for durability, _ in wanting})
        scenario = replace(scenario, optimizer_name=optimizer)
        handed = set[tuple[str, str]]().union(*self._first.values())
        places = sorted(death for death in wanting if death[0] == scenario.durability and death[1].endswith(" kill"))
        places = [death for death in places if death not in handed] or places
        self._first[seed] = set(self._random.sample(places, min(len(places), _MOST_FIRST)))
        first = sorted(fault.removesuffix(" kill") for _, fault in self._first[seed])
        return scenario, seed, [*self._options.first, *first]

    def _next_scenario(self, durabilities: set[str]) -> Scenario:
        """Returns the next scenario. After one turn it has one of the given durabilities, or any if "" is one."""
        while True:
            scenario = self._kinds[self._turn % len(self._kinds)]
            self._turn += 1
            if self._turn <= self._least or not durabilities or durabilities & {"", scenario.durability}:
                return scenario

    def ended(self, outcome: Outcome) -> None:
        """Records the outcome of a run."""
        self._outcomes.append(outcome)
        del self._first[outcome.seed]


def _kinds(options: argparse.Namespace) -> Iterator[Scenario]:
    """Yields one turn of scenarios."""
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
    """Returns the faults that `--every-fault` still waits for, as pairs of durability and fault.

    A death of the server counts for each durability. The other actions of a failpoint count as one fault, for any.
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
