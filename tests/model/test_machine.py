"""The state machine: sessions and sequence numbers."""

from dataclasses import replace

import pytest
from machine_driver import LEASE, Driver, contribution, contributions, refused

from deltaserve_server.model import Async, PushResult, Refused, Sync


class TestSequence:
    def test_pushes_count_up(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        results = [driver.push(session) for _ in range(3)]
        assert [result.version for result in results if result] == [1, 2, 3]
        assert driver.version == 3

    @pytest.mark.parametrize("sequence", [2, 3, 1000])
    def test_a_gap_is_refused(self, sequence: int) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        with refused("SEQUENCE_GAP", expected=1, got=sequence):
            driver.push(session, sequence)

    @pytest.mark.parametrize("sequence", [0, -1])
    def test_sequence_numbers_start_at_one(self, sequence: int) -> None:
        driver = Driver(Async())
        with refused("PUSH_INVALID"):
            driver.push(driver.open("a"), sequence)

    def test_a_duplicate_gets_the_first_result(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        first = driver.push(session, 1)
        driver.push(session, 2)
        assert first
        assert driver.push(session, 1) == replace(first, duplicate=True)
        assert (driver.version, len(driver.updates)) == (2, 2)

    def test_beyond_the_window_a_duplicate_gets_the_current_version(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        for _ in range(9):
            driver.push(session)
        assert driver.push(session, 1) == PushResult(version=9, duplicate=True)
        second = driver.push(session, 2)
        assert second
        assert (second.version, len(contributions(second))) == (2, 1)

    def test_other_values_under_a_used_number_are_refused(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        driver.push(session, 1, fingerprint=5)
        with refused("SEQUENCE_REUSED"):
            driver.push(session, 1, fingerprint=6)

    def test_a_base_beyond_the_current_version_is_refused(self) -> None:
        driver = Driver(Async())
        with refused("PUSH_INVALID"):
            driver.push(driver.open("a"), base=1)

    def test_staleness_counts_versions(self) -> None:
        driver = Driver(Async())
        first, second = driver.open("a"), driver.open("b")
        for _ in range(3):
            driver.push(first)
        assert contribution(driver.push(second, base=1)).staleness == 2


class TestSessions:
    def test_ranks_are_the_lowest_free(self) -> None:
        driver = Driver(Async())
        sessions = [driver.open(name) for name in "abc"]
        driver.close(sessions[1])
        assert [driver.open("d").rank, driver.open("e").rank] == [1, 3]

    def test_a_newer_session_of_a_name_fences_the_older(self) -> None:
        driver = Driver(Async())
        older = driver.open("a")
        newer = driver.open("a")
        assert (newer.epoch, newer.rank) == (2, older.rank)
        with refused("SESSION_FENCED", worker="a", epoch=1, current=2):
            driver.push(older)
        assert driver.push(newer)

    def test_epochs_go_on_after_a_close(self) -> None:
        driver = Driver(Async())
        driver.close(driver.open("a"))
        assert driver.open("a").epoch == 2

    def test_a_lease_runs_out_at_its_end_and_any_call_renews_it(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        assert driver.tick(LEASE - 1) == []
        driver.push(session)
        assert driver.tick(LEASE - 1) == []
        assert driver.tick(1) == ["a"]
        with refused("SESSION_UNKNOWN"):
            driver.push(session)

    def test_an_unknown_session_is_refused(self) -> None:
        driver = Driver(Async())
        with refused("SESSION_UNKNOWN"):
            driver.machine.keep_session(b"x" * 16, 1, 0.0)
        with refused("SESSION_UNKNOWN"):
            driver.machine.close_session(b"", 0, 0.0)

    @pytest.mark.parametrize(
        ("tensors", "groups", "field"), [(0, 1, "tensor_count"), (3, 1, "tensor_count"), (1, 2, "group_count")]
    )
    def test_a_worker_cannot_know_more_tensors_or_groups_than_there_are(
        self, tensors: int, groups: int, field: str
    ) -> None:
        machine = Driver(Async()).machine
        with refused("PUSH_INVALID", field=field):
            machine.open_session("a", b"i" * 16, LEASE, 0.0, tensors, groups)
        assert len(machine.sessions) == 0

    def test_tensors_that_a_worker_does_not_know_are_absent_from_its_pushes(self) -> None:
        driver = Driver(Async())
        session, _ = driver.machine.open_session("a", b"i" * 16, LEASE, 0.0, 1, 1)
        driver.push(session)
        assert driver.updates[0].absent == {1}


def test_a_refused_push_changes_nothing() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    before = (driver.version, b.last_accepted, b.waiting, driver.machine.update_counts)
    for sequence, base in ((3, 0), (0, 0), (1, 9)):
        with pytest.raises(Refused):
            driver.push(b, sequence, base=base)
    assert (driver.version, b.last_accepted, b.waiting, driver.machine.update_counts) == before
    assert driver.push(b)
