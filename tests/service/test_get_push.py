"""GetPush: the state of a push at every moment, also after its session has ended."""

from collections.abc import Iterator
from threading import Event

import numpy as np
import pytest
from expected import gradient
from messages import asynchronous, bounded, cut, push, sync
from reused_server import ReusedServers
from wire import Session, Wire, eventually, streamed, unchanged

from deltaserve.v1.worker_service_pb2 import (
    PUSH_STATE_APPLIED,
    PUSH_STATE_NOT_ACCEPTED,
    PUSH_STATE_WAITING,
    GetPushRequest,
    StepRequest,
)
from deltaserve_server import ServerConfig

SIZE = 5
ENDS = ("close", "takes over", pytest.param("lease", marks=pytest.mark.deep))


def _fate(wire: Wire, session: Session, sequence: int) -> tuple[int, bool]:
    answer = wire.fate(session, sequence)
    assert answer.HasField("result") == (answer.state == PUSH_STATE_APPLIED)
    assert answer.position == wire.model(session.model).position
    return answer.state, answer.final


def _end(wire: Wire, session: Session, way: str, worker: str = "a") -> None:
    """Ends a session."""
    if way == "close":
        wire.close(session)
    elif way == "takes over":
        wire.open(session.model, worker)
    else:
        ended = session.opened.epoch
        eventually(
            lambda: ended not in [s.epoch for s in wire.model(session.model).sessions if s.worker == worker],
            "the lease does not run out",
        )


@pytest.fixture
def brief(reused_servers: ReusedServers) -> Iterator[Wire]:
    """A server with short leases."""
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", lease_seconds=0.4, lease_seconds_min=0.1)
    with reused_servers.serving(config) as server, Wire(server.target) as wire:
        yield wire


@pytest.mark.parametrize("policy", [asynchronous(), bounded(), sync()], ids=["async", "bounded", "sync"])
def test_a_push_is_not_accepted_and_then_applied(wire: Wire, policy: object) -> None:
    wire.create("m", policy=policy)  # type: ignore[arg-type]
    session = wire.open("m", "a")
    assert _fate(wire, session, 1) == (PUSH_STATE_NOT_ACCEPTED, False)
    for number in range(1, 4):
        result = wire.step(session.header(number), gradient(number, SIZE)).result
        with unchanged(wire, "m"):
            assert _fate(wire, session, number) == (PUSH_STATE_APPLIED, True)
            assert wire.fate(session, number).result == result
    assert _fate(wire, session, 4) == (PUSH_STATE_NOT_ACCEPTED, False)
    assert _fate(wire, session, (1 << 64) - 1) == (PUSH_STATE_NOT_ACCEPTED, False)


def test_a_refused_push_is_not_accepted(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.refused("Step", StepRequest(header=session.header(1), gradient=b"\xff" * 20))
    assert _fate(wire, session, 1) == (PUSH_STATE_NOT_ACCEPTED, False)


def test_half_a_push_is_not_accepted(wire: Wire) -> None:
    wire.create("m")
    session, more = wire.open("m", "a"), Event()

    def feed() -> Iterator[bytes]:
        *first, last = push(session.header(1), cut(gradient(1, SIZE), 2))
        yield from first
        more.wait(20)
        yield last

    call = wire.start("StreamStep", feed())
    assert _fate(wire, session, 1) == (PUSH_STATE_NOT_ACCEPTED, False)
    more.set()
    assert streamed(call).result.version == 1
    assert _fate(wire, session, 1) == (PUSH_STATE_APPLIED, True)


@pytest.mark.parametrize("way", ENDS)
def test_a_push_waits_beyond_the_end_of_its_session_and_is_applied(brief: Wire, way: str) -> None:
    brief.create("m", policy=sync(2))
    a, b = (
        brief.open("m", "a", lease_seconds=1.0 if way == "lease" else 60.0),
        brief.open("m", "b", lease_seconds=60.0),
    )
    call = brief.begin(a.header(1), gradient(0, SIZE))
    assert _fate(brief, a, 1) == (PUSH_STATE_WAITING, False)
    if way == "lease":
        call.cancel()  # or else the call that waits keeps the session alive
    _end(brief, a, way)
    assert _fate(brief, a, 1) == (PUSH_STATE_WAITING, False)
    assert _fate(brief, a, 2) == (PUSH_STATE_NOT_ACCEPTED, True)
    result = brief.step(b.header(1), gradient(1, SIZE)).result
    assert _fate(brief, a, 1) == (PUSH_STATE_APPLIED, True)
    fate = brief.fate(a, 1).result
    assert (fate.version, fate.contributors, fate.update_norm) == (1, 2, result.update_norm)


@pytest.mark.parametrize("way", ENDS)
def test_a_push_cannot_arrive_after_its_session_has_ended(brief: Wire, way: str) -> None:
    brief.create("m")
    a = brief.open("m", "a", lease_seconds=1.0 if way == "lease" else 60.0)
    brief.step(a.header(1), gradient(0, SIZE))
    _end(brief, a, way)
    assert _fate(brief, a, 1) == (PUSH_STATE_APPLIED, True)
    assert brief.fate(a, 1).result.version == 1
    assert _fate(brief, a, 2) == (PUSH_STATE_NOT_ACCEPTED, True)


def test_a_push_of_a_failed_round_is_not_accepted_and_may_be_sent_again(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a = wire.open("m", "a")
    call = wire.begin(a.header(1), gradient(0, SIZE))
    assert _fate(wire, a, 1) == (PUSH_STATE_WAITING, False)
    wire.update("m", policy=sync(2, round_timeout_seconds=0.2))
    eventually(call.done, "the round does not fail")
    assert _fate(wire, a, 1) == (PUSH_STATE_NOT_ACCEPTED, False)
    wire.close(a)
    assert _fate(wire, a, 1) == (PUSH_STATE_NOT_ACCEPTED, True)


def test_of_a_push_before_the_window_only_its_state_is_known(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    results = [wire.step(session.header(number), gradient(number, SIZE)).result for number in range(1, 12)]
    for number in range(4, 12):
        assert wire.fate(session, number).result == results[number - 1]
    for number in (1, 2, 3):
        fate = wire.fate(session, number)
        assert (fate.state, fate.final, fate.result.version) == (PUSH_STATE_APPLIED, True, 11)
        assert [field.name for field, _ in fate.result.ListFields()] == ["version"]


def test_get_push_does_not_renew_the_lease(brief: Wire) -> None:
    brief.create("m")
    session = brief.open("m", "a")

    def gone() -> bool:
        brief.fate(session, 1)
        return not brief.model("m").sessions

    eventually(gone, "asking keeps the session alive", seconds=5.0)


def test_a_new_model_of_the_same_name_knows_nothing_of_the_deleted_one(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.step(session.header(1), np.ones(SIZE))
    wire.delete("m")
    wire.create("m")
    request = GetPushRequest(model="m", session_id=session.opened.session_id, sequence=1)
    assert wire.refused("GetPush", request).reason == "SESSION_UNKNOWN"
