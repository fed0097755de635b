"""Pushes without some tensors, and with hyperparameters of their own."""

import numpy as np
from messages import Vector, adadelta, floats, push, sync
from numpy.typing import ArrayLike
from wire import Snapshot, Wire, streamed, unchanged

from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve.v1.worker_service_pb2 import StepRequest
from deltaserve_server.optimizers import reference

SHAPES = {"a": (3,), "empty": (0, 5), "b": (2, 2), "c": ()}
A, B, C = slice(0, 3), slice(3, 7), slice(7, 8)
ONES = np.ones(8, np.float32)


def _expected(before: Snapshot, part: slice, gradient: ArrayLike, own: Optimizer) -> tuple[Vector, ...]:
    weights, *slots = (vector[part] for vector in before.arrays)
    new_slots, new_weights = reference.update(own, np.asarray(gradient), slots, weights, 1)
    return tuple(vector.astype(np.float32) for vector in (new_weights, *new_slots))


def _assert_part(after: Snapshot, part: slice, expected: tuple[Vector, ...]) -> None:
    for got, wanted in zip(after.arrays, expected, strict=True):
        np.testing.assert_allclose(got[part], wanted, rtol=1e-5, atol=1e-12)


def _assert_kept(before: Snapshot, after: Snapshot, part: slice) -> None:
    for old, new in zip(before.vectors, after.vectors, strict=True):
        assert np.array_equal(np.frombuffer(old, "<f4")[part], np.frombuffer(new, "<f4")[part])


def test_an_absent_tensor_keeps_its_weights_and_state(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=np.arange(8))
    session = wire.open("m", "w")
    wire.step(session.header(1), ONES)
    before = wire.snapshot("m")
    answer = wire.step(session.header(2, absent_tensors=[0, 3]), ONES[B])
    after = wire.snapshot("m")
    assert after.update_counts == (1, 2, 2, 1)
    for part in (A, C):
        _assert_kept(before, after, part)
    _assert_part(after, B, _expected(before, B, ONES[B], Adadelta()))
    assert np.array_equal(answer.weights, after.weights)


def test_zeros_are_a_gradient_and_absence_is_none(wire: Wire) -> None:
    wire.create("m", SHAPES)
    session = wire.open("m", "w")
    wire.step(session.header(1), ONES)
    before = wire.snapshot("m")
    wire.step(session.header(2), np.zeros(8))
    after = wire.snapshot("m")
    assert after.update_counts == (2, 2, 2, 2)
    np.testing.assert_allclose(after.square_avg, before.square_avg * np.float32(0.9), rtol=1e-6)
    assert np.array_equal(after.weights, before.weights)


def test_a_push_without_any_gradient_makes_a_version_and_changes_nothing_else(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=np.arange(8))
    session = wire.open("m", "w")
    wire.step(session.header(1), ONES)
    before = wire.snapshot("m")
    assert wire.step(session.header(2, absent_tensors=range(4)), []).result.version == 2
    assert wire.stream_step(session.header(3, absent_tensors=range(4)), []).result.version == 3
    after = wire.snapshot("m")
    assert (after.vectors, after.update_counts) == (before.vectors, before.update_counts)


def test_a_stream_leaves_out_the_offsets_of_absent_tensors(wire: Wire) -> None:
    wire.create("m", SHAPES)
    session = wire.open("m", "w")
    answer = wire.stream_step(session.header(1, absent_tensors=[1, 2]), [(0, ONES[:2]), (2, ONES[:1]), (7, ONES[:1])])
    after = wire.snapshot("m")
    assert after.update_counts == (1, 0, 0, 1)
    assert np.array_equal(answer.weights != 0, [True] * 3 + [False] * 4 + [True])


def test_absent_in_some_pushes_of_a_round_counts_as_zero_there(wire: Wire) -> None:
    wire.create("m", SHAPES, policy=sync())
    a, b, c = (wire.open("m", name) for name in "abc")
    before = wire.snapshot("m")
    calls = [
        wire.begin(b.header(1), 3 * ONES),
        wire.start("StreamStep", push(c.header(1, absent_tensors=[0, 2]), [(7, [6.0])])),
    ]
    wire.step(a.header(1, absent_tensors=[0]), 3 * ONES[3:])
    for call in calls:
        streamed(call)
    after = wire.snapshot("m")
    assert after.update_counts == (1, 1, 1, 1)
    for part, mean in ((A, [1.0] * 3), (B, [2.0] * 4), (C, [4.0])):
        _assert_part(after, part, _expected(before, part, mean, Adadelta()))


