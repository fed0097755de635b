"""Leases and rounds on a clock that the test advances: nothing here waits."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from messages import sync
from tests.support.clock import ManualClock
from wire import Wire, refusal

from deltaserve_server import LocalServer, ServerConfig


@pytest.fixture(scope="module")
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="module")
def wire(clock: ManualClock) -> Iterator[Wire]:
    with LocalServer(clock=clock) as server, Wire(server.target) as plain:
        yield plain


def test_a_lease_runs_out(wire: Wire, clock: ManualClock) -> None:
    wire.create("lease")
    wire.open("lease", "a", lease_seconds=60.0)
    clock.advance(59.0)
    (session,) = wire.model("lease").sessions
    assert session.lease_left_seconds == pytest.approx(1.0)
    clock.advance(1.0)
    assert not wire.model("lease").sessions


def test_each_push_renews_the_lease(wire: Wire, clock: ManualClock) -> None:
    wire.create("renewed")
    session = wire.open("renewed", "a", lease_seconds=60.0)
    for sequence in range(1, 4):
        clock.advance(59.0)
        wire.step(session.header(sequence), np.ones(5))
    (still,) = wire.model("renewed").sessions
    assert still.last_sequence == 3


def test_a_round_times_out(wire: Wire, clock: ManualClock) -> None:
    wire.create("round", policy=sync(2, round_timeout_seconds=3600.0))
    call = wire.begin(wire.open("round", "a").header(1), np.ones(5))
    clock.advance(3599.0)
    assert wire.waiting("round") == {"a"}
    clock.advance(1.0)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert refusal(caught.value).reason == "ROUND_FAILED"


def test_a_quorum_closes_its_round_after_the_grace(wire: Wire, clock: ManualClock) -> None:
    wire.create("quorum", policy=sync(1, quorum=1, grace_seconds=5.0))
    pushing, _ = wire.open("quorum", "a"), wire.open("quorum", "b", lease_seconds=3600.0)
    call = wire.begin(pushing.header(1), np.ones(5))
    clock.advance(4.9)
    assert wire.waiting("quorum") == {"a"}
    clock.advance(0.2)
    assert list(call)
    assert wire.model("quorum").position.version == 1


def test_the_uptime_is_the_clock_s(wire: Wire, clock: ManualClock) -> None:
    before = wire.info().uptime_seconds
    clock.advance(100.0)
    assert wire.info().uptime_seconds == pytest.approx(before + 100.0)


def test_a_snapshot_is_due_when_the_clock_says_so(tmp_path: Path) -> None:
    clock = ManualClock()
    config = ServerConfig(device="cpu", data_dir=tmp_path, snapshot_seconds=60.0)
    with LocalServer(config, clock=clock) as server, Wire(server.target) as wire:
        wire.create("m")
        wire.step(wire.open("m", "a", lease_seconds=3600.0).header(1), np.ones(5))
        clock.advance(59.0)
        assert wire.model("m").position.durable_version == 0
        clock.advance(1.0)
        assert wire.model("m").position.durable_version == 1
