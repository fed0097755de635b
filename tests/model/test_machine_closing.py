"""The synchronous policy: rounds that close by quorum or timeout, and rounds that fail."""

import pytest
from machine_driver import LEASE, Driver, contribution, contributions, refused

from deltaserve._common.optimizers import Adadelta
from deltaserve_server.model import Async, BumpVersion, Sync

LONG = 1000.0


class TestQuorum:
    def test_without_grace_the_push_that_completes_the_quorum_closes_the_round(self) -> None:
        driver = Driver(Sync(quorum=2))
        a, b, c = (driver.open(name) for name in "abc")
        assert driver.push(c) is None
        assert [held.worker for held in contributions(driver.push(a))] == ["a", "c"]
        assert driver.folds == [(a.id, 1), (c.id, 1)]
        assert b.member

    def test_grace_counts_from_the_push_that_completes_the_quorum(self) -> None:
        driver = Driver(Sync(quorum=2, grace_seconds=3.0))
        a, b, _ = (driver.open(name, LONG) for name in "abc")
        driver.push(a)
        assert driver.machine.due() is None
        driver.tick(2.0)
        driver.push(b)
        assert driver.machine.due() == 5.0
        driver.tick(2.75)
        assert driver.version == 0
        driver.tick(0.25)
        assert (driver.version, driver.machine.due()) == (1, None)
        assert [held.worker for held in driver.updates[0].summary.contributions] == ["a", "b"]

    def test_within_the_grace_period_the_last_member_closes_the_round(self) -> None:
        driver = Driver(Sync(quorum=2, grace_seconds=3.0))
        a, b, c = (driver.open(name, LONG) for name in "abc")
        driver.push(a)
        driver.push(b)
        driver.tick(1.0)
        assert len(contributions(driver.push(c))) == 3
        assert driver.now == 1.0

    def test_any_event_closes_a_round_whose_time_is_up(self) -> None:
        driver = Driver(Sync(quorum=1, grace_seconds=3.0))
        a, b = (driver.open(name, LONG) for name in "ab")
        driver.push(a)
        driver.now = 4.0
        driver.close(b)
        assert driver.version == 1

    def test_a_session_that_opens_after_the_deadline_joins_the_next_round(self) -> None:
        driver = Driver(Sync(quorum=1, grace_seconds=3.0))
        a, _ = (driver.open(name, LONG) for name in "ab")
        driver.push(a)
        driver.now = 4.0  # nobody ticked yet
        b = driver.open("b")
        assert (driver.version, b.member, b.first_version) == (1, True, 1)
        assert driver.push(b, base=b.first_version) is None
        assert len(contributions(driver.push(a))) == 2

    def test_a_straggler_learns_the_version_to_compute_on(self) -> None:
        driver = Driver(Sync(quorum=2))
        a, b, c = (driver.open(name) for name in "abc")
        driver.push(a, base=0)
        driver.push(b, base=0)
        with refused("ROUND_CLOSED", base=0, current=1):
            driver.push(c, base=0)
        assert driver.push(c, 1, base=1) is None  # the same number
        assert len(contributions(driver.push(a, base=1))) == 2

    def test_a_round_below_min_workers_does_not_close(self) -> None:
        driver = Driver(Sync(min_workers=2, quorum=3))
        a, b, c = (driver.open(name) for name in "abc")
        driver.push(a)
        driver.close(c)
        assert driver.version == 0
        assert len(contributions(driver.push(b))) == 2  # all that are awaited, though no quorum


