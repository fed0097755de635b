"""A machine restored from its state continues as the original would."""

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

# The simulation's histories and its reference serve here too; no folder of tests is a package.
sys.path.append(str(Path(__file__).parents[1] / "simulation"))

from histories import SCENARIOS, history, scenario_of
from machine_driver import Driver, refused
from simulator import Simulation

from deltaserve_server.durability.checked import packed, unpacked
from deltaserve_server.model import Async, Bounded, Machine, Sync
from deltaserve_server.model.state import MachineState

EVENTS = 600
SWAP_EVERY = 5


def restored(machine: Machine, now: float = 0.0) -> Machine:
    """Returns a machine restored from this one's packed state."""
    return unpacked(packed(MachineState.of(machine)), MachineState, "image").machine(now)


def text(machine: Machine) -> str:
    """Returns a machine's state as text, its updates in the order of versions."""
    image = MachineState.of(machine)
    ordered = replace(image, updates=tuple(sorted(image.updates, key=lambda update: update.version)))
    return msgspec.json.format(msgspec.json.encode(ordered)).decode()


def take_over(simulation: Simulation) -> None:
    """Replaces the simulation's machine by one restored from its state.

    A state has no leases, so they are copied. The ledger compares updates by identity, so restored results that equal
    the original ones are replaced by them.
    """
    before = simulation.machine
    machine = simulation.machine = restored(before, simulation.now)
    assert text(machine) == text(before)
    for session in (*before.sessions.live(), *before.sessions.ended.values()):
        found = machine.sessions.find_any(session.id)
        assert found
        found.expires = session.expires
        for number, record in found.window.items():
            summary, read = session.window[number].result, record.result
            assert msgspec.json.encode(summary) == msgspec.json.encode(read)
            record.result = summary


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_restored_machine_does_what_the_reference_says(name: str) -> None:
    swaps = 0
    for seed in range(2):
        scenario = scenario_of(name, seed)
        simulation = Simulation(scenario)
        for count, event in enumerate(history(scenario, seed, EVENTS)):
            simulation.step(event)
            if count % SWAP_EVERY == 0 and not simulation.waiting:
                take_over(simulation)
                swaps += 1
        simulation.flush()
    assert swaps > 20


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_state_round_trips_whatever_waits(name: str) -> None:
    for seed in range(2):
        scenario = scenario_of(name, seed + 10)
        simulation = Simulation(scenario)
        for count, event in enumerate(history(scenario, seed + 10, EVENTS)):
            simulation.step(event)
            if count % 20 == 0:
                assert text(restored(simulation.machine)) == text(simulation.machine)


def test_a_state_has_no_pushes_that_wait_for_a_round() -> None:
    driver = Driver(Sync(min_workers=2))
    first = driver.open("a")
    driver.push(first)
    machine = restored(driver.machine)
    machine.resume(driver.now)
    session = machine.sessions.find(first.id)
    assert session
    assert (session.last_accepted, session.last_applied, session.window, session.waiting) == (0, 0, {}, False)
    assert not machine.round.pushes
    assert machine.push_status(first.id, 1).state == "not accepted"
    driver.machine = machine
    assert driver.push(session) is None, "the push is new to it, and waits for its round"


def test_a_restart_bumps_the_version_for_late_joiners() -> None:
    driver = Driver(Sync())
    first, second = driver.open("a"), driver.open("b")
    driver.push(first)
    late = driver.open("c")
    assert (late.member, late.first_version) == (False, 1)
    machine = restored(driver.machine)
    assert machine.resume(driver.now) is True
    assert machine.version == 1
    assert all(session.member for session in machine.sessions.live())
    assert machine.resume(driver.now) is False, "the second time there is nobody to serve"
    driver.machine = machine
    for session in (first, second, late):
        found = machine.sessions.find(session.id)
        assert found
        driver.push(found, 1, base=1)
    assert driver.version == 2


def test_leases_restart_when_a_machine_resumes() -> None:
    driver = Driver(Async())
    session = driver.open("a", lease=5.0)
    machine = restored(driver.machine, 1000.0)
    machine.resume(1002.0)
    assert machine.tick(1006.9)[0] == []
    assert [gone.id for gone in machine.tick(1007.0)[0]] == [session.id]


def test_a_duplicate_gets_the_same_answer_after_a_restart() -> None:
    driver = Driver(Async())
    session = driver.open("a")
    results = [driver.push(session, fingerprint=number) for number in range(1, 12)]
    driver.machine = restored(driver.machine)
    found = driver.machine.sessions.find(session.id)
    assert found
    for number in range(4, 12):
        before, after = results[number - 1], driver.push(found, number, fingerprint=number)
        assert before
        assert after
        assert (after.version, after.duplicate, after.contribution) == (before.version, True, before.contribution)
        assert msgspec.json.encode(after.summary) == msgspec.json.encode(before.summary)
    assert driver.push(found, 2, fingerprint=2) is not None, "an older one is known by its number alone"
    with refused("SEQUENCE_REUSED"):
        driver.push(found, 11, fingerprint=0)
    with refused("SEQUENCE_GAP", expected=12, got=13):
        driver.push(found, 13)


def test_fencing_survives_a_restart() -> None:
    driver = Driver(Async())
    older = driver.open("a")
    driver.push(older)
    newer = driver.open("a")
    driver.machine = restored(driver.machine)
    with refused("SESSION_FENCED", worker="a", epoch=1, current=2):
        driver.push(older, 2)
    assert driver.machine.push_status(older.id, 1).state == "applied"
    driver.close(newer)
    driver.machine = restored(driver.machine)
    assert driver.open("a").epoch == 3


def test_deferred_settings_survive_a_restart_until_the_next_round_closes() -> None:
    driver = Driver(Sync(min_workers=1))
    first, second = driver.open("a"), driver.open("b")
    driver.push(first)
    assert driver.machine.round.folded == 1
    assert driver.change(Sync(reduction="median")) == driver.version + 2
    machine = restored(driver.machine)
    machine.resume(driver.now)
    assert machine.next_settings == driver.machine.next_settings
    driver.machine = machine
    for session in (first, second):
        found = machine.sessions.find(session.id)
        assert found
        driver.push(found, 1)
    assert driver.version == 1
    assert machine.policy == Sync(reduction="median")
    assert machine.next_settings is None


def test_a_worker_that_is_too_far_ahead_waits_after_a_restart_too() -> None:
    driver = Driver(Bounded(slack=1))
    fast, _ = driver.open("fast"), driver.open("slow")
    assert driver.push(fast)
    assert driver.push(fast) is None, "its answer is withheld"
    machine = restored(driver.machine)
    machine.resume(driver.now)
    driver.machine = machine
    found = machine.sessions.find(fast.id)
    assert found
    assert driver.push(found, 2) is None, "it is a duplicate, and its answer is withheld again"
    with refused("SLACK_EXCEEDED"):
        driver.push(found, 3)


def test_a_state_does_not_grow_with_the_history() -> None:
    driver = Driver(Async())
    for _ in range(3):
        session = driver.open("a")
        for _ in range(50):
            driver.push(session)
    assert len(packed(MachineState.of(driver.machine))) < 16_000
