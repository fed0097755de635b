"""Norms of gradient and update in the result of a push, and that duplicates get the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from expected import Twin, gradient, norm, weighted_sum
from messages import Vector, asynchronous, bounded, cut, sync
from wire import Session, Wire, streamed

from deltaserve.v1.common_pb2 import REDUCTION_MEDIAN, Policy
from deltaserve.v1.worker_service_pb2 import PushResult

SHAPES = {"w": (40, 7), "b": (21,)}
SIZE = 301
START = gradient(99, SIZE)


def _steps(
    wire: Wire, sessions: Sequence[Session], number: int, gradients: Sequence[Vector], **fields: Any
) -> list[PushResult]:
    header = [session.header(number, **fields) for session in sessions]
    calls = [wire.begin(one, values) for one, values in zip(header, gradients, strict=True)]
    return [streamed(call).result for call in calls]


def _check(result: PushResult, values: Vector, update_norm: float) -> None:
    assert result.gradient_norm == pytest.approx(norm(values), rel=1e-6)
    assert result.update_norm == pytest.approx(update_norm, rel=1e-6)


def test_the_lengths_of_a_round_are_numpy_s(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=START, policy=sync(3))
    sessions = [wire.open("m", name) for name in "abc"]
    twin, weights = Twin(START), (1.0, 32.0, 0.25)
    for number in range(1, 6):
        gradients = [gradient(10 * number + k, SIZE) for k in range(3)]
        before = wire.snapshot("m").weights
        calls = [
            wire.begin(session.header(number, weight=weight), values)
            for session, weight, values in zip(sessions, weights, gradients, strict=True)
        ]
        update_norm = twin.update(weighted_sum(gradients, weights), sum(weights))
        for call, values in zip(calls, gradients, strict=True):
            answer = streamed(call)
            _check(answer.result, values, update_norm)
            moved = norm(answer.weights.astype(np.float64) - before)
            assert answer.result.update_norm == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize(
    "policy",
    [asynchronous(), asynchronous(damping=True), bounded(2), sync(), sync(reduction=REDUCTION_MEDIAN)],
    ids=["async", "damping", "bounded", "sync", "median"],
)
@pytest.mark.parametrize("chunk", [1, 13, SIZE])
def test_the_norms_of_a_push_are_those_of_numpy_whatever_its_chunks(wire: Wire, policy: Policy, chunk: int) -> None:
    wire.create("m", SHAPES, weights=START, policy=policy)
    session, twin = wire.open("m", "a"), Twin(START)
    for number in (1, 2):
        values = gradient(number, SIZE)
        update_norm = twin.update(values)
        pieces = cut(values, chunk)
        _check(wire.stream_step(session.header(number), pieces).result, values, update_norm)


def test_absent_tensors_do_not_count_in_the_norm(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=START)
    session, values = wire.open("m", "a"), gradient(1, SIZE)
    twin = Twin(START[280:])
    part = wire.step(session.header(1, absent_tensors=[0]), values[280:]).result
    _check(part, values[280:], twin.update(values[280:]))
    nothing = wire.step(session.header(2, absent_tensors=[0, 1]), []).result
    assert (nothing.gradient_norm, nothing.update_norm) == (0.0, 0.0)
    assert nothing.HasField("gradient_norm")
    assert nothing.HasField("update_norm")
    zeros = wire.step(session.header(3), np.zeros(SIZE)).result
    assert (zeros.gradient_norm, zeros.update_norm) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e19])
def test_lengths_of_extreme_values_are_finite_and_right(wire: Wire, scale: float) -> None:
    wire.create("m", SHAPES)
    values = np.full(SIZE, scale, np.float32)
    result = wire.step(wire.open("m", "a").header(1), values).result
    assert result.gradient_norm == pytest.approx(float(values[0]) * np.sqrt(SIZE), rel=1e-6)
    assert 0 < result.gradient_norm < float("inf")
    assert 0 <= result.update_norm < float("inf")


def test_the_norm_of_a_large_model_covers_the_shares_of_all_threads(wire: Wire) -> None:
    size = 1_000_003
    wire.create("m", {"w": (size,)}, weights=gradient(99, size))
    values, twin = gradient(1, size), Twin(gradient(99, size))
    result = wire.stream_step(wire.open("m", "a").header(1), cut(values)).result
    _check(result, values, twin.update(values))


def test_a_duplicate_has_the_norms_of_the_first_result(wire: Wire) -> None:
    wire.create("m", SHAPES, policy=sync(2))
    sessions = [wire.open("m", name) for name in "ab"]
    first = {
        number: _steps(wire, sessions, number, [gradient(number, SIZE), gradient(-number % 97, SIZE)], weight=2.0)
        for number in range(1, 11)
    }
    for number in range(3, 11):
        again = wire.step(sessions[0].header(number), gradient(number, SIZE)).result
        assert again.duplicate
        again.duplicate = False
        assert again == first[number][0]
        assert again == wire.fate(sessions[0], number).result
    for number in (1, 2):
        lost = wire.step(sessions[0].header(number), gradient(number, SIZE)).result
        assert (lost.duplicate, lost.version) == (True, 10)
        assert not lost.HasField("gradient_norm")
        assert not lost.HasField("update_norm")
