"""The synchronous policy: members of a round, and rounds that close because all have pushed."""

from hypothesis import given
from hypothesis import strategies as st
from machine_driver import LEASE, Driver, contribution, contributions, refused

from deltaserve._common.optimizers import Adadelta, Adam
from deltaserve_server.model import Sync, Tensor


def test_a_round_closes_when_all_have_pushed() -> None:
    driver = Driver(Sync())
    sessions = [driver.open(name) for name in "abc"]
    assert driver.push(sessions[2]) is None
    assert driver.push(sessions[0]) is None
    result = driver.push(sessions[1])
    assert result
    assert (result.version, len(contributions(result)), contribution(result).staleness) == (1, 3, 0)
    assert len(driver.answers) == 3


@given(order=st.permutations(range(4)))
def test_folds_are_in_the_order_of_names(order: list[int]) -> None:
    driver = Driver(Sync())
    names = ["a10", "B", "a9", "c"]
    sessions = [driver.open(name) for name in names]
    for index in order:
        driver.push(sessions[index])
    assert driver.folds == [(sessions[names.index(name)].id, 1) for name in sorted(names)]


def test_a_complete_prefix_is_folded_at_once() -> None:
    driver = Driver(Sync())
    a, b, c = (driver.open(name) for name in "abc")
    driver.push(c)
    assert driver.folds == []
    driver.push(a)
    assert driver.folds == [(a.id, 1)]
    driver.push(b)
    assert driver.folds == [(session.id, 1) for session in (a, b, c)]


def test_nothing_is_folded_while_workers_may_still_join() -> None:
    driver = Driver(Sync(min_workers=2))
    b = driver.open("b")
    driver.push(b)
    assert driver.folds == []
    a = driver.open("a")
    assert a.first_version == 0
    driver.push(a)
    assert driver.folds == [(a.id, 1), (b.id, 1)]


def test_a_session_that_opens_during_a_round_joins_the_next() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    late = driver.open("c")
    assert late.first_version == 1
    with refused("ROUND_CLOSED"):
        driver.push(late)
    driver.push(b)
    assert driver.version == 1
    for session in (a, b):
        assert driver.push(session) is None
    assert driver.push(late)


def test_a_round_does_not_wait_for_a_closed_session() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    driver.close(b)
    assert len(contributions(driver.answers[a.id, 1])) == 1


def test_a_push_of_a_closed_session_still_counts() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    driver.close(a)
    assert driver.version == 0
    assert len(contributions(driver.push(b))) == 2


def test_a_round_does_not_wait_for_an_expired_session_but_keeps_those_that_wait() -> None:
    driver = Driver(Sync())
    a, _ = driver.open("a"), driver.open("b")
    driver.push(a)
    driver.now += LEASE - 1
    driver.machine.renew(a.id, driver.now)  # its call is still there
    assert driver.tick(2) == ["b"]
    assert driver.answers[a.id, 1].version == 1
    assert driver.tick(LEASE - 1) == []


def test_a_push_of_an_expired_session_still_counts() -> None:
    driver = Driver(Sync(min_workers=2))
    driver.push(driver.open("a"))
    assert driver.tick(LEASE) == ["a"]
    assert len(contributions(driver.push(driver.open("b")))) == 2


def test_a_round_waits_for_min_workers() -> None:
    driver = Driver(Sync(min_workers=2))
    a = driver.open("a")
    assert driver.push(a) is None
    b = driver.open("b")
    driver.close(b)
    assert driver.version == 0
    assert driver.push(driver.open("c"))


def test_the_push_of_a_fenced_session_counts_and_its_successor_joins_the_next_round() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a)
    successor = driver.open("a")
    assert successor.first_version == 1
    assert driver.version == 0
    driver.push(b)
    assert driver.version == 1
    assert driver.push(b, base=1) is None
    assert driver.push(successor, base=1)


def test_the_successor_of_a_session_that_has_not_pushed_takes_its_place() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(b)
    successor = driver.open("a")
    assert successor.first_version == 0
    with refused("SESSION_FENCED"):
        driver.push(a)
    assert driver.push(successor, base=0)
    assert len(contributions(driver.answers[b.id, 1])) == 2


