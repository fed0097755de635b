"""A worker whose lease ran out, as that of a machine that slept: it goes on in a new session, and no push is lost."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Async, Client, Model, StaleGradientError, Sync, Worker
from deltaserve_server import LocalServer, ServerConfig

if TYPE_CHECKING:
    from tests.client.conftest import Eventually

LEASE_SECONDS = 0.3


def gradient(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer(ServerConfig(device="cpu", lease_seconds_min=LEASE_SECONDS)) as server:
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        yield client


def sleeps(model: Model, worker: Worker, eventually: "Eventually") -> None:
    """Lets the worker's lease run out, as if its process had been stopped."""
    worker._session._closed.put(None)  # ends its thread of renewals, and no more
    eventually(lambda: worker.name not in [session.worker for session in model.info().sessions])


def test_the_gradient_is_pushed_in_a_new_session(
    client: Client, eventually: "Eventually", caplog: pytest.LogCaptureFixture
) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a", lease_seconds=LEASE_SECONDS) as a, model.worker("b") as b:
        a.step(gradient(1))
        sleeps(model, a, eventually)
        b.step(gradient(2))
        with caplog.at_level(logging.WARNING, "deltaserve"):
            weights = a.step(gradient(3))
        assert "it goes on in a new session" in caplog.text
        assert a.last_result
        assert (a.last_result.version, a.last_result.staleness) == (3, 1)
        np.testing.assert_array_equal(weights["w"], model.pull_state().weights["w"])
        assert [session.epoch for session in model.info().sessions] == [2, 1]


def test_a_gradient_that_is_too_old_by_then_is_left_out(client: Client, eventually: "Eventually") -> None:
    model = client.create_model("m", gradient(0), policy=Async(max_staleness=0))
    with model.worker("a", lease_seconds=LEASE_SECONDS) as a, model.worker("b") as b:
        a.step(gradient(1))
        sleeps(model, a, eventually)
        b.step(gradient(2))
        with pytest.raises(StaleGradientError) as caught:
            a.step(gradient(3))
        assert caught.value.reason == "STALE_BASE"
        np.testing.assert_array_equal(a.weights["w"], model.pull_state().weights["w"])
        a.step(gradient(4))
        assert a.last_result
        assert (a.last_result.version, a.last_result.staleness) == (3, 0)


def test_a_push_that_had_been_applied_counts_once(client: Client, eventually: "Eventually") -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a", lease_seconds=LEASE_SECONDS) as a:
        a.step(gradient(1))
        first = a.last_result
        a._sequence, a._sent = 1, True  # as if its answer had been lost
        sleeps(model, a, eventually)
        weights = a.step(gradient(1))
        assert first
        assert a.last_result == replace(first, duplicate=True)
        assert model.info().version == 1
        np.testing.assert_array_equal(weights["w"], model.pull_state().weights["w"])


def test_a_push_that_waits_for_its_round_counts_once(client: Client, eventually: "Eventually") -> None:
    model = client.create_model("m", gradient(0), policy=Sync(min_workers=2))
    patient = deltaserve.connect(client.target, timeout_seconds=1)
    with model.worker("b") as b, patient, patient.model("m").worker("a", lease_seconds=LEASE_SECONDS) as a:
        a.pull()
        with pytest.raises(deltaserve.UnavailableError, match="did not answer within"):
            a.step(gradient(1))
        patient._connection.timeout_seconds = 20
        sleeps(model, a, eventually)
        b.pull()

        with ThreadPoolExecutor() as threads:
            resumed = threads.submit(a.step, gradient(1))
            b.step(gradient(3))
            resumed.result()
        assert a.last_result
        assert (a.last_result.version, a.last_result.contributors) == (1, 2)
        assert model.info().version == 1


def test_another_gradient_in_place_of_one_that_was_applied_counts_too(client: Client, eventually: "Eventually") -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a", lease_seconds=LEASE_SECONDS) as a:
        a.step(gradient(1))
        a._sequence, a._sent = 1, True  # as if its answer had been lost, and the caller had gone on
        sleeps(model, a, eventually)
        a.step(gradient(-1))
        assert a.last_result
        assert (a.last_result.version, a.last_result.duplicate) == (2, False)
        assert [session.epoch for session in model.info().sessions] == [2]


@pytest.mark.parametrize("broken", ["GetPush", "OpenSession"])
def test_going_on_that_is_broken_off_pushes_nothing_twice(
    broken: str, client: Client, eventually: "Eventually", monkeypatch: pytest.MonkeyPatch
) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a", lease_seconds=LEASE_SECONDS) as a:
        a.step(gradient(1))
        sleeps(model, a, eventually)
        call = client._connection.call

        def fail(method: str, *arguments: Any, **options: Any) -> Any:
            if method == broken:
                raise deltaserve.UnavailableError("the line is cut")
            return call(method, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(client._connection, "call", fail)
            with pytest.raises(deltaserve.UnavailableError, match="the line is cut"):
                a.step(gradient(2))
        a.step(gradient(2))
        assert model.info().version == 2


def test_a_closed_or_replaced_worker_does_not_come_back(client: Client) -> None:
    model = client.create_model("m", gradient(0))
    closed = model.worker("a")
    closed.step(gradient(1))
    closed.close()
    with pytest.raises(deltaserve.SessionError) as caught:
        closed.step(gradient(1))
    assert caught.value.reason == "SESSION_UNKNOWN"
    assert caught.value.__notes__ == ["Its last push, number 2: not accepted."]
    with model.worker("a") as older, model.worker("a") as newer:
        newer.step(gradient(1))
        with pytest.raises(deltaserve.SessionError) as caught:
            older.step(gradient(1))
        assert caught.value.reason == "SESSION_FENCED"
    assert model.info().sessions == ()
