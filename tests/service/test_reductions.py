"""How the pushes of a round become one gradient: weighted mean, clipping, trimmed mean, median."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from expected import Twin, gradient, norm, weighted_sum
from messages import Vector, push, sync
from wire import Snapshot, Stepped, Wire, streamed

from deltaserve.v1.common_pb2 import REDUCTION_MEDIAN, REDUCTION_TRIMMED_MEAN, Policy

NAMES = ("Zoe", "a", "b1", "b10", "b2")
"""In the order in which a round adds pushes: the order of their bytes."""

SHAPES = {"w": (40, 7), "b": (21,)}
SIZE = 301
START = gradient(99, SIZE)


def _round(
    wire: Wire,
    policy: Policy,
    gradients: Sequence[Vector],
    weights: Sequence[float] | None = None,
    arriving: Sequence[int] | None = None,
) -> tuple[Snapshot, list[Stepped]]:
    """Makes one round of a new model. Returns its state, and the answers by worker."""
    wire.create("m", SHAPES, weights=START, policy=policy)
    order = range(len(gradients)) if arriving is None else arriving
    sessions = [wire.open("m", name) for name in NAMES[: len(gradients)]]
    calls = {}
    for k in order:
        fields: dict[str, Any] = {} if weights is None else {"weight": weights[k]}
        calls[k] = wire.begin(sessions[k].header(1, **fields), gradients[k])
    answers = [streamed(calls[k]) for k in range(len(gradients))]
    state = wire.snapshot("m")
    wire.delete("m")
    return state, answers


@pytest.mark.parametrize(
    "weights",
    [(1.0, 1.0, 1.0), (32.0, 7.0, 64.0), (0.1, 0.3, 1e-3), (1e-9, 1e9, 1.0), (1 / 3, 2 / 3, 1e9)],
    ids=str,
)
def test_a_weighted_mean_has_the_bits_of_numpy(wire: Wire, weights: tuple[float, ...]) -> None:
    gradients = [gradient(k, SIZE) for k in range(3)]
    twin = Twin(START)
    twin.update(weighted_sum(gradients, weights), sum(weights))
    for arriving in permutations(range(3)):
        state, answers = _round(wire, sync(3), gradients, weights, arriving)
        twin.check(state)
        assert all(answer.weights.tobytes() == state.vectors[0] for answer in answers)


def test_the_weight_of_a_single_worker_changes_nothing(wire: Wire) -> None:
    twin = Twin(START)
    twin.update(gradient(1, SIZE))
    for weight in (1e-9, 0.3, 1.0, 1e9):
        twin.check(_round(wire, sync(), [gradient(1, SIZE)], [weight])[0])


def test_a_worker_with_a_thousand_samples_outweighs_one_with_one(wire: Wire) -> None:
    gradients = [np.full(SIZE, 1.0, np.float32), np.full(SIZE, -1.0, np.float32)]
    state, _ = _round(wire, sync(), gradients, [1000.0, 1.0])
    assert (state.weights < START).all()
    state, _ = _round(wire, sync(), gradients, [1.0, 1000.0])
    assert (state.weights > START).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (32.0, 7.0, 0.5)], ids=str)
def test_only_pushes_longer_than_clip_norm_are_scaled_down(wire: Wire, weights: tuple[float, ...]) -> None:
    gradients = [gradient(k, SIZE) * np.float32(scale) for k, scale in enumerate((1.0, 1e-6, 1e6))]
    clip = 2.0 * norm(gradients[1])
    assert [norm(values) > clip for values in gradients] == [True, False, True]
    lengths = [answer.result.gradient_norm for answer in _round(wire, sync(3), gradients)[1]]
    scales = [min(1.0, clip / length) for length in lengths]
    state, answers = _round(wire, sync(3, clip_norm=clip), gradients, weights)
    twin = Twin(START)
    twin.update(
        weighted_sum(gradients, [scale * weight for scale, weight in zip(scales, weights, strict=True)]), sum(weights)
    )
    twin.check(state)
    for answer, values in zip(answers, gradients, strict=True):
        assert answer.result.gradient_norm == pytest.approx(norm(values), rel=1e-6), "as it came, before clipping"


def test_the_push_of_a_single_worker_is_clipped_too(wire: Wire) -> None:
    values = gradient(1, SIZE)
    (clipped,) = _round(wire, sync(clip_norm=norm(values) / 4), [values])[1]
    wire.create("m", SHAPES, weights=START)
    quarter = wire.step(wire.open("m", "a").header(1), values / np.float32(4))
    np.testing.assert_allclose(clipped.weights, quarter.weights, rtol=1e-5)
    wire.delete("m")
    (untouched,) = _round(wire, sync(clip_norm=norm(values) * 1.001), [values])[1]
    twin = Twin(START)
    twin.update(values)
    assert untouched.weights.tobytes() == twin.weights.tobytes()


@pytest.mark.parametrize("pushes", [1, 2])
@pytest.mark.parametrize("clip", [5e-324, 1e-310, 1e-45, 1e-30])
def test_a_clip_norm_far_below_all_gradients_does_no_harm(wire: Wire, clip: float, pushes: int) -> None:
    """The factor of the push is smaller than the smallest float32, or even float64."""
    gradients = [np.full(SIZE, 1.8e19, np.float32)] * pushes
    state, answers = _round(wire, sync(pushes, clip_norm=clip), gradients, [1e-9] * pushes)
    assert [answer.result.version for answer in answers] == [1] * pushes
    assert state.vectors[0] == START.tobytes()
    assert not np.frombuffer(state.vectors[1], "<f4").any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_median_is_numpy_s(wire: Wire, count: int) -> None:
    gradients = [gradient(k, SIZE) for k in range(count)]
    twin = Twin(START)
    twin.update(np.median(np.stack(gradients).astype(np.float64), axis=0).astype(np.float32))
    policy = sync(count, reduction=REDUCTION_MEDIAN)
    for arriving in (range(count), reversed(range(count))):
        state, _ = _round(wire, policy, gradients, [10.0**k for k in range(count)], list(arriving))
        twin.check(state)


@pytest.mark.parametrize(("count", "trim"), [(3, 1), (4, 1), (5, 1), (5, 2)])
def test_a_trimmed_mean_is_numpy_s(wire: Wire, count: int, trim: int) -> None:
    gradients = [gradient(k, SIZE) for k in range(count)]
    kept = np.sort(np.stack(gradients).astype(np.float64), axis=0)[trim : count - trim]
    twin = Twin(START)
    twin.update(kept.mean(axis=0).astype(np.float32))
    policy = sync(count, reduction=REDUCTION_TRIMMED_MEAN, trim=trim)
    states = [
        _round(wire, policy, gradients, [10.0**k for k in range(count)], list(arriving))[0]
        for arriving in (range(count), reversed(range(count)))
    ]
    assert states[0].vectors == states[1].vectors
    for got, wanted in zip(states[0].vectors, twin.vectors, strict=True):
        np.testing.assert_allclose(np.frombuffer(got, "<f4"), wanted, rtol=1e-6)


@pytest.mark.parametrize("liar", range(5))
@pytest.mark.parametrize(
    "policy",
    [sync(5, reduction=REDUCTION_MEDIAN), sync(5, reduction=REDUCTION_TRIMMED_MEAN, trim=1)],
    ids=["median", "trimmed mean"],
)
def test_a_liar_moves_no_element_out_of_the_honest_range(wire: Wire, liar: int, policy: Policy) -> None:
    honest = [gradient(k, SIZE) for k in range(4)]
    nonsense = np.where(np.arange(SIZE) % 2, np.float32(1.8e19), np.float32(-1.8e19))
    gradients = [*honest[:liar], nonsense, *honest[liar:]]
    state, _ = _round(wire, policy, gradients, [1e9 if k == liar else 1.0 for k in range(5)])
    # The first update's average is (1 - rho) g^2, which shows the magnitude of g.
    reduced = np.sqrt(state.square_avg.astype(np.float64) / 0.1)
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    furthest = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    assert (reduced <= furthest * (1 + 1e-5)).all()
    moved = np.sign(state.weights.astype(np.float64) - START)
    assert (moved[low > 0] <= 0).all()
    assert (moved[high < 0] >= 0).all()


def test_a_liar_does_move_the_mean(wire: Wire) -> None:
    """Otherwise the test above would prove nothing."""
    gradients = [*(gradient(k, SIZE) for k in range(4)), np.full(SIZE, 1.8e19, np.float32)]
    state, _ = _round(wire, sync(5), gradients)
    assert (state.square_avg > 1e30).all()


def _absences(wire: Wire, policy: Policy) -> tuple[Snapshot, Snapshot]:
    """Makes a round of three pushes: one has w, none has c, two have b. Returns the states before and after."""
    wire.create("m", {"w": (3,), "c": (2,), "b": (2,)}, weights=np.arange(7), policy=policy)
    sessions = [wire.open("m", name) for name in "abc"]
    before = wire.snapshot("m")
    pushes: list[tuple[list[int], list[tuple[int, list[float]]]]] = [
        ([1], [(0, [9.0] * 3), (5, [9.0] * 2)]),
        ([0, 1], [(5, [5.0] * 2)]),
        ([0, 1, 2], []),
    ]
    calls = [
        wire.start("StreamStep", push(session.header(1, absent_tensors=absent), chunks))
        for session, (absent, chunks) in zip(sessions, pushes, strict=True)
    ]
    for call in calls:
        assert streamed(call).result.contributors == 3
    after = wire.snapshot("m")
    wire.delete("m")
    assert after.update_counts == (1, 0, 1)
    for old, new in zip(before.vectors, after.vectors, strict=True):
        assert old[3 * 4 : 5 * 4] == new[3 * 4 : 5 * 4], "nobody had a gradient of it"
    return before, after


@pytest.mark.parametrize(
    ("policy", "reduced"),
    [
        (sync(3), (3.0, 14.0 / 3)),
        (sync(3, reduction=REDUCTION_MEDIAN), (0.0, 5.0)),
        (sync(3, reduction=REDUCTION_TRIMMED_MEAN, trim=1), (0.0, 5.0)),
        (sync(3, clip_norm=1e6), (3.0, 14.0 / 3)),
    ],
    ids=["mean", "median", "trimmed mean", "clipped"],
)
def test_an_absent_element_counts_as_zero(wire: Wire, policy: Policy, reduced: tuple[float, float]) -> None:
    before, after = _absences(wire, policy)
    np.testing.assert_allclose(np.sqrt(after.square_avg[[0, 5]] / 0.1), reduced, rtol=1e-5)
    assert (after.weights[0] == before.weights[0]) == (reduced[0] == 0.0)
    assert after.weights[5] < before.weights[5]


def test_a_median_works_round_after_round(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=START, policy=sync(3, reduction=REDUCTION_MEDIAN))
    sessions = [wire.open("m", name) for name in NAMES[:3]]
    twin = Twin(START)
    for number in range(1, 6):
        gradients = [gradient(10 * number + k, SIZE) for k in range(3)]
        calls = [wire.begin(s.header(number), values) for s, values in zip(sessions, gradients, strict=True)]
        twin.update(np.median(np.stack(gradients), axis=0))
        for call in calls:
            assert streamed(call).result.version == number
    twin.check(wire.snapshot("m"))