def test_a_round_that_lacks_workers_admits_late_joiners() -> None:
    driver = Driver(Sync(min_workers=2))
    a, b = driver.open("a"), driver.open("b")
    driver.push(a, base=0)
    late = driver.open("c")
    assert late.first_version == 1
    assert driver.tick(LEASE - 1) == []
    driver.close(b)
    assert driver.version == 1
    assert not driver.updates
    result = driver.push(late, base=1)
    assert result
    assert (result.version, len(contributions(result)), contribution(result).staleness) == (2, 2, 0)
    assert contribution(driver.answers[a.id, 1]).staleness == 1


def test_a_round_that_awaits_a_member_admits_nobody() -> None:
    driver = Driver(Sync(min_workers=2))
    a, b, c = (driver.open(name) for name in "abc")
    driver.push(a)
    driver.open("d")
    driver.close(c)
    assert driver.version == 0
    assert driver.push(b)


def test_a_push_of_an_older_round_is_refused() -> None:
    driver = Driver(Sync())
    a = driver.open("a")
    driver.push(a)
    with refused("ROUND_CLOSED", base=0, current=1):
        driver.push(a, base=0)


def test_a_second_push_for_one_round_is_refused() -> None:
    driver = Driver(Sync())
    a, _ = driver.open("a"), driver.open("b")
    driver.push(a)
    with refused("ROUND_CLOSED"):
        driver.push(a, 2)


def test_a_duplicate_of_a_waiting_push_waits() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a, 1, fingerprint=3)
    assert driver.push(a, 1, fingerprint=3) is None
    with refused("SEQUENCE_REUSED"):
        driver.push(a, 1, fingerprint=4)
    driver.push(b)
    assert len(contributions(driver.answers[a.id, 1])) == 2


def test_hyperparameters_of_a_round_must_agree() -> None:
    driver = Driver(Sync())
    a, b, c = (driver.open(name) for name in "abc")
    driver.push(a, hyperparameters=Adadelta(lr=0.5))
    with refused("HYPERPARAMETER_CONFLICT", field="groups[0].lr", round=0.5, got=0.25):
        driver.push(b, hyperparameters=Adadelta(lr=0.25))
    driver.push(b, hyperparameters=Adadelta(lr=0.5))
    driver.push(c)
    assert driver.updates[-1].summary.hyperparameters == (Adadelta(lr=0.5),)
    for session in (a, b, c):
        driver.push(session)
    assert driver.updates[-1].summary.hyperparameters == (Adadelta(),)


def test_a_conflict_names_the_hyperparameter_of_the_optimizer() -> None:
    driver = Driver(Sync(), Adam())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a, hyperparameters=Adam(beta1=0.5))
    with refused("HYPERPARAMETER_CONFLICT", field="groups[0].beta1", round=0.5, got=0.9):
        driver.push(b, hyperparameters=Adam())


def test_a_tensor_absent_in_all_pushes_is_left_alone() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a, absent=frozenset({0, 1}))
    driver.push(b, absent=frozenset({1}))
    assert driver.updates[0].absent == {1}
    assert driver.machine.update_counts == (1, 0)


def test_put_state_does_not_close_the_round() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a, base=0)
    driver.machine.put_state([5, 5])
    assert driver.version == 1
    result = driver.push(b, base=0)
    assert result
    assert (result.version, contribution(result).staleness) == (2, 1)
    assert driver.machine.update_counts == (6, 6)


def test_older_sessions_continue_after_an_extension() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(a, hyperparameters=Adadelta(lr=0.5))
    driver.machine.extend([Tensor("v", (4,), 1)], [Adadelta(lr=0.1)])
    driver.push(b)
    assert driver.updates[0].summary.hyperparameters == (Adadelta(lr=0.5), Adadelta(lr=0.1))
    assert driver.updates[0].absent == {2}
    assert driver.machine.update_counts == (1, 1, 0)
    assert driver.open("c").tensor_count == 3