def test_absent_in_all_pushes_of_a_round_is_untouched(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=np.arange(8), policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    before = wire.snapshot("m")
    call = wire.start("StreamStep", push(b.header(1, absent_tensors=[0, 2]), [(7, [2.0])]))
    answer = wire.stream_step(a.header(1, absent_tensors=[2, 3]), [(0, ONES[A])])
    streamed(call)
    after = wire.snapshot("m")
    assert after.update_counts == (1, 1, 0, 1)
    _assert_kept(before, after, B)
    _assert_part(after, A, _expected(before, A, [0.5] * 3, Adadelta()))
    _assert_part(after, C, _expected(before, C, [1.0], Adadelta()))
    assert np.array_equal(answer.weights, after.weights)


def test_weight_decay_does_not_touch_an_absent_tensor(wire: Wire) -> None:
    wire.create("m", SHAPES, weights=np.arange(8), groups=[adadelta(weight_decay=0.5)])
    session = wire.open("m", "w")
    wire.step(session.header(1, absent_tensors=[2]), ONES[:4])
    assert np.array_equal(wire.snapshot("m").weights[B], np.arange(3, 7, dtype=np.float32))


def test_each_group_has_its_hyperparameters(wire: Wire) -> None:
    groups = [adadelta(lr=0.5), adadelta(rho=0.5, eps=1e-3), adadelta(weight_decay=0.25, maximize=True)]
    wire.create("m", SHAPES, weights=np.arange(8), groups=groups, group_of=[0, 0, 1, 2])
    session = wire.open("m", "w")
    before = wire.snapshot("m")
    answer = wire.step(session.header(1), ONES)
    after = wire.snapshot("m")
    _assert_part(after, A, _expected(before, A, ONES[A], Adadelta(lr=0.5)))
    _assert_part(after, B, _expected(before, B, ONES[B], Adadelta(rho=0.5, eps=1e-3)))
    _assert_part(after, C, _expected(before, C, ONES[C], Adadelta(weight_decay=0.25, maximize=True)))
    used = [group.adadelta for group in answer.result.hyperparameters]
    assert [(g.lr, g.rho, g.eps, g.weight_decay, g.maximize) for g in used] == [
        (0.5, 0.9, 1e-6, 0.0, False),
        (1.0, 0.5, 1e-3, 0.0, False),
        (1.0, 0.9, 1e-6, 0.25, True),
    ]
    assert all(g.HasField(name) for g in used for name in ("lr", "rho", "eps", "weight_decay", "maximize"))


def test_the_hyperparameters_of_a_push_apply_to_its_update_alone(wire: Wire) -> None:
    wire.create("m", SHAPES, groups=[adadelta(lr=0.5), adadelta(rho=0.8)], group_of=[0, 0, 1, 1])
    session = wire.open("m", "w")
    before = wire.snapshot("m")
    answer = wire.step(session.header(1, hyperparameters=[adadelta(lr=2.0), adadelta()]), ONES)
    after = wire.snapshot("m")
    _assert_part(after, A, _expected(before, A, ONES[A], Adadelta(lr=2.0)))
    _assert_part(after, B, _expected(before, B, ONES[B], Adadelta(rho=0.8)))
    assert [(g.adadelta.lr, g.adadelta.rho) for g in answer.result.hyperparameters] == [(2.0, 0.9), (1.0, 0.8)]
    again = wire.step(session.header(2), ONES)
    assert [(g.adadelta.lr, g.adadelta.rho) for g in again.result.hyperparameters] == [(0.5, 0.9), (1.0, 0.8)]
    _assert_part(wire.snapshot("m"), A, _expected(after, A, ONES[A], Adadelta(lr=0.5)))


def test_a_round_takes_the_hyperparameters_that_some_of_its_pushes_carry(wire: Wire) -> None:
    wire.create("m", SHAPES, policy=sync())
    a, b, c = (wire.open("m", name) for name in "abc")
    calls = [
        wire.begin(c.header(1), ONES),
        wire.begin(a.header(1, hyperparameters=[adadelta(lr=0.25)]), ONES),
    ]
    answer = wire.step(b.header(1, hyperparameters=[adadelta(lr=0.25, rho=0.9)]), ONES)
    for result in (answer.result, *(streamed(call).result for call in calls)):
        assert (result.hyperparameters[0].adadelta.lr, result.contributors) == (0.25, 3)


def test_a_round_refuses_a_push_with_conflicting_hyperparameters_and_continues(wire: Wire) -> None:
    wire.create("m", SHAPES, policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1, hyperparameters=[adadelta(rho=0.5)]), ONES)
    with unchanged(wire, "m"):
        other = StepRequest(header=b.header(1, hyperparameters=[adadelta(rho=0.75)]), gradient=floats(ONES))
        refused = wire.refused("Step", other)
    assert refused.metadata == {"field": "groups[0].rho", "round": "0.5", "got": "0.75"}
    answer = wire.step(b.header(1, hyperparameters=[adadelta(rho=0.5)]), ONES)
    assert answer.result.contributors == streamed(call).result.contributors == 2
