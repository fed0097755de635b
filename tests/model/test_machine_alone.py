"""The asynchronous and the bounded policy: every push is an update at once."""

import pytest
from machine_driver import LEASE, Driver, contribution, refused

from deltaserve._common.optimizers import Adadelta
from deltaserve_server.model import Async, Bounded, Session, Tensor


class TestMaxStaleness:
    @pytest.mark.parametrize("bound", [0, 2])
    def test_a_push_may_be_as_stale_as_max_staleness_and_no_staler(self, bound: int) -> None:
        driver = Driver(Async(max_staleness=bound))
        a, b = driver.open("a"), driver.open("b")
        for _ in range(5):
            driver.push(a)
        with refused("STALE_BASE", base=4 - bound, current=5, bound=bound):
            driver.push(b, base=4 - bound)
        assert (b.last_accepted, driver.version) == (0, 5)
        assert contribution(driver.push(b, 1, base=5 - bound)).staleness == bound

    def test_an_unset_base_is_never_stale(self) -> None:
        driver = Driver(Async(max_staleness=0))
        a, b = driver.open("a"), driver.open("b")
        driver.push(a)
        assert contribution(driver.push(b)).staleness == 0

    def test_a_duplicate_is_not_checked_for_staleness(self) -> None:
        driver = Driver(Async(max_staleness=0))
        a = driver.open("a")
        driver.push(a, 1, base=0)
        driver.push(a, 2, base=1)
        result = driver.push(a, 1, base=0)
        assert result
        assert (result.version, result.duplicate) == (1, True)

    def test_put_state_makes_older_bases_stale(self) -> None:
        driver = Driver(Async(max_staleness=0))
        a = driver.open("a")
        driver.machine.put_state([0, 0])
        with refused("STALE_BASE", base=0, current=1, bound=0):
            driver.push(a, base=0)


class TestDamping:
    def test_lr_is_divided_by_one_plus_the_staleness(self) -> None:
        driver = Driver(Async(damping=True))
        a, b = driver.open("a"), driver.open("b")
        for _ in range(3):
            driver.push(a)
        driver.push(b, base=0)
        driver.push(b, base=3, hyperparameters=Adadelta(lr=0.5, rho=0.8))
        used = [update.summary.hyperparameters for update in driver.updates[2:]]
        assert used == [
            (Adadelta(),),
            (Adadelta(lr=0.25),),
            (Adadelta(lr=0.25, rho=0.8),),
        ]
        assert driver.machine.groups == (Adadelta(),)

    def test_groups_that_the_worker_does_not_know_are_damped_too(self) -> None:
        driver = Driver(Async(damping=True))
        a = driver.open("a")
        driver.push(a)
        driver.machine.extend([Tensor("v", (4,), 1)], [Adadelta(lr=0.5)])
        driver.push(a, base=0, hyperparameters=Adadelta(lr=3.0))
        assert driver.updates[-1].summary.hyperparameters == (Adadelta(lr=1.5), Adadelta(lr=0.25))


class TestBounded:
    def start(self, slack: int) -> tuple[Driver, Session, Session]:
        """Returns a driver, a session "fast" whose answer is withheld, and a session "slow"."""
        driver = Driver(Bounded(slack=slack))
        fast, slow = driver.open("fast"), driver.open("slow")
        for _ in range(slack):
            assert driver.push(fast)
        assert driver.push(fast) is None
        assert driver.version == slack + 1  # an update at once nevertheless
        return driver, fast, slow

    @pytest.mark.parametrize("slack", [0, 1, 3])
    def test_a_worker_that_is_too_far_ahead_waits_for_the_slowest_to_push(self, slack: int) -> None:
        driver, fast, slow = self.start(slack)
        result = driver.push(slow)
        assert result
        assert result.version == slack + 2
        assert driver.answers[fast.id, slack + 1].version == slack + 1
        assert not driver.answers[fast.id, slack + 1].duplicate

    def test_a_worker_whose_answer_is_withheld_may_not_push(self) -> None:
        driver, fast, slow = self.start(1)
        with refused("SLACK_EXCEEDED", ahead=2, slack=1):
            driver.push(fast)
        assert (fast.last_accepted, driver.version) == (2, 2)
        driver.push(slow)
        assert driver.push(fast) is None
        assert driver.version == 4

    def test_a_duplicate_of_its_push_waits_too(self) -> None:
        driver, fast, slow = self.start(1)
        assert driver.push(fast, 2) is None
        with refused("SEQUENCE_REUSED"):
            driver.push(fast, 2, fingerprint=9)
        before = driver.push(fast, 1)
        assert before
        assert before.duplicate
        driver.push(slow)
        assert driver.answers[fast.id, 2].version == 2
        assert driver.version == 3

    def test_closing_the_slowest_session_ends_the_wait(self) -> None:
        driver, fast, slow = self.start(0)
        driver.close(slow)
        assert driver.answers[fast.id, 1].version == 1

    def test_the_end_of_the_slowest_session_s_lease_ends_the_wait(self) -> None:
        driver, fast, _ = self.start(0)
        driver.now = LEASE - 1
        driver.machine.renew(fast.id, driver.now)
        assert driver.tick(1) == ["slow"]
        assert driver.answers[fast.id, 1].version == 1

    def test_closing_its_own_session_ends_the_wait(self) -> None:
        driver, fast, _ = self.start(0)
        driver.close(fast)
        assert driver.answers[fast.id, 1].version == 1

    def test_fencing_its_session_ends_the_wait(self) -> None:
        driver, fast, slow = self.start(0)
        successor = driver.open("fast")
        assert driver.answers[fast.id, 1].version == 1
        assert successor.clock == slow.clock

    def test_the_slowest_of_all_sessions_counts(self) -> None:
        driver = Driver(Bounded(slack=1))
        a, b, c = (driver.open(name) for name in "abc")
        driver.push(a)
        driver.push(b)
        assert driver.push(a) is None
        driver.push(b)
        assert (a.id, 2) not in driver.answers  # c has made no step
        driver.push(c)
        assert {(a.id, 2), (b.id, 2)} <= driver.answers.keys()

    def test_a_newcomer_starts_at_the_clock_of_the_slowest(self) -> None:
        driver = Driver(Bounded(slack=2))
        a, b = driver.open("a"), driver.open("b")
        for _ in range(5):
            driver.push(a)
            driver.push(b)
        driver.push(a)
        c = driver.open("c")
        assert (a.clock, b.clock, c.clock) == (6, 5, 5)
        assert driver.push(a)  # 7, and the slowest at 5
        assert driver.push(a) is None

    def test_a_single_worker_never_waits(self) -> None:
        driver = Driver(Bounded())
        a = driver.open("a")
        assert all(driver.push(a) for _ in range(10))

    def test_a_larger_slack_releases_withheld_answers(self) -> None:
        driver, fast, _ = self.start(0)
        assert driver.change(Bounded(slack=1)) == 2
        assert driver.answers[fast.id, 1].version == 1

    def test_a_smaller_slack_withholds_the_next_answers(self) -> None:
        driver = Driver(Bounded(slack=3))
        fast, _ = driver.open("fast"), driver.open("slow")
        driver.push(fast)
        driver.push(fast)
        driver.change(Bounded(slack=1))
        assert driver.push(fast) is None
