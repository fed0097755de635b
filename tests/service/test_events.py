"""What observers of a server learn."""

import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from messages import sync
from tests.support.clock import ManualClock
from wire import Wire

from deltaserve.v1.model_service_pb2 import GetModelRequest, SaveSnapshotRequest
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.engine import events
from deltaserve_server.engine.events import Observer, Observers


class Recorder(Observer):
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def take(self) -> list[object]:
        taken, self.events = self.events, []
        return taken

    def _keep(self, event: object) -> None:
        self.events.append(event)

    pushed = updated = session_joined = session_left = round_closed = _keep
    snapshot_taken = model_served = model_deleted = refused = _keep


class Faulty(Observer):
    """Fails on every update."""

    def updated(self, event: events.Updated) -> None:
        raise ZeroDivisionError("an observer's fault")


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="module")
def running(recorder: Recorder, clock: ManualClock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    config = ServerConfig(device="cpu", data_dir=tmp_path_factory.mktemp("data"), durability="journal")
    with LocalServer(config, clock=clock, observers=[Faulty(), recorder]) as server, Wire(server.target) as wire:
        yield wire


@pytest.fixture
def wire(running: Wire, recorder: Recorder) -> Wire:
    recorder.take()
    return running


def test_a_push_and_its_update(wire: Wire, recorder: Recorder) -> None:
    wire.create("push")
    session = wire.open("push", "a")
    answer = wire.step(session.header(1), np.full(5, 2.0))
    wire.step(session.header(1), np.full(5, 2.0))  # a duplicate is no event
    served, joined, pushed, updated = recorder.take()
    assert served == events.ModelServed(model="push")
    assert joined == events.SessionJoined(model="push", worker="a", epoch=1, rank=0)
    assert pushed == events.Pushed(model="push", worker="a", epoch=1, sequence=1, norm=20.0**0.5)
    assert isinstance(updated, events.Updated)
    assert updated.position == (answer.position.incarnation, 1, 1), "it is durable"
    assert updated.summary
    assert [c.worker for c in updated.summary.contributions] == ["a"]


def test_rounds_that_close_and_fail(wire: Wire, recorder: Recorder, clock: ManualClock) -> None:
    wire.create("rounds", policy=sync(2, round_timeout_seconds=10.0))
    a, b = wire.open("rounds", "a"), wire.open("rounds", "b")
    call = wire.begin(a.header(1), np.ones(5))
    wire.step(b.header(1), np.ones(5))
    assert list(call)
    call = wire.begin(a.header(2), np.ones(5))
    clock.advance(11.0)
    with pytest.raises(grpc.RpcError):
        list(call)
    taken = recorder.take()
    assert [event for event in taken if isinstance(event, events.RoundClosed)] == [
        events.RoundClosed(model="rounds", version=1, pushes=2),
        events.RoundClosed(model="rounds", version=None, pushes=1),
    ]
    assert [event.sequence for event in taken if isinstance(event, events.Pushed)] == [1, 1, 2]


def test_why_sessions_end(wire: Wire, recorder: Recorder) -> None:
    wire.create("sessions")
    wire.close(wire.open("sessions", "a"))
    wire.open("sessions", "b")
    wire.open("sessions", "b")
    left = [event for event in recorder.take() if isinstance(event, events.SessionLeft)]
    assert [(event.worker, event.epoch, event.reason) for event in left] == [("a", 1, "closed"), ("b", 1, "replaced")]


def test_a_lease_that_runs_out_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock, recorder = ManualClock(), Recorder()
    with LocalServer(clock=clock, observers=[recorder]) as server, Wire(server.target) as wire:
        wire.create("m")
        wire.open("m", "a", lease_seconds=10.0)
        with caplog.at_level(logging.WARNING, "deltaserve_server"):
            clock.advance(10.0)
    assert events.SessionLeft(model="m", worker="a", epoch=1, reason="expired") in recorder.take()
    assert "model m: the lease of worker a ran out" in caplog.messages


def test_snapshots(wire: Wire, recorder: Recorder) -> None:
    wire.create("saved")
    wire.step(wire.open("saved", "a").header(1), np.ones(5))
    recorder.take()
    (answer,) = wire.call("SaveSnapshot", SaveSnapshotRequest(model="saved"))
    (taken,) = recorder.take()
    shot = answer.snapshot
    assert taken == events.SnapshotTaken(model="saved", number=shot.number, version=1, bytes=shot.bytes)


def test_refusals_and_deletions(wire: Wire, recorder: Recorder) -> None:
    wire.refused("GetModel", GetModelRequest(model="nothing"))
    wire.create("deleted")
    wire.delete("deleted")
    assert recorder.take() == [
        events.RequestRefused(method="deltaserve.v1.ModelService.GetModel", reason="MODEL_NOT_FOUND"),
        events.ModelServed(model="deleted"),
        events.ModelDeleted(model="deleted"),
    ]


def test_an_observer_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    observers = Observers([Faulty(), recorder])
    event = events.Updated(model="m", position=events.Position("i", 1, None), summary=None)
    observers.emit(event)
    assert recorder.events == [event]
    assert "an observer failed" in caplog.text


def test_an_event_is_wanted_by_those_who_override_its_method() -> None:
    observers = Observers([Faulty()])
    assert observers.wants(events.Updated)
    assert not observers.wants(events.Pushed)
    assert not Observers().wants(events.Updated)


def test_a_model_that_is_recovered_is_served(tmp_path: Path) -> None:
    config = ServerConfig(device="cpu", data_dir=tmp_path)
    with LocalServer(config) as server, Wire(server.target) as wire:
        wire.create("m")
    recorder = Recorder()
    with LocalServer(config, observers=[recorder]):
        assert recorder.take() == [events.ModelServed(model="m")]
