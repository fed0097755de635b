"""Rounds that do not wait for every member: quorum, grace period and timeout."""

from collections.abc import Iterator
from threading import Event
from time import monotonic, sleep

import grpc
import numpy as np
import pytest
from expected import Twin, gradient
from messages import cut, floats, push, sync
from wire import Session, Stepped, Wire, eventually, refusal, streamed, unchanged

from deltaserve.v1.common_pb2 import REDUCTION_MEDIAN
from deltaserve.v1.worker_service_pb2 import PUSH_STATE_NOT_ACCEPTED, StepRequest

SIZE = 5
LONG = 3600.0
"""Seconds; longer than any test takes."""


def _open(wire: Wire, names: str) -> list[Session]:
    return [wire.open("m", name) for name in names]


def _refused(wire: Wire, session: Session, number: int, seed: int, **fields: int) -> str:
    """Makes a push that is refused and changes nothing. Returns the reason."""
    request = StepRequest(header=session.header(number, **fields), gradient=floats(gradient(seed, SIZE)))
    with unchanged(wire, "m"):
        return wire.refused("Step", request).reason


def _result(answer: Stepped) -> tuple[int, int, bool]:
    return answer.result.version, answer.result.contributors, answer.result.duplicate


def _failure(call: object) -> tuple[str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        streamed(call)  # type: ignore[arg-type]
    refused = refusal(caught.value)
    assert refused.code is grpc.StatusCode.ABORTED
    assert refused.retry_seconds is None
    return refused.reason, refused.metadata


@pytest.mark.parametrize("straggler", range(3))
def test_a_quorum_closes_without_a_straggler_whose_next_push_is_accepted(wire: Wire, straggler: int) -> None:
    wire.create("m", policy=sync(2, quorum=2))
    sessions = _open(wire, "abc")
    late = sessions.pop(straggler)
    calls = [wire.begin(session.header(1, base_version=0), gradient(k, SIZE)) for k, session in enumerate(sessions)]
    assert [_result(streamed(call)) for call in calls] == [(1, 2, False)] * 2
    request = StepRequest(header=late.header(1, base_version=0), gradient=floats(gradient(7, SIZE)))
    with unchanged(wire, "m"):
        refused = wire.refused("Step", request)
    assert (refused.reason, refused.metadata) == ("ROUND_CLOSED", {"base": "0", "current": "1"})
    assert wire.fate(late, 1).state == PUSH_STATE_NOT_ACCEPTED
    call = wire.begin(late.header(1, base_version=1), gradient(8, SIZE))
    other = wire.step(sessions[0].header(2, base_version=1), gradient(9, SIZE))
    assert _result(other) == _result(streamed(call)) == (2, 2, False)
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(gradient(0, SIZE) + gradient(1, SIZE), 2.0)
    first, second = (8, 9) if late.opened.rank < sessions[0].opened.rank else (9, 8)
    twin.update(gradient(first, SIZE) + gradient(second, SIZE), 2.0)
    twin.check(wire.snapshot("m"))


def test_a_straggler_s_upload_in_flight_is_refused_at_its_end(wire: Wire) -> None:
    wire.create("m", policy=sync(quorum=1, grace_seconds=LONG))
    quick, slow = _open(wire, "ab")
    closed = Event()

    def feed() -> Iterator[bytes]:
        *first, last = push(slow.header(1, base_version=0), cut(gradient(1, SIZE), 2))
        yield from first
        closed.wait(20)
        yield last

    upload = wire.start("StreamStep", feed())
    call = wire.begin(quick.header(1), gradient(0, SIZE))
    wire.update("m", policy=sync(quorum=1))
    assert _result(streamed(call)) == (1, 1, False)
    before = wire.snapshot("m")
    closed.set()
    with pytest.raises(grpc.RpcError) as caught:
        streamed(upload)
    assert refusal(caught.value).reason == "ROUND_CLOSED"
    assert wire.snapshot("m") == before


def test_grace_lets_a_straggler_in_and_ends_at_once_when_all_are_there(wire: Wire) -> None:
    wire.create("m", policy=sync(2, quorum=2, grace_seconds=LONG))
    sessions = _open(wire, "abc")
    calls = [wire.begin(session.header(1), gradient(k, SIZE)) for k, session in enumerate(sessions[:2])]
    assert wire.waiting("m") == {"a", "b"}
    assert _result(wire.step(sessions[2].header(1), gradient(2, SIZE))) == (1, 3, False)
    assert [_result(streamed(call)) for call in calls] == [(1, 3, False)] * 2
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(gradient(0, SIZE) + gradient(1, SIZE) + gradient(2, SIZE), 3.0)
    twin.check(wire.snapshot("m"))


def test_grace_runs_from_the_push_that_makes_the_quorum(wire: Wire) -> None:
    wire.create("m", policy=sync(quorum=2, grace_seconds=0.3))
    sessions = _open(wire, "abc")
    calls = [wire.begin(sessions[0].header(1), gradient(0, SIZE))]
    sleep(0.2)
    began = monotonic()
    calls.append(wire.begin(sessions[1].header(1), gradient(1, SIZE)))
    assert [_result(streamed(call)) for call in calls] == [(1, 2, False)] * 2
    assert 0.29 < monotonic() - began < 5.0


def test_a_worker_that_restarts_within_the_grace_period_joins_the_next_round(wire: Wire) -> None:
    wire.create("m", policy=sync(quorum=1, grace_seconds=LONG))
    a, b = _open(wire, "ab")
    call = wire.begin(a.header(1), gradient(0, SIZE))
    newer = wire.open("m", "a")
    assert newer.opened.first_version == 1
    assert _refused(wire, newer, 1, 1) == "ROUND_CLOSED"
    assert _result(wire.step(b.header(1), gradient(1, SIZE))) == (1, 2, False)
    assert _result(streamed(call)) == (1, 2, False)


def test_a_quorum_above_the_number_of_workers_waits_for_all_of_them(wire: Wire) -> None:
    wire.create("m", policy=sync(quorum=60_000))
    a, b = _open(wire, "ab")
    call = wire.begin(a.header(1), gradient(0, SIZE))
    assert wire.waiting("m") == {"a"}
    assert _result(wire.step(b.header(1), gradient(1, SIZE))) == (1, 2, False)
    streamed(call)


def test_a_round_closes_with_the_pushes_that_it_has_at_its_timeout(wire: Wire) -> None:
    wire.create("m", policy=sync(2, round_timeout_seconds=LONG))
    sessions = _open(wire, "abc")
    began = monotonic()
    calls = [wire.begin(session.header(1), gradient(k, SIZE)) for k, session in enumerate(sessions[:2])]
    wire.update("m", policy=sync(2, round_timeout_seconds=0.3))
    assert [_result(streamed(call)) for call in calls] == [(1, 2, False)] * 2
    assert 0.29 < monotonic() - began < 5.0
    assert _refused(wire, sessions[2], 1, 2, base_version=0) == "ROUND_CLOSED"
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(gradient(0, SIZE) + gradient(1, SIZE), 2.0)
    twin.check(wire.snapshot("m"))


@pytest.mark.parametrize("reduction", [None, REDUCTION_MEDIAN], ids=["mean", "median"])
def test_a_round_below_min_workers_fails_and_takes_the_same_pushes_again(wire: Wire, reduction: int | None) -> None:
    brief, long = (sync(3, round_timeout_seconds=seconds, reduction=reduction) for seconds in (0.2, LONG))
    wire.create("m", policy=brief)
    free = wire.info().limits.memory_available_bytes
    a, b = _open(wire, "ab")
    before = wire.snapshot("m")
    for _ in range(2):
        wire.update("m", policy=long)
        calls = [wire.begin(session.header(1), gradient(k, SIZE)) for k, session in enumerate((a, b))]
        wire.update("m", policy=brief)
        for call in calls:
            assert _failure(call) == ("ROUND_FAILED", {"got": "2", "need": "3"})
        assert wire.snapshot("m") == before
        assert [wire.keep(session).last_accepted_sequence for session in (a, b)] == [0, 0]
        for session in (a, b):
            fate = wire.fate(session, 1)
            assert (fate.state, fate.final) == (PUSH_STATE_NOT_ACCEPTED, False)
        eventually(lambda: wire.info().limits.memory_available_bytes == free, "a push that was given up is still held")
    wire.update("m", policy=long)
    calls = [wire.begin(session.header(1), gradient(k, SIZE)) for k, session in enumerate((a, b))]
    assert _result(wire.step(wire.open("m", "c").header(1), gradient(2, SIZE))) == (1, 3, False)
    assert [_result(streamed(call)) for call in calls] == [(1, 3, False)] * 2


def test_a_number_that_is_free_again_may_have_other_content(wire: Wire) -> None:
    wire.create("m", policy=sync(2, round_timeout_seconds=0.1))
    a = wire.open("m", "a")
    assert _failure(wire.begin(a.header(1), gradient(0, SIZE)))[0] == "ROUND_FAILED"
    wire.update("m", policy=sync())
    assert _result(wire.step(a.header(1), gradient(1, SIZE))) == (1, 1, False)


def test_every_call_that_waits_for_a_push_learns_that_its_round_failed(wire: Wire) -> None:
    wire.create("m", policy=sync(2, round_timeout_seconds=0.5))
    a = wire.open("m", "a")
    calls = [wire.begin(a.header(1), gradient(0, SIZE))]
    calls += [wire.start("StreamStep", push(a.header(1), cut(gradient(0, SIZE), 1))) for _ in range(3)]
    assert {_failure(call)[0] for call in calls} == {"ROUND_FAILED"}


def test_a_failed_round_gives_up_the_push_of_a_closed_session(wire: Wire) -> None:
    """Its session is closed, so nobody sends the push again."""
    wire.create("m", policy=sync(2, round_timeout_seconds=0.3))
    a, b = _open(wire, "ab")
    call = wire.begin(a.header(1), gradient(0, SIZE))
    wire.close(a)
    assert _failure(call) == ("ROUND_FAILED", {"got": "1", "need": "2"})
    fate = wire.fate(a, 1)
    assert (fate.state, fate.final) == (PUSH_STATE_NOT_ACCEPTED, True)
    assert _failure(wire.begin(b.header(1), gradient(1, SIZE))) == ("ROUND_FAILED", {"got": "1", "need": "2"})


def test_the_timeout_of_a_round_starts_with_its_first_push(wire: Wire) -> None:
    wire.create("m", policy=sync(2, round_timeout_seconds=0.25))
    a = wire.open("m", "a")
    for _ in range(3):
        began = monotonic()
        assert _failure(wire.begin(a.header(1), gradient(0, SIZE)))[0] == "ROUND_FAILED"
        assert 0.24 < monotonic() - began < 5.0


def test_a_late_joiner_may_push_when_the_round_fails(wire: Wire) -> None:
    brief, long = (sync(3, quorum=3, round_timeout_seconds=seconds) for seconds in (0.2, LONG))
    wire.create("m", policy=long)
    a, b, _c = _open(wire, "abc")
    calls = [wire.begin(session.header(1), gradient(k, SIZE)) for k, session in enumerate((a, b))]
    late = wire.open("m", "d")
    wire.update("m", policy=brief)
    assert late.opened.first_version == 1
    header, weights = wire.pull("m", wait_for_version=1)
    assert (header.position.version, bool(weights.any())) == (1, False)
    for call in calls:
        assert _failure(call)[0] == "ROUND_FAILED"
    wire.update("m", policy=long)
    calls = [wire.begin(s.header(1), gradient(k, SIZE)) for k, s in enumerate((a, b, late))]
    assert [_result(streamed(call)) for call in calls] == [(2, 3, False)] * 3


def test_a_crowd_goes_through_many_rounds_of_a_quorum(wire: Wire) -> None:
    """Workers that miss a round pull and continue. Every version has a quorum, and every bit is accounted for."""
    wire.create("m", policy=sync(2, quorum=2, round_timeout_seconds=LONG))
    watch = wire.watch("m")
    watch.next()
    sessions = _open(wire, "abcd")
    numbers = dict.fromkeys(range(4), 1)
    for version in range(20):
        pair = [version % 4, (version * 3 + 1) % 4]
        if pair[0] == pair[1]:
            pair[1] = (pair[1] + 1) % 4
        calls = [wire.begin(sessions[k].header(numbers[k], base_version=version), gradient(k, SIZE)) for k in pair]
        assert [_result(streamed(call)) for call in calls] == [(version + 1, 2, False)] * 2
        for k in pair:
            numbers[k] += 1
        left_out = next(k for k in range(4) if k not in pair)
        assert _refused(wire, sessions[left_out], numbers[left_out], left_out, base_version=version) == "ROUND_CLOSED"
    events = watch.until(20)
    watch.cancel()
    assert [len(event.update.contributions) for event in events] == [2] * 20
    counted = [sum(c.worker == name for event in events for c in event.update.contributions) for name in "abcd"]
    assert counted == [number - 1 for number in numbers.values()]
