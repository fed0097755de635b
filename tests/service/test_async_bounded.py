"""The asynchronous and the bounded policy: staleness, damping, and waiting for the slowest worker."""

from typing import Any

import grpc
import numpy as np
import pytest
from expected import Twin, gradient
from messages import adadelta, asynchronous, bounded, floats
from wire import Session, Wire, eventually, refusal, streamed, unchanged

from deltaserve._common.optimizers import Adadelta
from deltaserve.v1.worker_service_pb2 import PUSH_STATE_APPLIED, StepRequest

SIZE = 5


def _advance(wire: Wire, session: Session, steps: int, first: int = 1) -> None:
    for number in range(first, first + steps):
        wire.step(session.header(number), gradient(number, SIZE))


# --- async


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_push_may_be_as_stale_as_max_staleness_and_no_staler(wire: Wire, bound: int) -> None:
    wire.create("m", policy=asynchronous(max_staleness=bound))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    _advance(wire, a, 5)
    stale = StepRequest(header=b.header(1, base_version=4 - bound), gradient=floats(gradient(9, SIZE)))
    with unchanged(wire, "m"):
        refused = wire.refused("Step", stale)
    assert refused.code is grpc.StatusCode.ABORTED
    assert refused.metadata == {"base": str(4 - bound), "current": "5", "bound": str(bound)}
    answer = wire.step(b.header(1, base_version=5 - bound), gradient(9, SIZE))
    assert (answer.result.version, answer.result.staleness) == (6, bound)
    newest = wire.step(b.header(2), gradient(9, SIZE))
    assert newest.result.staleness == 0, "a base that is not set is the current version"


def test_a_base_that_grows_stale_during_the_upload_is_refused(wire: Wire) -> None:
    wire.create("m", policy=asynchronous(max_staleness=0))
    a, b = wire.open("m", "a"), wire.open("m", "b")

    def chunks() -> Any:
        yield 0, gradient(1, SIZE)[:2]
        _advance(wire, a, 1)
        yield 2, gradient(1, SIZE)[2:]

    with pytest.raises(grpc.RpcError) as caught:
        wire.stream_step(b.header(1, base_version=0), chunks())
    assert refusal(caught.value).reason == "STALE_BASE"
    assert wire.stream_step(b.header(1, base_version=1), [(0, gradient(1, SIZE))]).result.version == 2


def test_a_duplicate_is_never_too_stale(wire: Wire) -> None:
    wire.create("m", policy=asynchronous(max_staleness=0))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    first = wire.step(b.header(1, base_version=0), gradient(1, SIZE))
    _advance(wire, a, 3)
    again = wire.step(b.header(1, base_version=0), gradient(1, SIZE))
    assert (again.result.version, again.result.duplicate) == (first.result.version, True)


@pytest.mark.parametrize("largest", [10, (1 << 64) - 1])
def test_the_largest_bound_is_none(wire: Wire, largest: int) -> None:
    wire.create("m", policy=asynchronous(max_staleness=largest))
    a = wire.open("m", "a")
    _advance(wire, a, 5)
    assert wire.step(a.header(6, base_version=0), gradient(6, SIZE)).result.staleness == 5
    assert getattr(wire.model("m").config.policy, "async").max_staleness == largest


