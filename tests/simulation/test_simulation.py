"""Random events under all policies: the machine decides what the reference decides, and its invariants hold.

The fast tier runs 108,000 events, the deep tier a million. `make simulate EVENTS=10000000` runs any number.
"""

import pytest
from histories import SCENARIOS, Event, history
from ledger import Totals
from run import HISTORY, simulate
from shrink import shortest, story, violation
from simulator import Simulation

from deltaserve_server.model.machine import Machine

HISTORIES = 3
"""Histories of one test: with 9 scenarios and 4,000 events a history, 108,000 events."""

PARTS = [0, *(pytest.param(part, marks=pytest.mark.deep) for part in range(1, 10))]

REASONS = {
    "HYPERPARAMETER_CONFLICT",
    "HYPERPARAMETER_INVALID",
    "PUSH_INVALID",
    "ROUND_CLOSED",
    "ROUND_FAILED",
    "SEQUENCE_GAP",
    "SEQUENCE_REUSED",
    "SESSION_FENCED",
    "SESSION_UNKNOWN",
    "SLACK_EXCEEDED",
    "STALE_BASE",
}
"""Every reason with which the machine refuses."""


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_machine_does_what_the_contract_says(name: str, part: int) -> None:
    updates = 0
    for seed in range(part * HISTORIES, (part + 1) * HISTORIES):
        _, totals, _, violated = simulate(name, seed, HISTORY)
        assert not violated, violated
        updates += totals.updates
    assert updates > HISTORIES * HISTORY / 50


def test_every_refusal_is_reached() -> None:
    totals = Totals()
    for seed in range(12):
        totals.add(simulate("any", seed, 1000)[1])
    assert totals.refusals.keys() == REASONS


def test_a_seed_gives_one_history() -> None:
    for name, scenario in SCENARIOS.items():
        assert history(scenario, 5, 300) == history(scenario, 5, 300) != history(scenario, 6, 300)
        assert simulate(name, 5, 300)[1] == simulate(name, 5, 300)[1]


def test_a_violating_history_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, put_state = SCENARIOS["sync"], Machine.put_state

    def twice(machine: Machine, counts: list[int]) -> None:
        put_state(machine, counts)
        machine.version += machine.version > 3  # only wrong after some updates

    monkeypatch.setattr(Machine, "put_state", twice)
    events = history(scenario, 1, 2000)
    short = shortest(scenario, events)
    assert violation(scenario, short)
    assert len(short) <= 8
    assert "put state" in story(scenario, events)
    assert "VIOLATION: version" in story(scenario, events)


def test_a_push_waits_for_workers_that_never_come() -> None:
    simulation = Simulation(SCENARIOS["sync, min_workers"])
    simulation.run([Event("open"), Event("push")])
    assert simulation.waiting == 1
