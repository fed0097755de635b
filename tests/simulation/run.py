"""Simulates any number of events and prints counts by policy: `make simulate EVENTS=10000000 SEED=1`."""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from os import cpu_count

from histories import SCENARIOS, history, scenario_of
from ledger import Totals, Violation
from shrink import story
from simulator import Simulation

HISTORY = 4000
"""Events of one history. The next history begins with a new model and a new pool of events."""


def simulate(name: str, seed: int, events: int) -> tuple[str, Totals, float, str]:
    """Runs one history. Returns its scenario, counts, CPU seconds, and the story of a violation or an empty string."""
    scenario = scenario_of(name, seed)
    began = time.process_time()
    drawn = history(scenario, seed, events)
    simulation = Simulation(scenario)
    try:
        simulation.run(drawn)
    except Violation:
        told = f"seed {seed} of {name!r}:\n{story(scenario, drawn)}"
        return name, simulation.totals, time.process_time() - began, told
    return name, simulation.totals, time.process_time() - began, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first history; each further one has one more")
    parser.add_argument("--policy", choices=SCENARIOS, help="only this one")
    parser.add_argument("--jobs", type=int, default=cpu_count())
    options = parser.parse_args()
    names = [options.policy] if options.policy else list(SCENARIOS)
    seeds = range(options.seed, options.seed - (-options.events // (HISTORY * len(names))))
    totals = {name: Totals() for name in names}
    seconds = dict.fromkeys(names, 0.0)
    violations = dict.fromkeys(names, 0)
    began = time.monotonic()
    work = [(name, seed) for seed in seeds for name in names]
    with ProcessPoolExecutor(options.jobs) as pool:
        columns = zip(*work, strict=True)
        for name, total, took, told in pool.map(simulate, *columns, [HISTORY] * len(work), chunksize=8):
            totals[name].add(total)
            seconds[name] += took
            violations[name] += bool(told)
            if told:
                print(told, end="\n\n")
    _tell(totals, seconds, violations)
    events = sum(total.events for total in totals.values())
    took = time.monotonic() - began
    print(f"{events:,} events in {took:.0f} s, {events / took:,.0f} a second with {options.jobs} processes")
    return 1 if any(violations.values()) else 0


def _tell(totals: dict[str, Totals], seconds: dict[str, float], violations: dict[str, int]) -> None:
    print(f"{'':22}{'events':>12}{'pushes':>12}{'updates':>12}{'violations':>12}{'events/s':>10}")
    for name, total in totals.items():
        a_second = total.events / seconds[name]
        counts = f"{total.events:12,}{total.pushes:12,}{total.updates:12,}{violations[name]:12,}"
        print(f"{name:22}{counts}{a_second:10,.0f}")
    reasons = sorted(set().union(*(total.refusals for total in totals.values())))
    print("\nrefusals")
    for reason in reasons:
        where = ", ".join(
            f"{name}: {total.refusals[reason]:,}" for name, total in totals.items() if total.refusals[reason]
        )
        print(f"{reason:24}{sum(total.refusals[reason] for total in totals.values()):10,}   {where}")


if __name__ == "__main__":
    sys.exit(main())