@pytest.mark.parametrize("own", [None, 0.25], ids=["the model's", "the push's own"])
def test_damping_divides_the_learning_rate_by_one_plus_the_staleness(wire: Wire, own: float | None) -> None:
    wire.create("m", policy=asynchronous(damping=True), groups=[adadelta(lr=0.75, rho=0.8)])
    a, b = wire.open("m", "a"), wire.open("m", "b")
    twin = Twin(np.zeros(SIZE, np.float32))
    for number, base in enumerate((0, 0, 1, 0), start=1):
        carried = [adadelta(lr=own)] if own else []
        staleness = number - 1 - base
        header = (a if number % 2 else b).header((number + 1) // 2, base_version=base, hyperparameters=carried)
        answer = wire.step(header, gradient(number, SIZE))
        lr = (own or 0.75) / (1 + staleness)
        (used,) = (group.adadelta for group in answer.result.hyperparameters)
        assert (answer.result.staleness, used.lr, used.rho) == (staleness, lr, 0.8)
        twin.update(gradient(number, SIZE), own=Adadelta(lr=lr, rho=0.8))
    twin.check(wire.snapshot("m"))
    assert wire.model("m").config.groups[0].adadelta.lr == 0.75, "the model's own is as it was"


def test_without_damping_staleness_changes_nothing(wire: Wire) -> None:
    wire.create("m", policy=asynchronous(damping=False))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    _advance(wire, a, 3)
    answer = wire.step(b.header(1, base_version=0), gradient(9, SIZE))
    assert (answer.result.staleness, answer.result.hyperparameters[0].adadelta.lr) == (3, 1.0)


def test_the_weight_of_a_single_worker_changes_no_bit(wire: Wire) -> None:
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(gradient(1, SIZE))
    for policy in (asynchronous(), asynchronous(damping=True), bounded(1)):
        for weight in (1e-9, 0.3, 1e9):
            wire.create("m", policy=policy)
            wire.step(wire.open("m", "a").header(1, weight=weight), gradient(1, SIZE))
            twin.check(wire.snapshot("m"))
            wire.delete("m")


# --- bounded


def _held(wire: Wire, session: Session, number: int) -> Any:
    """Starts a push that is applied at once and whose answer is withheld."""
    before = wire.model("m").position.version
    call = wire.begin(session.header(number), gradient(number, SIZE))
    assert not call.done()
    assert wire.model("m").position.version == before + 1
    fate = wire.fate(session, number)
    assert (fate.state, fate.final, fate.result.version) == (PUSH_STATE_APPLIED, True, before + 1)
    return call


@pytest.mark.parametrize("slack", [0, 1, 3])
def test_a_worker_that_is_more_than_slack_steps_ahead_waits_for_the_slowest(wire: Wire, slack: int) -> None:
    wire.create("m", policy=bounded(slack or None))
    quick, slow = wire.open("m", "a"), wire.open("m", "b")
    _advance(wire, quick, slack)
    for lap in range(1, 3):
        call = _held(wire, quick, slack + lap)
        with unchanged(wire, "m"):
            request = StepRequest(header=quick.header(slack + lap + 1), gradient=floats(gradient(0, SIZE)))
            refused = wire.refused("Step", request)
        assert (refused.reason, refused.metadata) == ("SLACK_EXCEEDED", {"ahead": str(slack + 1), "slack": str(slack)})
        wire.step(slow.header(lap), gradient(0, SIZE))
        answer = streamed(call)
        assert (answer.result.duplicate, answer.result.contributors) == (False, 1)
        assert answer.position.version > answer.result.version, "the weights are the newest"


def test_of_three_workers_the_slowest_counts(wire: Wire) -> None:
    wire.create("m", policy=bounded(1))
    a, b, c = (wire.open("m", name) for name in "abc")
    _advance(wire, a, 1)
    _advance(wire, b, 1)
    calls = [_held(wire, a, 2), _held(wire, b, 2)]
    wire.step(c.header(1), gradient(0, SIZE))
    assert [streamed(call).result.duplicate for call in calls] == [False, False]


@pytest.mark.parametrize("leaves", ["close", "lease", "takes over"])
def test_a_session_that_ends_is_not_waited_for(wire: Wire, leaves: str) -> None:
    wire.create("m", policy=bounded())
    quick = wire.open("m", "a")
    slow = wire.open("m", "b")
    call = _held(wire, quick, 1)
    if leaves == "close":
        wire.close(slow)
    elif leaves == "lease":  # of one who takes over now: the push had time to arrive
        wire.open("m", "b", lease_seconds=0.3)
    elif leaves == "takes over":  # the newer session stands where the older one stood
        newer = wire.open("m", "b")
        assert not call.done()
        wire.step(newer.header(1), gradient(0, SIZE))
    assert streamed(call).result.version == 1


@pytest.mark.parametrize("leaves", ["close", "takes over"])
def test_a_waiting_worker_is_answered_when_its_session_ends(wire: Wire, leaves: str) -> None:
    wire.create("m", policy=bounded())
    quick, _slow = wire.open("m", "a"), wire.open("m", "b")
    call = _held(wire, quick, 1)
    if leaves == "close":
        wire.close(quick)
    else:
        wire.open("m", "a")
    assert streamed(call).result.version == 1


def test_a_newcomer_starts_at_the_clock_of_the_slowest(wire: Wire) -> None:
    wire.create("m", policy=bounded(1))
    first = wire.open("m", "a")
    _advance(wire, first, 10)
    late = wire.open("m", "b")
    _advance(wire, first, 1, first=11)
    call = _held(wire, first, 12)
    wire.step(late.header(1), gradient(0, SIZE))
    streamed(call)
    _advance(wire, late, 2, first=2)
    held = _held(wire, late, 4)
    wire.close(first)
    streamed(held)


def test_a_single_worker_never_waits(wire: Wire) -> None:
    wire.create("m", policy=bounded())
    a = wire.open("m", "a")
    _advance(wire, a, 20)
    assert wire.model("m").position.version == 20


def test_a_retry_attaches_to_the_answer_that_waits(wire: Wire) -> None:
    wire.create("m", policy=bounded())
    quick, slow = wire.open("m", "a"), wire.open("m", "b")
    _held(wire, quick, 1).cancel()
    with pytest.raises(grpc.RpcError) as caught:
        wire.step(quick.header(1), gradient(1, SIZE), seconds=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    again = wire.start("Step", [StepRequest(header=quick.header(1), gradient=floats(gradient(1, SIZE)))])
    other = StepRequest(header=quick.header(1), gradient=floats(gradient(9, SIZE)))
    assert wire.refused("Step", other).reason == "SEQUENCE_REUSED"
    wire.step(slow.header(1), gradient(0, SIZE))
    assert len(list(again)) == 1
    assert wire.model("m").position.version == 2


def test_an_answer_that_waits_holds_no_memory_for_its_values(wire: Wire) -> None:
    wire.create("m", policy=bounded())
    quick, slow = wire.open("m", "a"), wire.open("m", "b")
    free = wire.info().limits.memory_available_bytes
    call = _held(wire, quick, 1)
    eventually(lambda: wire.info().limits.memory_available_bytes == free, "the values are still held")
    wire.step(slow.header(1), gradient(0, SIZE))
    streamed(call)


def test_a_waiting_call_renews_the_lease(wire: Wire) -> None:
    wire.create("m", policy=bounded())
    quick = wire.open("m", "a", lease_seconds=60.0)
    wire.open("m", "b")
    call = _held(wire, quick, 1)

    for _ in range(2):
        slow = wire.open("m", "b", lease_seconds=60.0)  # takes over: its lease is the newest
        eventually(lambda: wire.outlives("m", "a", "b"), "a call that waits does not renew its lease")
    wire.step(slow.header(1), gradient(0, SIZE))
    assert streamed(call).result.version == 1
