"""The synchronous policy: weights, clipping and robust reductions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine_driver import Driver

from deltaserve_server.model import Answer, Async, Bounded, Combine, Fold, Policy, Sync, Update


def test_weights_are_factors_and_their_sum_is_the_divisor() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    driver.push(b, weight=32.0)
    driver.push(a, weight=8.0)
    assert driver.decisions == [
        Fold((a.id, 1), 8.0),
        Fold((b.id, 1), 32.0),
        driver.updates[0],
        Answer((a.id, 1), driver.answers[a.id, 1]),
        Answer((b.id, 1), driver.answers[b.id, 1]),
    ]
    assert driver.updates[0].weight == 40.0
    assert [(contribution.worker, contribution.weight) for contribution in driver.updates[0].summary.contributions] == [
        ("a", 8.0),
        ("b", 32.0),
    ]


@pytest.mark.parametrize(("norm", "factor"), [(0.0, 3.0), (2.0, 3.0), (2.5, 2.4), (8.0, 0.75)])
def test_a_push_longer_than_clip_norm_is_scaled_down_to_it(norm: float, factor: float) -> None:
    driver = Driver(Sync(clip_norm=2.0))
    a = driver.open("a")
    driver.push(a, weight=3.0, norm=norm)
    assert driver.factors[a.id, 1] == pytest.approx(factor, rel=1e-15)
    assert driver.updates[0].weight == 3.0  # the mean of clipped pushes, not a mean clipped
    assert driver.updates[0].summary.contributions[0].norm == norm  # as it came


@pytest.mark.parametrize(("workers", "trim"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_the_median_keeps_one_or_two_values(workers: int, trim: int) -> None:
    driver = Driver(Sync(reduction="median"))
    sessions = [driver.open(name) for name in "abcdef"[:workers]]
    for session in reversed(sessions):
        driver.push(session, weight=5.0)
    assert driver.combined == [Combine(tuple(((session.id, 1), 1.0) for session in sessions), trim)]
    assert driver.folds == []


def test_the_trimmed_mean_drops_trim_values_at_either_end() -> None:
    driver = Driver(Sync(min_workers=5, reduction="trimmed_mean", trim=2, clip_norm=1.0))
    sessions = [driver.open(name) for name in "edcba"]
    for session in sessions[:4]:
        driver.push(session, weight=100.0, norm=4.0)
        assert driver.decisions == []  # nothing before the round closes
    driver.push(sessions[4], norm=0.5)
    pushes = tuple(((session.id, 1), 0.25 if session is not sessions[4] else 1.0) for session in reversed(sessions))
    assert driver.combined == [Combine(pushes, 2)]


def test_a_robust_round_that_closes_by_quorum_combines_the_pushes_that_it_has() -> None:
    driver = Driver(Sync(min_workers=3, reduction="median", quorum=3))
    a, b, c, d = (driver.open(name) for name in "abcd")
    for session in (d, b, c):
        driver.push(session)
    assert driver.combined == [Combine(tuple(((session.id, 1), 1.0) for session in (b, c, d)), 1)]
    assert not a.waiting


@pytest.mark.parametrize("policy", [Async(), Bounded(slack=1), Async(damping=True)])
def test_the_weight_of_a_single_push_has_no_effect(policy: Policy) -> None:
    driver = Driver(policy)
    a = driver.open("a")
    driver.push(a, weight=7.0)
    assert driver.factors[a.id, 1] == driver.updates[0].weight
    assert driver.updates[0].summary.contributions[0].weight == 7.0


@pytest.mark.parametrize("reduction", ["mean", "median", "trimmed_mean"])
@given(order=st.permutations(range(4)))
def test_the_reduction_does_not_depend_on_the_order_of_arrival(reduction: str, order: list[int]) -> None:
    policies = {
        "mean": Sync(clip_norm=1.0, quorum=3, grace_seconds=9.0),
        "median": Sync(reduction="median"),
        "trimmed_mean": Sync(min_workers=3, reduction="trimmed_mean", trim=1, round_timeout_seconds=5.0),
    }
    driver = Driver(policies[reduction])
    names = ["a10", "B", "a9", "c"]
    sessions = [driver.open(name) for name in names]
    for index in order:
        driver.push(sessions[index], weight=1.0 + index, norm=float(index))
    reduced = [(key, driver.factors[key]) for key in driver.folds] or list(driver.combined[0].pushes)
    expected = sorted(range(4), key=lambda index: names[index])
    assert [key for key, _ in reduced] == [(sessions[index].id, 1) for index in expected]
    scales = [1.0 if index < 2 or reduction != "mean" else 1.0 / index for index in expected]
    weights = [1.0 + index if reduction == "mean" else 1.0 for index in expected]
    assert [factor for _, factor in reduced] == [scale * weight for scale, weight in zip(scales, weights, strict=True)]


def test_an_update_follows_the_reduction_of_its_own_pushes() -> None:
    driver = Driver(Sync())
    a, b = driver.open("a"), driver.open("b")
    for _ in range(3):
        driver.push(a)
        driver.push(b)
    kinds = [type(decision) for decision in driver.decisions]
    assert kinds == [Fold, Fold, Update, Answer, Answer] * 3
