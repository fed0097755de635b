"""A worker whose lease expired, as on a laptop that slept, continues in a new session and loses no push."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Async, Client, StaleGradientError, Sync, Worker
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, GiveUp

Sleeps = Callable[[Worker], None]


def gradient(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


@pytest.fixture
def sleeps(server: LocalServer, eventually: "Eventually") -> Sleeps:
    """Lets the lease of a worker expire, as if its process had been stopped."""

    def sleep(worker: Worker) -> None:
        worker._session._closed.put(None)  # ends only the thread that renews the lease
        sessions = server._catalog.get("m").machine.sessions

        def gone() -> bool:
            session = sessions.find(worker._session.id["session_id"])
            if session:  # again each time: a call in progress may have renewed it
                session.expires = 0.0
            return session is None

        eventually(gone)

    return sleep


def test_the_gradient_is_pushed_in_a_new_session(
    client: Client, sleeps: Sleeps, caplog: pytest.LogCaptureFixture
) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a") as a, model.worker("b") as b:
        a.step(gradient(1))
        sleeps(a)
        b.step(gradient(2))
        with caplog.at_level(logging.WARNING, "deltaserve"):
            weights = a.step(gradient(3))
        assert "it goes on in a new session" in caplog.text
        assert a.last_result
        assert (a.last_result.version, a.last_result.staleness) == (3, 1)
        np.testing.assert_array_equal(weights["w"], model.pull_state().weights["w"])
        assert [session.epoch for session in model.info().sessions] == [2, 1]


def test_a_gradient_that_became_too_old_is_left_out(client: Client, sleeps: Sleeps) -> None:
    model = client.create_model("m", gradient(0), policy=Async(max_staleness=0))
    with model.worker("a") as a, model.worker("b") as b:
        a.step(gradient(1))
        sleeps(a)
        b.step(gradient(2))
        with pytest.raises(StaleGradientError) as caught:
            a.step(gradient(3))
        assert caught.value.reason == "STALE_BASE"
        np.testing.assert_array_equal(a.weights["w"], model.pull_state().weights["w"])
        a.step(gradient(4))
        assert a.last_result
        assert (a.last_result.version, a.last_result.staleness) == (3, 0)


def test_a_push_that_had_been_applied_counts_once(client: Client, sleeps: Sleeps) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a") as a:
        a.step(gradient(1))
        first = a.last_result
        a._session.sequence, a._session.sent = 1, True  # as if its answer had been lost
        sleeps(a)
        weights = a.step(gradient(1))
        assert first
        assert a.last_result == replace(first, duplicate=True)
        assert model.info().version == 1
        np.testing.assert_array_equal(weights["w"], model.pull_state().weights["w"])


def test_a_push_that_waits_for_its_round_counts_once(client: Client, sleeps: Sleeps, give_up: "GiveUp") -> None:
    model = client.create_model("m", gradient(0), policy=Sync(min_workers=2))
    with model.worker("b") as b, model.worker("a") as a:
        give_up(a, gradient(1))
        sleeps(a)
        b.pull()

        with ThreadPoolExecutor() as threads:
            resumed = threads.submit(a.step, gradient(1))
            b.step(gradient(3))
            resumed.result()
        assert a.last_result
        assert (a.last_result.version, a.last_result.contributors) == (1, 2)
        assert model.info().version == 1


def test_another_gradient_in_place_of_one_that_was_applied_counts_too(client: Client, sleeps: Sleeps) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a") as a:
        a.step(gradient(1))
        a._session.sequence, a._session.sent = 1, True  # as if its answer had been lost and the caller had continued
        sleeps(a)
        a.step(gradient(-1))
        assert a.last_result
        assert (a.last_result.version, a.last_result.duplicate) == (2, False)
        assert [session.epoch for session in model.info().sessions] == [2]


@pytest.mark.parametrize("broken", ["GetPush", "OpenSession"])
def test_an_interrupted_resume_pushes_nothing_twice(
    broken: str, client: Client, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a") as a:
        a.step(gradient(1))
        sleeps(a)
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
