"""`Model.watch` yields events as Python values and survives broken connections and restarts."""

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Adadelta, Async, Client, Contribution, Model, ModelEvent, Sync
from deltaserve_server import LocalServer, ServerConfig

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProxy, StartServer


def gradient(value: float) -> dict[str, Any]:
    return {"w": np.full(3, value, np.float32)}


@contextmanager
def watching(model: Model) -> Iterator[Iterator[ModelEvent]]:
    events: Any = model.watch()
    with closing(events):
        yield events


def test_an_event_is_a_value(client: Client) -> None:
    model = client.create_model("m", gradient(0), optimizer=Adadelta(lr=0.5), policy=Async(damping=True))
    with model.worker("a") as a, model.worker("b") as b, watching(model) as events:
        b.pull()
        assert next(events) == ModelEvent(version=0, contributions=(), hyperparameters=(), update_norm=None, missed=0)
        a.step(gradient(1))
        b.step(gradient(2), weight=7)
        for version, (worker, staleness, weight) in enumerate([("a", 0, 1.0), ("b", 1, 7.0)], start=1):
            event = next(events)
            result = (a if worker == "a" else b).last_result
            assert result is not None
            assert result.gradient_norm is not None
            assert event == ModelEvent(
                version=version,
                contributions=(
                    Contribution(
                        worker=worker,
                        epoch=1,
                        sequence=1,
                        staleness=staleness,
                        weight=weight,
                        gradient_norm=result.gradient_norm,
                    ),
                ),
                hyperparameters=(Adadelta(lr=0.5 / version),),
                update_norm=result.update_norm,
                missed=0,
            )


def test_a_change_is_visible_in_the_returned_version(client: Client) -> None:
    model = client.create_model("m", gradient(0))
    with model.worker() as worker, watching(model) as events:
        next(events)
        worker.step(gradient(1))
        first_version = model.update(groups=[Adadelta(lr=0.125)])
        worker.step(gradient(1))
        rates = {event.version: event.hyperparameters[0].lr for event in islice(events, 2)}
        assert rates == {first_version - 1: 1.0, first_version: 0.125}


def test_a_version_without_an_update_has_none(client: Client) -> None:
    model = client.create_model("m", gradient(0))
    with watching(model) as events:
        next(events)
        model.put_state(model.pull_state())
        assert next(events) == ModelEvent(version=1, contributions=(), hyperparameters=(), update_norm=None, missed=0)


def test_after_a_reconnect_missed_versions_are_counted(
    client: Client, server: LocalServer, start_proxy: "StartProxy", eventually: "Eventually"
) -> None:
    """Every version is yielded or counted as missed. The first event after a reconnect has the current version."""
    proxy = start_proxy(server.target)
    model = client.create_model("m", gradient(0))
    with (
        deltaserve.connect(proxy.target, timeout_seconds=20) as far,
        watching(far.model("m")) as events,
        model.worker() as worker,
    ):
        assert next(events).version == 0
        worker.step(gradient(1))
        assert next(events).version == 1
        proxy.refusing = True
        proxy.cut()
        for _ in range(3):
            worker.step(gradient(1))
        proxy.refusing = False
        seen = [next(events)]
        assert (seen[0].version, seen[0].missed, seen[0].contributions) == (4, 2, ())
        for number in (5, 6):
            worker.step(gradient(1))
            seen.append(next(events))
            assert (seen[-1].version, seen[-1].missed, len(seen[-1].contributions)) == (number, 0, 1)
        assert proxy.cuts == 1


def test_a_reconnect_without_new_versions_yields_nothing_twice(
    client: Client, server: LocalServer, start_proxy: "StartProxy", eventually: "Eventually"
) -> None:
    proxy = start_proxy(server.target)
    model = client.create_model("m", gradient(0))
    with (
        deltaserve.connect(proxy.target, timeout_seconds=20) as far,
        watching(far.model("m")) as events,
        model.worker() as worker,
    ):
        next(events)
        for version in range(1, 4):
            proxy.cut()
            eventually(lambda: len(server._catalog.get("m")._subscribers._watchers) == 0)
            worker_stepped = iter(events)
            worker.step(gradient(1))
            assert next(worker_stepped).version == version
        assert proxy.cuts == 3


@pytest.mark.deep
def test_a_restart_without_the_model_ends_the_watch(start_server: "StartServer") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        model = client.create_model("m", gradient(0))
        with watching(model) as events:
            next(events)
            server.kill()
            server.start()
            with pytest.raises(deltaserve.Error) as caught:
                next(events)
            assert caught.value.reason == "MODEL_NOT_FOUND"


@pytest.mark.deep
def test_a_server_that_stays_down_ends_the_watch_within_the_timeout(start_server: "StartServer") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        model = client.create_model("m", gradient(0))
        with watching(model) as events:
            next(events)
            client._connection.timeout_seconds = 1.0
            server.signal(signal.SIGKILL)
            began = monotonic()
            with pytest.raises(deltaserve.UnavailableError):
                next(events)
            assert monotonic() - began < 10


@pytest.mark.deep
def test_watching_a_stopped_server_times_out(start_server: "StartServer") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        model = client.create_model("m", gradient(0))
        server.signal(signal.SIGSTOP)
        client._connection.timeout_seconds = 0.3
        began = monotonic()
        with pytest.raises(deltaserve.UnavailableError), watching(model) as events:
            next(events)
        assert monotonic() - began < 15
        server.signal(signal.SIGCONT)


def test_deleting_the_model_ends_the_watch(client: Client) -> None:
    model = client.create_model("m", gradient(0))
    with watching(model) as events, model.worker() as worker:
        next(events)
        worker.step(gradient(1))
        model.delete()
        assert next(events).version == 1
        with pytest.raises(deltaserve.RequestError, match="no model is named 'm'") as caught:
            next(events)
        assert caught.value.reason == "MODEL_NOT_FOUND"
        assert next(events, None) is None


@pytest.mark.usefixtures("own_server")
def test_stopping_the_server_ends_the_watch(server: LocalServer, client: Client) -> None:
    model = client.create_model("m", gradient(0))
    with watching(model) as events:
        next(events)
        client._connection.timeout_seconds = 1.5
        server.stop(grace_seconds=0)
        with pytest.raises(deltaserve.UnavailableError):
            next(events)


def test_leaving_the_loop_frees_the_watch_slot() -> None:
    config = ServerConfig(device="cpu", watchers=2)
    with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=20) as client:
        assert client.server_info().limits.watchers == 2
        model = client.create_model("m", gradient(0), policy=Sync())
        for _ in range(5):
            for event in model.watch():
                assert event.version == 0
                break
            with watching(model) as events, watching(client.model("m")) as others:
                assert (next(events).version, next(others).version) == (0, 0)
            left = model.watch()
            next(left)
            del left
        with watching(model) as events, watching(model) as others:
            next(events)
            next(others)
            client._connection.timeout_seconds = 0.5
            while True:  # a busy machine may not answer in time at first
                with pytest.raises(deltaserve.UnavailableError) as caught:
                    next(model.watch())
                if caught.value.reason:
                    break
            assert caught.match("limit of 2 watchers")
            assert caught.value.reason == "WATCHER_LIMIT"


def test_a_watch_makes_its_first_call_with_next(client: Client) -> None:
    model = client.create_model("m", gradient(0))
    model.delete()
    events = model.watch()
    with pytest.raises(deltaserve.RequestError, match="no model is named 'm'"):
        next(events)
