"""The simulation can fail: it finds each defect that is planted into the state machine, and soon."""

from itertools import count

import pytest
from histories import SCENARIOS, history
from ledger import Violation
from planted_defects import DEFECTS, simulation_with
from shrink import violation

EVENTS = 20_000
"""Every defect shows within so many events of its scenario."""

_LENGTHS = (500, 1500)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str) -> None:
    scenario, seen = DEFECTS[defect][1], 0
    with simulation_with(defect) as simulation_of:
        for seed in count():
            simulation = simulation_of()
            try:
                simulation.run(history(scenario, seed, _LENGTHS[seed % len(_LENGTHS)]), 10)
            except Violation as found:
                print(f"{defect}: {found} after {seen + simulation.totals.events:,} events")
                return
            seen += simulation.totals.events
            assert seen < EVENTS, f"{defect}: not found in {seen:,} events"


def test_without_a_defect_the_same_events_are_fine() -> None:
    assert violation(SCENARIOS["any"], history(SCENARIOS["any"], 0, 1000), 10) is None
