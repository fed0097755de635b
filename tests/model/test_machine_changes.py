"""Changes of hyperparameters and policy: immediate ones, and those that wait until the open round has closed."""

import pytest
from machine_driver import Driver, contribution, contributions, refused

from deltaserve._common.optimizers import Adadelta, Adam
from deltaserve_server.model import Async, Bounded, Key, Policy, Sync, Tensor

SLOW = Adadelta(lr=0.25)


class TestAtOnce:
    def test_new_hyperparameters_apply_from_the_next_update(self) -> None:
        driver = Driver(Async())
        a = driver.open("a")
        driver.push(a)
        assert driver.change(None, SLOW) == 2
        driver.push(a)
        driver.push(a, hyperparameters=Adadelta(lr=3.0))  # a push's own go on counting
        used = [update.summary.hyperparameters[0].lr for update in driver.updates]
        assert used == [1.0, 0.25, 3.0]

    def test_new_hyperparameters_apply_to_a_partly_reduced_round(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        assert driver.folds
        assert driver.change(None, SLOW) == 1
        driver.push(b)
        assert driver.updates[0].summary.hyperparameters == (SLOW,)

    def test_a_change_keeps_the_initial_settings(self) -> None:
        driver = Driver(Sync())
        driver.change(Async(), SLOW)
        assert driver.machine.initial_settings == ((Adadelta(),), Sync())
        assert driver.machine.configuration() == ((SLOW,), Async())

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (Sync(min_workers=3), Sync(min_workers=2)),
            (Sync(quorum=3), Sync(quorum=2)),
            (Sync(), Sync(round_timeout_seconds=1.0)),
            (Sync(reduction="median"), Sync(quorum=1)),
        ],
    )
    def test_a_new_policy_applies_to_pushes_that_wait(self, before: Sync, after: Sync) -> None:
        driver = Driver(before)
        b, c = driver.open("b"), driver.open("c")
        if before.min_workers < 3:
            driver.open("a")
        driver.push(b)
        driver.push(c)
        driver.now = 2.0
        assert driver.version == 0
        assert driver.change(after) == 1
        assert len(contributions(driver.answers[b.id, 1])) == 2

    def test_a_new_reduction_applies_to_a_round_that_is_not_reduced_yet(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(b)  # a is awaited, and comes first
        assert driver.change(Sync(reduction="median", clip_norm=1.0)) == 1
        driver.push(a, norm=4.0)
        assert [factor for _, factor in driver.combined[0].pushes] == [0.25, 1.0]

    def test_a_larger_min_workers_applies_to_a_round_that_is_not_reduced_yet(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(b)
        assert driver.change(Sync(min_workers=3)) == 1
        c = driver.open("c")
        assert c.first_version == 0
        driver.push(a)
        assert driver.version == 0
        assert len(contributions(driver.push(c))) == 3


class TestDeferred:
    @pytest.mark.parametrize(
        "after",
        [Async(), Bounded(), Sync(reduction="median"), Sync(clip_norm=1.0), Sync(min_workers=2)],
    )
    def test_a_partly_reduced_round_closes_under_the_old_policy(self, after: Policy) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a, norm=4.0)
        assert driver.change(after, SLOW) == 2
        assert (driver.machine.policy, driver.machine.groups) == (Sync(), (Adadelta(),))
        assert driver.machine.configuration() == ((SLOW,), after)
        driver.push(b, norm=4.0)
        assert driver.updates[0].summary.hyperparameters == (Adadelta(),)
        assert driver.factors == {(a.id, 1): 1.0, (b.id, 1): 1.0}
        assert (driver.machine.policy, driver.machine.groups) == (after, (SLOW,))

    def test_the_last_of_several_deferred_changes_counts(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.change(Async())
        assert driver.change(Bounded(slack=4)) == 2
        driver.push(b)
        assert driver.machine.policy == Bounded(slack=4)

    def test_an_immediate_change_replaces_a_deferred_one(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.change(Async(), SLOW)
        assert driver.change(Sync(quorum=2), Adadelta(lr=0.5)) == 1
        driver.push(b)
        assert driver.machine.configuration() == ((Adadelta(lr=0.5),), Sync(quorum=2))

    def test_groups_added_meanwhile_are_part_of_a_deferred_change(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.change(Async(), SLOW)
        driver.machine.extend([Tensor("v", (4,), 1)], [Adadelta(rho=0.5)])
        driver.push(b)
        assert driver.machine.configuration() == ((SLOW, Adadelta(rho=0.5)), Async())

    def test_the_next_round_may_close_at_once(self) -> None:
        driver = Driver(Sync())
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.change(Sync(quorum=1, clip_norm=9.0))
        driver.push(b)
        assert driver.version == 1
        assert driver.push(a)


class TestOutOfRounds:
    def waiting(self) -> tuple[Driver, list[Key]]:
        """Returns a driver whose round has unreduced pushes of b and c, and the keys of those."""
        driver = Driver(Sync())
        c, b, _ = (driver.open(name) for name in "cba")
        driver.push(c, base=0, weight=2.0)
        driver.push(b, base=0)
        return driver, [(b.id, 1), (c.id, 1)]

    def test_to_async_each_push_is_an_update_of_its_own(self) -> None:
        driver, keys = self.waiting()
        assert driver.change(Async()) == 1
        assert driver.folds == keys
        assert [driver.answers[key].version for key in keys] == [1, 2]
        assert [contribution(driver.answers[key]).staleness for key in keys] == [0, 1]

    def test_to_async_a_push_that_has_become_too_stale_is_given_up(self) -> None:
        driver, (first, second) = self.waiting()
        driver.change(Async(max_staleness=0))
        assert driver.answers[first].version == 1
        refusal = driver.given_up[second]
        assert (refusal.reason, refusal.metadata) == ("STALE_BASE", {"base": "0", "current": "1", "bound": "0"})
        session = driver.machine.sessions.named("c")
        assert session
        assert contribution(driver.push(session, 1, base=1)).staleness == 0  # its number is free

    def test_to_async_with_damping_each_has_its_own_lr(self) -> None:
        driver, _ = self.waiting()
        driver.change(Async(damping=True))
        assert [update.summary.hyperparameters[0].lr for update in driver.updates] == [1.0, 0.5]

    def test_to_async_each_update_has_its_own_counts(self) -> None:
        driver = Driver(Sync(), Adam())
        c, b, _ = (driver.open(name) for name in "cba")
        driver.push(c, base=0)
        driver.push(b, base=0, absent=frozenset({1}))
        driver.machine.put_state([5, 7])
        driver.change(Async())
        assert [update.counts for update in driver.updates] == [(6, 7), (7, 8)]
        driver.machine.extend([Tensor("v", (4,))], [])
        driver.push(driver.open("d"))
        assert driver.updates[-1].counts == driver.machine.update_counts == (8, 9, 1)

    def test_to_bounded_each_push_is_a_step_whose_answer_may_be_withheld(self) -> None:
        driver, keys = self.waiting()
        driver.change(Bounded())
        assert driver.version == 2
        assert not driver.answers  # a has made no step
        a = driver.machine.sessions.named("a")
        assert a
        driver.push(a)
        assert set(driver.answers) == {*keys, (a.id, 1)}

    def test_a_late_joiner_may_push(self) -> None:
        driver, _ = self.waiting()
        late = driver.open("d")
        assert late.first_version == 1
        driver.change(Async())
        assert driver.push(late, base=1)
        assert driver.version_bumped == []

    def test_a_version_bump_serves_late_joiners_when_no_update_follows(self) -> None:
        driver = Driver(Sync())
        b, _ = driver.open("b"), driver.open("a")
        driver.machine.put_state([0, 0])
        driver.push(b, base=0)
        late = driver.open("d")
        assert late.first_version == 2
        driver.change(Async(max_staleness=0))
        assert (b.id, 1) in driver.given_up
        assert driver.version_bumped == [2]

    def test_the_push_of_an_ended_session_counts(self) -> None:
        driver, keys = self.waiting()
        session = driver.machine.sessions.named("c")
        assert session
        driver.close(session)
        driver.change(Bounded())
        assert keys[1] in driver.answers  # and is not held


class TestIntoRounds:
    @pytest.mark.parametrize("before", [Async(), Bounded()])
    def test_the_first_round_opens_at_the_current_version(self, before: Policy) -> None:
        driver = Driver(before)
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.push(b)
        assert driver.change(Sync()) == 3
        with refused("ROUND_CLOSED", base=1, current=2):
            driver.push(a, base=1)
        assert driver.push(a, base=2) is None
        assert len(contributions(driver.push(b, base=2))) == 2

    @pytest.mark.parametrize("after", [Sync(), Async(), Sync(min_workers=5)])
    def test_withheld_answers_are_given(self, after: Policy) -> None:
        driver = Driver(Bounded())
        a, _ = driver.open("a"), driver.open("b")
        assert driver.push(a) is None
        driver.change(after)
        assert driver.answers[a.id, 1].version == 1
        assert not a.waiting

    def test_clocks_start_anew(self) -> None:
        driver = Driver(Bounded(slack=1))
        a, _ = driver.open("a"), driver.open("b")
        driver.push(a)
        driver.change(Async())
        driver.push(a)
        driver.change(Bounded(slack=1))
        assert driver.push(a)
        assert driver.push(a) is None