class TestTimeout:
    def test_the_round_closes_with_the_pushes_that_it_has(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a, b, c = (driver.open(name, LONG) for name in "abc")
        driver.tick(3.0)
        assert driver.machine.due() is None
        driver.push(b, base=0)
        driver.tick(4.0)
        driver.push(a, base=0)
        assert (driver.version, driver.machine.due()) == (0, 8.0)
        driver.tick(1.0)
        assert [held.worker for held in contributions(driver.answers[a.id, 1])] == ["a", "b"]
        with refused("ROUND_CLOSED", base=0, current=1):
            driver.push(c, base=0)

    def test_the_earlier_of_grace_and_timeout_counts(self) -> None:
        driver = Driver(Sync(quorum=2, grace_seconds=3.0, round_timeout_seconds=4.0))
        a, b, _ = (driver.open(name, LONG) for name in "abc")
        driver.push(a)
        driver.tick(2.0)
        driver.push(b)
        assert driver.machine.due() == 4.0

    def test_the_next_round_has_its_own_timeout(self) -> None:
        driver = Driver(Sync(round_timeout_seconds=5.0))
        a, b = (driver.open(name, LONG) for name in "ab")
        driver.push(a)
        driver.tick(5.0)
        assert driver.version == 1
        driver.tick(7.0)
        driver.push(b)
        assert driver.machine.due() == 17.0

    def test_a_dead_worker_holds_a_round_no_longer_than_its_lease(self) -> None:
        driver = Driver(Sync(round_timeout_seconds=LONG))
        a, _ = driver.open("a", LONG), driver.open("b")
        driver.push(a)
        assert driver.tick(LEASE) == ["b"]
        assert driver.version == 1


class TestFailure:
    def test_below_min_workers_nothing_is_applied_and_sequence_numbers_are_free(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a = driver.open("a", LONG)
        driver.push(a, 1, base=0, fingerprint=7)
        driver.tick(5.0)
        refusal = driver.given_up[a.id, 1]
        assert (refusal.reason, refusal.metadata) == ("ROUND_FAILED", {"got": "1", "need": "2"})
        assert (driver.version, driver.updates, driver.folds, driver.answers) == (0, [], [], {})
        assert (a.last_accepted, a.waiting, driver.status(a).state) == (0, False, "not accepted")
        assert driver.machine.due() is None
        b = driver.open("b")
        assert driver.push(b, base=0) is None
        assert len(contributions(driver.push(a, 1, base=0, fingerprint=7))) == 2
        assert driver.folds == [(a.id, 1), (b.id, 1)]

    def test_another_push_may_take_the_sequence_number(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a = driver.open("a", LONG)
        driver.push(a, 1, fingerprint=7, hyperparameters=Adadelta(lr=0.5))
        driver.tick(5.0)
        driver.push(driver.open("b"), hyperparameters=Adadelta(lr=0.25))  # the round's own are forgotten
        assert driver.push(a, 1, fingerprint=8)

    def test_pushes_are_refused_in_the_order_of_worker_names(self) -> None:
        driver = Driver(Sync(min_workers=3, round_timeout_seconds=5.0))
        b, a = driver.open("b", LONG), driver.open("a", LONG)
        driver.push(b)
        driver.push(a)
        driver.close(b)  # its push waits nevertheless
        driver.tick(5.0)
        assert list(driver.given_up) == [(a.id, 1), (b.id, 1)]
        assert {refusal.metadata["got"] for refusal in driver.given_up.values()} == {"2"}

    def test_leases_restart(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a = driver.open("a")
        driver.push(a)
        driver.tick(5.0)
        assert driver.tick(LEASE - 1) == []
        assert driver.tick(1) == ["a"]

    def test_a_late_joiner_that_was_admitted_gets_no_second_version(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a, b = driver.open("a", LONG), driver.open("b", LONG)
        driver.push(a, base=0)
        late = driver.open("c", LONG)
        assert late.first_version == 1
        driver.close(b)
        driver.machine.renew(late.id, driver.now)
        assert driver.version_bumped == [1]  # nobody but it is awaited, so it is taken in
        driver.tick(5.0)
        assert driver.given_up
        assert driver.version_bumped == [1]
        driver.push(a, 1, base=1)
        assert driver.push(late, base=1)

    def test_a_failed_round_bumps_the_version_for_late_joiners(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a, _ = driver.open("a", LONG), driver.open("b", LONG)
        driver.push(a, base=0)
        late = driver.open("c", LONG)
        driver.tick(5.0)
        assert driver.decisions[0] == BumpVersion(1)
        assert (late.member, late.first_version, driver.version) == (True, 1, 1)
        assert driver.push(late, base=1) is None
        result = driver.push(a, 1, base=0)  # the same push, on the same weights
        assert result is None  # b is awaited
        driver.tick(5.0)
        assert contribution(driver.answers[a.id, 1]).staleness == 1

    def test_the_window_still_holds_the_last_eight_results(self) -> None:
        driver = Driver(Sync(round_timeout_seconds=5.0))
        a = driver.open("a", LONG)
        for _ in range(8):
            driver.push(a)
        driver.change(Sync(min_workers=2, round_timeout_seconds=5.0))
        driver.push(a, 9)
        driver.tick(5.0)
        assert (a.id, 9) in driver.given_up
        first = driver.push(a, 1)
        assert first
        assert first.version == 1
        with refused("SEQUENCE_REUSED"):
            driver.push(a, 1, fingerprint=5)

    def test_the_push_of_an_ended_session_is_finally_not_accepted(self) -> None:
        driver = Driver(Sync(min_workers=2, round_timeout_seconds=5.0))
        a = driver.open("a")
        driver.push(a)
        driver.close(a)
        driver.tick(5.0)
        status = driver.status(a)
        assert (status.state, status.final) == ("not accepted", True)


@pytest.mark.parametrize("quorum", [None, 3])
def test_below_min_workers_without_a_timeout_a_round_waits(quorum: int | None) -> None:
    driver = Driver(Sync(min_workers=3, quorum=quorum))
    driver.push(driver.open("a", 1e9))
    driver.push(driver.open("b", 1e9))
    driver.tick(1e6)
    assert (driver.version, driver.given_up) == (0, {})


def test_sessions_that_end_with_a_loss_all_stay_known() -> None:
    driver = Driver(Async())
    sessions = [driver.open(f"worker {number}") for number in range(1100)]
    for session in sessions:
        driver.push(session)
    driver.machine.lose_sessions()
    assert all(driver.machine.push_status(session.id, 1).state == "applied" for session in sessions)
