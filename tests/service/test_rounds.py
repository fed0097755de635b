"""Rounds of a synchronous model: members, late joiners, sessions that end, and pushes that wait."""

from collections.abc import Iterator
from threading import Event
from time import monotonic, sleep

import grpc
import numpy as np
import pytest
from messages import Vector, cut, floats, push, sync
from numpy.typing import ArrayLike, NDArray
from wire import Session, Stepped, Wire, eventually, pulled, refusal, streamed, unchanged

from deltaserve._common.optimizers import Adadelta
from deltaserve.v1.worker_service_pb2 import PullRequest, StepRequest
from deltaserve_server import LocalServer
from deltaserve_server.memory.host import HostStore
from deltaserve_server.optimizers import reference


def _gradient(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(5).astype(np.float32)


def _first_update(gradient: ArrayLike) -> NDArray[np.float32]:
    zeros = np.zeros(5)
    return reference.update(Adadelta(), np.asarray(gradient), [zeros, zeros], zeros, 1)[1].astype(np.float32)


def _check(answer: Stepped, version: int, contributors: int) -> None:
    result = answer.result
    assert (result.version, result.contributors, result.duplicate, result.staleness) == (
        version,
        contributors,
        False,
        0,
    )


def test_a_round_closes_when_every_session_has_pushed_and_takes_the_mean(wire: Wire) -> None:
    wire.create("m", policy=sync())
    sessions = [wire.open("m", name) for name in "cab"]
    calls = [wire.begin(session.header(1), _gradient(k)) for k, session in enumerate(sessions[:2])]
    assert wire.waiting("m") == {"c", "a"}
    assert wire.snapshot("m").version == 0
    answers = [wire.step(sessions[2].header(1), _gradient(2)), *map(streamed, calls)]
    for answer in answers:
        _check(answer, 1, 3)
        assert np.array_equal(answer.weights, answers[0].weights)
    mean = np.mean([_gradient(k) for k in range(3)], axis=0, dtype=np.float64)
    np.testing.assert_allclose(answers[0].weights, _first_update(mean), rtol=1e-5)
    assert wire.waiting("m") == set()


def test_a_round_waits_for_min_workers_to_join(wire: Wire) -> None:
    wire.create("m", policy=sync(3))
    first = wire.open("m", "b")
    call = wire.begin(first.header(1), _gradient(0))
    second = wire.open("m", "a")
    assert second.opened.first_version == 0
    other_call = wire.begin(second.header(1), _gradient(1))
    third = wire.open("m", "c")
    assert third.opened.first_version == 0
    _check(wire.step(third.header(1), _gradient(2)), 1, 3)
    _check(streamed(call), 1, 3)
    _check(streamed(other_call), 1, 3)


def test_a_session_that_opens_during_a_round_joins_the_next(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    c = wire.open("m", "c")
    assert (c.opened.first_version, c.opened.position.version) == (1, 0)
    pull = wire.start("Pull", [PullRequest(model="m", wait_for_version=1)])
    sleep(0.1)
    assert not pull.done()
    _check(wire.step(b.header(1), _gradient(1)), 1, 2)
    streamed(call)
    header, weights = pulled(pull)
    assert header.position.version == 1
    assert np.array_equal(weights, wire.snapshot("m").weights)
    calls = [wire.begin(session.header(2, base_version=1), _gradient(0)) for session in (a, b)]
    assert wire.waiting("m") == {"a", "b"}
    _check(wire.step(c.header(1, base_version=1), _gradient(2)), 2, 3)
    for call in calls:
        _check(streamed(call), 2, 3)


def test_a_round_does_not_wait_for_a_closed_session(wire: Wire) -> None:
    wire.create("m", policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    wire.close(b)
    _check(streamed(call), 1, 1)


def test_a_round_does_not_wait_for_an_expired_session(wire: Wire) -> None:
    wire.create("m", policy=sync())
    a = wire.open("m", "a")
    began = monotonic()
    wire.open("m", "b", lease_seconds=0.3)
    _check(wire.step(a.header(1), _gradient(0)), 1, 1)
    assert monotonic() - began >= 0.3


def test_a_round_does_not_wait_for_a_worker_that_dies_during_its_push(wire: Wire) -> None:
    wire.create("m", policy=sync())
    available = wire.info().limits.memory_available_bytes
    a, b = wire.open("m", "a"), wire.open("m", "b", lease_seconds=0.4)
    dead = Event()

    def feed() -> Iterator[bytes]:
        messages = push(b.header(1), cut(_gradient(1), 2))
        yield from (next(messages), next(messages))
        dead.wait()

    upload = wire.start("StreamStep", feed())
    answer = wire.step(a.header(1), _gradient(0))
    _check(answer, 1, 1)
    np.testing.assert_allclose(answer.weights, _first_update(_gradient(0)), rtol=1e-5)
    assert [session.worker for session in wire.model("m").sessions] == ["a"]
    upload.cancel()
    dead.set()
    eventually(lambda: wire.info().limits.memory_available_bytes == available, "half a push is still held")


def test_a_lease_does_not_run_out_while_a_push_waits(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a = wire.open("m", "a", lease_seconds=60.0)
    call = wire.begin(a.header(1), _gradient(0))

    for _ in range(2):
        b = wire.open("m", "b", lease_seconds=60.0)  # takes over: its lease is the newest
        eventually(lambda: wire.outlives("m", "a", "b"), "a push that waits does not renew the lease")
    assert wire.waiting("m") == {"a"}
    _check(wire.step(b.header(1), _gradient(1)), 1, 2)
    _check(streamed(call), 1, 2)
    assert wire.keep(a).last_applied_sequence == 1


@pytest.mark.parametrize("ends", ["cancel", "deadline"])
def test_a_push_counts_after_its_call_is_cancelled(wire: Wire, ends: str) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    if ends == "cancel":
        wire.begin(a.header(1), _gradient(0)).cancel()
    else:
        while wire.keep(a).last_accepted_sequence == 0:  # on a busy machine it may not even have arrived
            with pytest.raises(grpc.RpcError):
                wire.step(a.header(1), _gradient(0), seconds=0.3)
    kept = wire.keep(a)
    assert (kept.last_accepted_sequence, kept.last_applied_sequence) == (1, 0)
    answer = wire.step(b.header(1), _gradient(1))
    _check(answer, 1, 2)
    mean = (_gradient(0) + _gradient(1)) / 2
    np.testing.assert_allclose(answer.weights, _first_update(mean), rtol=1e-5)
    again = wire.step(a.header(1), _gradient(0))
    assert (again.result.version, again.result.duplicate, again.result.contributors) == (1, True, 2)


def test_a_retry_attaches_to_the_push_that_waits(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    available = wire.info().limits.memory_available_bytes
    calls = [wire.begin(a.header(1), _gradient(0))]
    calls += [wire.start("StreamStep", push(a.header(1), cut(_gradient(0), 1))) for _ in range(3)]
    calls[0].cancel()
    calls[2].cancel()
    refused = wire.refused("Step", StepRequest(header=a.header(1), gradient=floats(_gradient(9))))
    assert refused.reason == "SEQUENCE_REUSED"
    _check(wire.step(b.header(1), _gradient(1)), 1, 2)
    for call in (calls[1], calls[3]):
        answer = streamed(call)
        assert (answer.result.version, answer.result.contributors) == (1, 2)
    assert wire.snapshot("m").update_counts == (1, 1)
    eventually(lambda: wire.info().limits.memory_available_bytes == available, "something is still held")


def test_a_push_of_a_session_that_closes_still_counts(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    wire.close(a)
    _check(wire.step(b.header(1), _gradient(1)), 1, 2)
    _check(streamed(call), 1, 2)


def test_a_push_of_a_worker_that_starts_again_still_counts_and_its_next_is_of_the_next_round(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    newer = wire.open("m", "a")
    assert newer.opened.first_version == 1
    with unchanged(wire, "m"):
        assert wire.refused("Step", StepRequest(header=newer.header(1))).reason == "ROUND_CLOSED"
    _check(wire.step(b.header(1), _gradient(1)), 1, 2)
    _check(streamed(call), 1, 2)
    call = wire.begin(newer.header(1), _gradient(2))
    _check(wire.step(b.header(2), _gradient(3)), 2, 2)
    _check(streamed(call), 2, 2)


def test_a_worker_that_restarts_before_its_push_takes_its_own_place(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, _b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    newer = wire.open("m", "b")
    assert newer.opened.first_version == 0
    _check(wire.step(newer.header(1), _gradient(1)), 1, 2)
    _check(streamed(call), 1, 2)


def test_a_late_joiner_replaces_a_member_that_leaves(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    c = wire.open("m", "c")
    pull = wire.start("Pull", [PullRequest(model="m", wait_for_version=c.opened.first_version)])
    wire.close(b)
    header, _weights = pulled(pull)
    wire.step(c.header(1, base_version=header.position.version), _gradient(1))
    assert streamed(call).result.contributors == 2


def test_a_second_push_of_a_worker_is_not_for_the_same_round(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), _gradient(0))
    with unchanged(wire, "m"):
        refused = wire.refused("Step", StepRequest(header=a.header(2), gradient=floats(_gradient(0))))
    assert refused.reason == "ROUND_CLOSED"
    wire.step(b.header(1), _gradient(1))
    streamed(call)


def test_deleting_a_model_ends_everybody_s_waiting(wire: Wire) -> None:
    before = wire.info().limits.memory_available_bytes
    wire.create("m", policy=sync(2))
    call = wire.begin(wire.open("m", "a").header(1), _gradient(0))
    pull = wire.start("Pull", [PullRequest(model="m", wait_for_version=1)])
    wire.delete("m")
    for waiting in (call, pull):
        with pytest.raises(grpc.RpcError) as caught:
            list(waiting)
        assert refusal(caught.value).reason == "MODEL_NOT_FOUND"
    eventually(lambda: wire.info().limits.memory_available_bytes == before, "something is still held")
    wire.create("m", {"other": (7,)})
    assert wire.snapshot("m").version == 0


def test_a_cancelled_pull_is_forgotten(wire: Wire, server: LocalServer) -> None:
    wire.create("m")
    a = wire.open("m", "a")
    calls = [wire.start("Pull", [PullRequest(model="m", wait_for_version=2)]) for _ in range(10)]
    eventually(lambda: len(server._catalog.get("m")._subscribers._awaited) == 10, "a pull does not wait")
    for call in calls[:9]:
        call.cancel()
    eventually(lambda: len(server._catalog.get("m")._subscribers._awaited) == 1, "a pull is not forgotten")
    for number in (1, 2):
        wire.step(a.header(number), _gradient(number))
    assert pulled(calls[9])[0].position.version == 2


def test_leases_expire_after_a_fault_has_ended_another_model(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError

    wire.create("broken", policy=sync())
    with monkeypatch.context() as patch:
        patch.setattr(HostStore, "update", fault)
        with pytest.raises(grpc.RpcError) as caught:
            wire.step(_with_a_silent_other(wire, "broken").header(1), _gradient(0))
    assert refusal(caught.value).reason == "INTERNAL"
    wire.create("m", policy=sync())
    _check(wire.step(_with_a_silent_other(wire, "m").header(1), _gradient(0)), 1, 1)


def _with_a_silent_other(wire: Wire, model: str) -> Session:
    """Opens a session, and another one that the round awaits until its lease runs out."""
    session = wire.open(model, "a")
    wire.open(model, "silent", lease_seconds=0.3)
    return session
