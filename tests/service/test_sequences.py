"""Sequence numbers, through Step and StreamStep: what is applied once, answered again, or refused."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import grpc
import numpy as np
import pytest
from messages import adadelta, cut, floats, push, sync
from numpy.typing import ArrayLike
from wire import Stepped, Wire, eventually, refusal, streamed, unchanged

from deltaserve.v1.worker_service_pb2 import CloseSessionRequest, KeepSessionRequest, PushHeader, StepRequest

Door = Callable[[Wire, PushHeader, ArrayLike], Stepped]

ONES = np.ones(5, np.float32)


def _unary(wire: Wire, header: PushHeader, gradient: ArrayLike) -> Stepped:
    return wire.step(header, gradient)


def _streamed(wire: Wire, header: PushHeader, gradient: ArrayLike) -> Stepped:
    return wire.stream_step(header, cut(gradient, 2))


@pytest.fixture(params=[_unary, _streamed], ids=["Step", "StreamStep"])
def door(request: pytest.FixtureRequest) -> Door:
    chosen: Door = request.param
    return chosen


def _random(seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(5).astype(np.float32)


def test_pushes_are_numbered_from_one_and_each_makes_a_version(wire: Wire, door: Door) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    assert (session.opened.epoch, session.opened.rank, session.opened.first_version) == (1, 0, 0)
    assert len(session.opened.session_id) == 16
    for number in (1, 2, 3):
        answer = door(wire, session.header(number), ONES)
        assert (answer.result.version, answer.result.duplicate, answer.result.contributors) == (number, False, 1)
        assert answer.position.version == number
        kept = wire.keep(session)
        assert (kept.last_applied_sequence, kept.last_accepted_sequence) == (number, number)
    assert wire.snapshot("m").update_counts == (3, 3)


def test_a_duplicate_gets_the_first_result_and_the_newest_weights(wire: Wire, door: Door) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    first = door(wire, session.header(1), ONES)
    newest = door(wire, session.header(2), -ONES)
    with unchanged(wire, "m"):
        again = door(wire, session.header(1), ONES)
    assert again.result.duplicate
    again.result.duplicate = False
    assert again.result == first.result
    assert again.position.version == 2
    assert np.array_equal(again.weights, newest.weights)


def test_the_last_eight_results_are_kept_and_older_ones_are_duplicates_still(wire: Wire, door: Door) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    other = wire.open("m", "b")
    wire.step(other.header(1), ONES)
    for number in range(1, 11):
        door(wire, session.header(number), _random(number))
    with unchanged(wire, "m"):
        for number in range(3, 11):
            kept = door(wire, session.header(number), _random(number)).result
            assert (kept.duplicate, kept.version, kept.contributors) == (True, number + 1, 1)
            assert kept.HasField("staleness")
            assert len(kept.hyperparameters) == 1
        for number in (1, 2):
            lost = door(wire, session.header(number), _random(99)).result
            assert (lost.duplicate, lost.version) == (True, 11)
            assert not lost.HasField("staleness")
            assert not lost.HasField("contributors")
            assert not lost.hyperparameters


def test_other_values_under_a_number_of_the_window_are_refused(wire: Wire, door: Door) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    for number in range(1, 11):
        door(wire, session.header(number), _random(number))
    for number in range(3, 11):
        for changed in (_random(number)[::-1], _random(number) * np.float32(1 + 2**-23), -_random(number)):
            with unchanged(wire, "m"):
                refused = wire.refused("Step", StepRequest(header=session.header(number), gradient=floats(changed)))
            assert (refused.reason, refused.metadata) == ("SEQUENCE_REUSED", {"sequence": str(number)})
    door(wire, session.header(11), ONES)


def test_zeros_are_other_content_than_an_absent_tensor(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.step(session.header(1), [1, 1, 1, 1, 0])
    header = session.header(1, absent_tensors=[1])
    assert wire.refused("Step", StepRequest(header=header, gradient=floats(np.ones(4)))).reason == "SEQUENCE_REUSED"


def test_a_refused_push_leaves_its_sequence_number_free(wire: Wire, door: Door) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    bad = [1.0, np.nan, 1.0, 1.0, 1.0]
    assert wire.refused("Step", StepRequest(header=session.header(1), gradient=floats(bad))).code.name
    assert door(wire, session.header(1), ONES).result.version == 1


def test_both_doors_know_each_other_s_pushes(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.step(session.header(1), ONES)
    assert wire.stream_step(session.header(1), cut(ONES, 1)).result.duplicate
    wire.stream_step(session.header(2), cut(-ONES, 3))
    assert wire.step(session.header(2), -ONES).result.duplicate


def test_a_result_tells_how_stale_the_push_was(wire: Wire, door: Door) -> None:
    wire.create("m")
    a, b = wire.open("m", "a"), wire.open("m", "b")
    for number in (1, 2, 3):
        wire.step(a.header(number), ONES)
    assert door(wire, b.header(1, base_version=1), ONES).result.staleness == 2
    assert door(wire, b.header(2), ONES).result.staleness == 0


def test_each_session_has_its_own_sequence_numbers(wire: Wire, door: Door) -> None:
    wire.create("m")
    a, b = wire.open("m", "a"), wire.open("m", "b")
    assert (a.opened.rank, b.opened.rank) == (0, 1)
    door(wire, a.header(1), ONES)
    door(wire, b.header(1), -ONES)
    assert wire.model("m").position.version == 2
    assert wire.keep(a).last_applied_sequence == 1
    wire.close(a)
    assert wire.open("m", "c").opened.rank == 0


def test_a_newer_session_of_a_name_fences_the_older_one(wire: Wire, door: Door) -> None:
    wire.create("m")
    older = wire.open("m", "a")
    door(wire, older.header(1), ONES)
    newer = wire.open("m", "a")
    assert (newer.opened.epoch, newer.opened.rank) == (2, 0)
    with unchanged(wire, "m"):
        for method, request in (
            ("Step", StepRequest(header=older.header(2), gradient=floats(ONES))),
            ("Step", StepRequest(header=older.header(1), gradient=floats(ONES))),
            ("KeepSession", KeepSessionRequest(**older.id)),
            ("CloseSession", CloseSessionRequest(**older.id)),
        ):
            refused = wire.refused(method, request)
            assert (refused.reason, refused.metadata["current"]) == ("SESSION_FENCED", "2")
    assert door(wire, newer.header(1), ONES).result.version == 2


def test_an_epoch_rises_over_closed_and_expired_sessions(wire: Wire) -> None:
    wire.create("m")
    wire.close(wire.open("m", "a"))
    wire.open("m", "a", lease_seconds=0.3)
    eventually(lambda: not wire.model("m").sessions, "the lease does not run out")
    assert wire.open("m", "a").opened.epoch == 3


def test_a_push_in_flight_is_refused_when_its_session_is_fenced(wire: Wire) -> None:
    wire.create("m")
    older = wire.open("m", "a")

    def feed() -> Iterator[bytes]:
        for index, message in enumerate(push(older.header(1), cut(ONES, 2))):
            if index == 2:
                wire.open("m", "a")
            yield message

    call = wire.start("StreamStep", feed())
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert refusal(caught.value).reason == "SESSION_FENCED"
    assert wire.model("m").position.version == 0


def test_every_call_of_a_session_renews_its_lease(wire: Wire) -> None:
    wire.create("m")
    pushing = wire.open("m", "pushing", lease_seconds=60.0)
    keeping = wire.open("m", "keeping", lease_seconds=60.0)
    for number in (1, 2, 3):
        wire.open("m", "silent", lease_seconds=60.0)  # takes over: the newest lease, until others are renewed
        wire.step(pushing.header(number), ONES)
        wire.keep(keeping)
        left = wire.lease_left("m")
        assert left["keeping"] > left["pushing"] > left["silent"]


def test_each_chunk_renews_the_lease_of_a_slow_worker(wire: Wire) -> None:
    wire.create("m")
    slow = wire.open("m", "slow", lease_seconds=60.0)
    renewals = 0

    def renewed() -> bool:
        return wire.outlives("m", "slow", "silent")

    def feed() -> Iterator[bytes]:
        nonlocal renewals
        for message in push(slow.header(1), cut(ONES, 1)):
            wire.open("m", "silent", lease_seconds=60.0)
            assert not renewed()
            yield message
            eventually(renewed, "a chunk does not renew the lease")
            renewals += 1

    assert streamed(wire.start("StreamStep", feed())).result.version == 1
    assert renewals == 6, "of the header and each chunk"


def test_a_duplicate_may_carry_other_hyperparameters(wire: Wire) -> None:
    """A retry may read its learning rate schedule again. It is the same gradient, and is applied once."""
    wire.create("m")
    session = wire.open("m", "a")
    wire.step(session.header(1, hyperparameters=[adadelta(lr=0.5)]), ONES)
    again = wire.step(session.header(1, hyperparameters=[adadelta(lr=0.25)]), ONES)
    assert again.result.duplicate
    assert again.result.hyperparameters[0].adadelta.lr == 0.5


def test_a_round_s_duplicate_gets_the_round_s_result(wire: Wire, door: Door) -> None:
    wire.create("m", policy=sync())
    session = wire.open("m", "a")
    first = door(wire, session.header(1), ONES)
    again = door(wire, session.header(1), ONES)
    assert (again.result.duplicate, again.result.version) == (True, first.result.version)


def test_of_two_pushes_under_one_number_the_first_complete_one_counts(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    slow_may_end = Event()

    def feed() -> Iterator[bytes]:
        *first, last = push(session.header(1), cut(-ONES, 2))
        yield from first
        slow_may_end.wait(10)
        yield last

    slow = wire.start("StreamStep", feed())
    quick = wire.stream_step(session.header(1), cut(ONES, 5))
    assert not quick.result.duplicate
    before = wire.snapshot("m")
    slow_may_end.set()
    with pytest.raises(grpc.RpcError) as caught:
        list(slow)
    assert refusal(caught.value).reason == "SEQUENCE_REUSED"
    assert wire.snapshot("m") == before


def test_one_push_sent_twice_at_once_counts_once(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    both = Barrier(4)

    def feed() -> Iterator[bytes]:
        *first, last = push(session.header(1), cut(ONES, 2))
        yield from first
        both.wait(10)
        yield last

    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda _: streamed(wire.start("StreamStep", feed())), range(4)))
    assert sorted(answer.result.duplicate for answer in answers) == [False, True, True, True]
    assert {answer.result.version for answer in answers} == {1}
    assert wire.snapshot("m").update_counts == (1, 1)
