"""The state machine: sessions, sequence numbers, rounds. Time is whatever the test says."""

import itertools

import pytest

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model import (
    Answer,
    Async,
    Decision,
    Fold,
    Layout,
    Machine,
    Policy,
    Push,
    PushResult,
    Refused,
    Session,
    Sync,
    Tensor,
    Update,
)

LEASE = 10.0


class Driver:
    """A machine, a clock that stands still unless told, and what has become of every push."""

    def __init__(self, policy: Policy) -> None:
        self.machine = Machine("m", Layout((Tensor("w", (2, 3)), Tensor("b", (3,)))), [Hyperparameters()], policy)
        self.now = 0.0
        self.folds: list[tuple[bytes, int]] = []
        self.updates: list[Update] = []
        self.answers: dict[tuple[bytes, int], PushResult] = {}
        self._ids = itertools.count()

    def open(self, worker: str) -> Session:
        session_id = next(self._ids).to_bytes(16, "big")
        session, decisions = self.machine.open_session(worker, session_id, LEASE, self.now)
        self._note(decisions)
        return session

    def close(self, session: Session) -> None:
        self._note(self.machine.close_session(session.id, session.epoch, self.now))

    def expire(self, seconds: float) -> list[str]:
        self.now += seconds
        gone, decisions = self.machine.expire(self.now)
        self._note(decisions)
        return [session.worker for session in gone]

    def push(
        self,
        session: Session,
        sequence: int | None = None,
        *,
        base: int | None = None,
        fingerprint: int = 0,
        hyperparameters: Hyperparameters | None = None,
        absent: frozenset[int] = frozenset(),
    ) -> PushResult | None:
        push = Push(
            session_id=session.id,
            epoch=session.epoch,
            sequence=session.last_accepted + 1 if sequence is None else sequence,
            base_version=base,
            hyperparameters=(hyperparameters,) if hyperparameters else None,
            absent=absent,
            fingerprint=fingerprint,
        )
        self.answers.pop(push.key, None)
        self._note(self.machine.push(push, self.now))
        return self.answers.get(push.key)

    def _note(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Fold(key):
                    self.folds.append(key)
                case Update():
                    self.updates.append(decision)
                case Answer(key, result):
                    self.answers[key] = result


def refused(reason: str) -> "pytest.RaisesExc[Refused]":
    return pytest.raises(Refused, check=lambda error: error.reason == reason)


class TestSequence:
    def test_pushes_count_up(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        results = [driver.push(session) for _ in range(3)]
        assert [result.version for result in results if result] == [1, 2, 3]
        assert driver.machine.version == 3

    @pytest.mark.parametrize("sequence", [2, 3, 1000])
    def test_a_gap_is_refused(self, sequence: int) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        with pytest.raises(Refused) as error:
            driver.push(session, sequence)
        assert (error.value.reason, error.value.metadata) == ("SEQUENCE_GAP", {"expected": "1", "got": str(sequence)})

    @pytest.mark.parametrize("sequence", [0, -1])
    def test_numbers_begin_with_one(self, sequence: int) -> None:
        driver = Driver(Async())
        with refused("PUSH_INVALID"):
            driver.push(driver.open("a"), sequence)

    def test_a_duplicate_gets_the_first_result(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        first = driver.push(session, 1)
        driver.push(session, 2)
        assert first
        assert driver.push(session, 1) == first.again()
        assert (driver.machine.version, len(driver.updates)) == (2, 2)

    def test_beyond_the_window_a_duplicate_gets_the_current_version(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        for _ in range(9):
            driver.push(session)
        assert driver.push(session, 1) == PushResult(version=9, duplicate=True)
        second = driver.push(session, 2)
        assert second
        assert (second.version, second.contributors) == (2, 1)

    def test_a_number_with_other_content_is_refused(self) -> None:
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
        result = driver.push(second, base=1)
        assert result
        assert result.staleness == 2


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
        with pytest.raises(Refused) as error:
            driver.push(older)
        assert (error.value.reason, error.value.metadata["current"]) == ("SESSION_FENCED", "2")
        assert driver.push(newer)

    def test_epochs_go_on_after_a_close(self) -> None:
        driver = Driver(Async())
        driver.close(driver.open("a"))
        assert driver.open("a").epoch == 2

    def test_a_lease_runs_out_at_its_end_and_any_call_renews_it(self) -> None:
        driver = Driver(Async())
        session = driver.open("a")
        assert driver.expire(LEASE - 1) == []
        driver.push(session)
        assert driver.expire(LEASE - 1) == []
        assert driver.expire(1) == ["a"]
        with refused("SESSION_UNKNOWN"):
            driver.push(session)

    def test_unknown_sessions_are_never_made(self) -> None:
        driver = Driver(Async())
        with refused("SESSION_UNKNOWN"):
            driver.machine.keep_session(b"x" * 16, 1, 0.0)
        with refused("SESSION_UNKNOWN"):
            driver.machine.close_session(b"", 0, 0.0)


class TestRounds:
    def test_an_update_when_all_have_pushed(self) -> None:
        driver = Driver(Sync())
        sessions = [driver.open(name) for name in "abc"]
        assert driver.push(sessions[2]) is None
        assert driver.push(sessions[0]) is None
        result = driver.push(sessions[1])
        assert result
        assert (result.version, result.contributors, result.staleness) == (1, 3, 0)
        assert len(driver.answers) == 3

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
    def test_folds_are_in_the_order_of_names(self, order: tuple[int, ...]) -> None:
        driver = Driver(Sync())
        names = ["a10", "B", "a9", "c"]
        sessions = [driver.open(name) for name in names]
        for index in order:
            driver.push(sessions[index])
        assert driver.folds == [(sessions[names.index(name)].id, 1) for name in sorted(names)]

    def test_a_complete_prefix_is_folded_at_once(self) -> None:
        driver = Driver(Sync())
        a, b, c = (driver.open(name) for name in "abc")
        driver.push(c)
        assert driver.folds == []
        driver.push(a)
        assert driver.folds == [(a.id, 1)]
        driver.push(b)
        assert driver.folds == [(session.id, 1) for session in (a, b, c)]

    def test_nothing_is_folded_while_workers_may_still_join(self) -> None:
        driver = Driver(Sync(min_workers=2))
        b = driver.open("b")
        driver.push(b)
        assert driver.folds == []
        a = driver.open("a")
        assert a.first_version == 0
        driver.push(a)
        assert driver.folds == [(a.id, 1), (b.id, 1)]

    def test_who_comes_during_a_round_joins_the_next(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        late = driver.open("c")
        assert late.first_version == 1
        with refused("ROUND_CLOSED"):
            driver.push(late)
        driver.push(b)
        assert driver.machine.version == 1
        for session in (a, b):
            assert driver.push(session) is None
        assert driver.push(late)

    def test_who_leaves_is_not_waited_for(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.close(b)
        assert driver.answers[a.id, 1].contributors == 1

    def test_a_push_of_one_who_leaves_still_counts(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.close(a)
        assert driver.machine.version == 0
        result = driver.push(b)
        assert result
        assert result.contributors == 2

    def test_a_lease_that_runs_out_ends_the_wait_but_not_that_of_who_waits(self) -> None:
        driver = Driver(Sync())
        a, _ = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.now += LEASE - 1
        driver.machine.renew(a.id, driver.now)  # its call is still there
        assert driver.expire(2) == ["b"]
        assert driver.answers[a.id, 1].version == 1
        assert driver.expire(LEASE - 1) == []

    def test_a_push_of_one_whose_lease_runs_out_still_counts(self) -> None:
        driver = Driver(Sync(min_workers=2))
        driver.push(driver.open("a"))
        assert driver.expire(LEASE) == ["a"]
        result = driver.push(driver.open("b"))
        assert result
        assert result.contributors == 2

    def test_a_round_waits_for_min_workers(self) -> None:
        driver = Driver(Sync(min_workers=2))
        a = driver.open("a")
        assert driver.push(a) is None
        b = driver.open("b")
        driver.close(b)
        assert driver.machine.version == 0
        assert driver.push(driver.open("c"))

    def test_a_fenced_workers_push_counts_and_its_successor_joins_the_next_round(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        successor = driver.open("a")
        assert successor.first_version == 1
        assert driver.machine.version == 0
        driver.push(b)
        assert driver.machine.version == 1
        assert driver.push(b, base=1) is None
        assert driver.push(successor, base=1)

    def test_a_worker_that_is_fenced_before_it_pushed_has_its_place_taken(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(b)
        successor = driver.open("a")
        assert successor.first_version == 0
        with refused("SESSION_FENCED"):
            driver.push(a)
        assert driver.push(successor, base=0)
        assert driver.answers[b.id, 1].contributors == 2

    def test_who_waits_for_the_next_round_is_taken_into_one_that_lacks_workers(self) -> None:
        driver = Driver(Sync(min_workers=2))
        a, b = driver.open("a"), driver.open("b")
        driver.push(a, base=0)
        late = driver.open("c")
        assert late.first_version == 1
        assert driver.expire(LEASE - 1) == []
        driver.close(b)
        assert driver.machine.version == 1
        assert not driver.updates
        result = driver.push(late, base=1)
        assert result
        assert (result.version, result.contributors, result.staleness) == (2, 2, 0)
        assert driver.answers[a.id, 1].staleness == 1

    def test_a_round_that_still_waits_for_someone_takes_nobody_in(self) -> None:
        driver = Driver(Sync(min_workers=2))
        a, b, c = (driver.open(name) for name in "abc")
        driver.push(a)
        driver.open("d")
        driver.close(c)
        assert driver.machine.version == 0
        assert driver.push(b)

    def test_a_push_of_an_older_round_is_refused(self) -> None:
        driver = Driver(Sync())
        a = driver.open("a")
        driver.push(a)
        with pytest.raises(Refused) as error:
            driver.push(a, base=0)
        assert (error.value.reason, error.value.metadata) == ("ROUND_CLOSED", {"base": "0", "current": "1"})

    def test_a_second_push_waits_for_no_round(self) -> None:
        driver = Driver(Sync())
        a, _ = driver.open("a"), driver.open("b")
        driver.push(a)
        with refused("ROUND_CLOSED"):
            driver.push(a, 2)

    def test_a_duplicate_of_a_waiting_push_waits(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a, 1, fingerprint=3)
        assert driver.push(a, 1, fingerprint=3) is None
        with refused("SEQUENCE_REUSED"):
            driver.push(a, 1, fingerprint=4)
        driver.push(b)
        assert driver.answers[a.id, 1].contributors == 2

    def test_hyperparameters_of_a_round_must_agree(self) -> None:
        driver = Driver(Sync())
        a, b, c = (driver.open(name) for name in "abc")
        driver.push(a, hyperparameters=Hyperparameters(lr=0.5))
        with pytest.raises(Refused) as error:
            driver.push(b, hyperparameters=Hyperparameters(lr=0.25))
        assert error.value.metadata == {"field": "groups[0].lr", "round": "0.5", "got": "0.25"}
        driver.push(b, hyperparameters=Hyperparameters(lr=0.5))
        result = driver.push(c)
        assert result
        assert result.hyperparameters == (Hyperparameters(lr=0.5),)
        for session in (a, b, c):
            driver.push(session)
        assert driver.updates[-1].hyperparameters == (Hyperparameters(),)

    def test_a_tensor_absent_in_all_pushes_is_left_alone(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a, absent=frozenset({0, 1}))
        driver.push(b, absent=frozenset({1}))
        assert driver.updates[0].absent == {1}
        assert driver.machine.update_counts == [1, 0]

    def test_a_new_state_does_not_close_the_round(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a, base=0)
        driver.machine.put_state([5, 5])
        assert driver.machine.version == 1
        result = driver.push(b, base=0)
        assert result
        assert (result.version, result.staleness) == (2, 1)
        assert driver.machine.update_counts == [6, 6]

    def test_older_sessions_go_on_after_an_extension(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a, hyperparameters=Hyperparameters(lr=0.5))
        driver.machine.extend([Tensor("v", (4,), 1)], [Hyperparameters(lr=0.1)])
        result = driver.push(b)
        assert result
        assert result.hyperparameters == (Hyperparameters(lr=0.5), Hyperparameters(lr=0.1))
        assert driver.updates[0].absent == {2}
        assert driver.machine.update_counts == [1, 1, 0]
        assert driver.open("c").tensor_count == 3

    @pytest.mark.parametrize(
        ("tensors", "groups", "field"), [(0, 1, "tensor_count"), (3, 1, "tensor_count"), (1, 2, "group_count")]
    )
    def test_nobody_knows_more_than_there_is(self, tensors: int, groups: int, field: str) -> None:
        machine = Driver(Async()).machine
        with pytest.raises(Refused) as error:
            machine.open_session("a", b"i" * 16, LEASE, 0.0, tensors, groups)
        assert error.value.metadata["field"] == field
        assert len(machine.sessions) == 0

    def test_who_knows_fewer_tensors_pushes_those(self) -> None:
        driver = Driver(Async())
        session, _ = driver.machine.open_session("a", b"i" * 16, LEASE, 0.0, 1, 1)
        driver.push(session)
        assert driver.updates[0].absent == {1}


def test_a_refused_push_changes_nothing() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    before = (driver.machine.version, b.last_accepted, b.waiting, list(driver.machine.update_counts))
    for sequence, base in ((3, 0), (0, 0), (1, 9)):
        with pytest.raises(Refused):
            driver.push(b, sequence, base=base)
    assert (driver.machine.version, b.last_accepted, b.waiting, list(driver.machine.update_counts)) == before
    assert driver.push(b)
