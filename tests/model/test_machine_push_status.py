"""The status of a push, in every state that it can be in."""

import pytest
from machine_driver import LEASE, Driver, contribution, refused

from deltaserve_server.model import Async, Bounded, PushResult, PushStatus, Sync

NOT_YET = PushStatus("not accepted", final=False)
NEVER = PushStatus("not accepted", final=True)
WAITING = PushStatus("waiting", final=False)


def test_a_push_that_has_not_arrived_may_still_arrive() -> None:
    driver = Driver(Sync())
    a = driver.open("a")
    assert driver.status(a) == driver.status(a, 99) == NOT_YET


def test_a_refused_push_is_not_accepted() -> None:
    driver = Driver(Async(max_staleness=0))
    a = driver.open("a")
    driver.push(a)
    with refused("STALE_BASE"):
        driver.push(a, 2, base=0)
    assert driver.status(a, 2) == NOT_YET


def test_a_push_in_a_round_is_waiting_until_it_is_applied() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    assert driver.status(a) == WAITING
    driver.push(b)
    status = driver.status(a)
    assert (status.state, status.final) == ("applied", True)
    assert status.result == driver.answers[a.id, 1]  # the first result, and no duplicate
    assert contribution(status.result).worker == "a"


def test_a_push_of_an_ended_session_is_waiting_until_it_is_applied() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    driver.close(a)
    assert (driver.status(a), driver.status(a, 2)) == (WAITING, NEVER)
    driver.push(b)
    assert driver.status(a).state == "applied"


def test_a_push_whose_answer_is_withheld_is_applied() -> None:
    driver = Driver(Bounded())
    a, _ = driver.open("a"), driver.open("b")
    assert driver.push(a) is None
    status = driver.status(a)
    assert (status.state, status.final) == ("applied", True)
    assert status.result
    assert status.result.version == 1


def test_before_the_window_the_result_has_the_current_version() -> None:
    driver = Driver(Async())
    a = driver.open("a")
    for _ in range(9):
        driver.push(a)
    assert driver.status(a, 1).result == PushResult(version=9)
    assert contribution(driver.status(a, 2).result).sequence == 2


def test_the_status_of_fenced_closed_and_expired_sessions_is_known() -> None:
    driver = Driver(Async())
    fenced, closed, expired = (driver.open(name) for name in "abc")
    for session in (fenced, closed, expired):
        driver.push(session)
    driver.open("a", 1000.0)
    driver.close(closed)
    assert driver.tick(LEASE) == ["c"]
    for session in (fenced, closed, expired):
        assert driver.status(session).state == "applied"
        assert driver.status(session, 2) == NEVER


@pytest.mark.parametrize("sequence", [0, -1])
def test_a_sequence_number_below_one_is_refused(sequence: int) -> None:
    driver = Driver(Async())
    with refused("PUSH_INVALID", field="sequence"):
        driver.status(driver.open("a"), sequence)


def test_a_session_that_never_was_is_unknown() -> None:
    driver = Driver(Async())
    with refused("SESSION_UNKNOWN"):
        driver.machine.push_status(b"x" * 16, 1)


def test_the_last_1024_ended_sessions_are_known() -> None:
    driver = Driver(Async())
    sessions = [driver.open(f"w{number}") for number in range(1025)]
    for session in sessions:
        driver.close(session)
    with refused("SESSION_UNKNOWN"):
        driver.status(sessions[0])
    assert driver.status(sessions[1]) == driver.status(sessions[-1]) == NEVER


def test_asking_does_not_renew_the_lease() -> None:
    driver = Driver(Async())
    a = driver.open("a")
    driver.now = LEASE - 1
    driver.status(a)
    assert driver.tick(1) == ["a"]
