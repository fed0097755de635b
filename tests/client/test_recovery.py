"""A recovering server reports its progress, and clients wait for it."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deltaserve

if TYPE_CHECKING:
    from tests.client.conftest import ServerProcess, StartServer

pytestmark = pytest.mark.deep

ONE = {"w": np.ones(30_000, np.float32)}
RECORDS = 12

Health = Callable[[str], int]


@pytest.fixture
def slow_recovery(start_server: "StartServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "ServerProcess":
    """A server whose next start takes half a second for each of 12 journal records."""
    server = start_server(data_dir=str(tmp_path), durability="journal")
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        with client.create_model("m", ONE).worker("a") as worker:
            for _ in range(RECORDS - 1):
                worker.step(ONE)
        client.create_model("quick", {"w": np.ones(1)})
    server.kill()
    monkeypatch.setenv("DELTASERVE_FAILPOINTS", "recovery.replay=sleep(0.5)")
    return server


def test_a_recovering_server_reports_progress_and_clients_wait(
    slow_recovery: "ServerProcess", caplog: pytest.LogCaptureFixture
) -> None:
    server = slow_recovery
    started = threading.Thread(target=server.start)
    with deltaserve.connect(server.target, timeout_seconds=30) as client, grpc.insecure_channel(server.target) as plain:
        health = health_pb2_grpc.HealthStub(plain)
        started.start()
        _until_reachable(server.target)
        asked = health_pb2.HealthCheckRequest()
        assert health.Check(asked, timeout=5).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert client.server_info().durability == "journal", "who does not ask for a model is answered"
        with caplog.at_level(logging.INFO, "deltaserve"):
            assert client.model("m").info().version == RECORDS - 1
        assert "the server still reads model m from its disk: " in caplog.text
        assert " % done, about " in caplog.text
        started.join()
        assert client.model("quick").info().version == 0
        assert health.Check(asked, timeout=5).status == health_pb2.HealthCheckResponse.SERVING


def test_a_short_timeout_raises_the_progress_as_an_error(slow_recovery: "ServerProcess") -> None:
    with _impatient(slow_recovery) as client:
        error = _refusal(lambda: client.create_model("m", ONE))
        assert error.reason == "RECOVERING"
        assert error.metadata["model"] == "m"
        assert 0 <= int(error.metadata["percent"]) <= 100


def test_models_never_returns_an_incomplete_list(slow_recovery: "ServerProcess") -> None:
    """With an incomplete list, a caller would create a missing model anew."""
    with _impatient(slow_recovery) as client:
        error = _refusal(client.models)
        assert (error.reason, error.metadata["model"]) == ("RECOVERING", "m")
        with deltaserve.connect(slow_recovery.target, timeout_seconds=30) as patient:
            assert [model.name for model in patient.models()] == ["m", "quick"]


def test_a_crash_during_recovery_changes_nothing(
    slow_recovery: "ServerProcess", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may crash during recovery any number of times."""
    server = slow_recovery
    for place in ("replay=kill@1", "replay=kill@5", f"replay=kill@{RECORDS}", "done=kill@1", "tensors=kill@1"):
        monkeypatch.setenv("DELTASERVE_FAILPOINTS", f"recovery.{place}")
        with pytest.raises(AssertionError, match="the server did not start"):
            server.start()
        server.kill()
    monkeypatch.delenv("DELTASERVE_FAILPOINTS")
    assert "DELTASERVE_FAILPOINTS" not in os.environ
    server.start()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        assert client.model("m").info().version == RECORDS - 1


@contextmanager
def _impatient(server: "ServerProcess") -> Iterator[deltaserve.Client]:
    """Starts the server, yields a client with a timeout of 0.5 s once it answers, and waits for its recovery."""
    started = threading.Thread(target=server.start)
    started.start()
    _until_reachable(server.target)
    try:
        with deltaserve.connect(server.target, timeout_seconds=0.5) as client:
            yield client
    finally:
        started.join()


def _refusal(call: Callable[[], object]) -> deltaserve.Error:
    """Returns the refusal of a call; tries again if a busy machine does not answer in time."""
    while True:
        with pytest.raises(deltaserve.UnavailableError) as caught:
            call()
        if caught.value.reason:
            return caught.value


def _until_reachable(target: str) -> None:
    end = monotonic() + 20
    with deltaserve.connect(target, timeout_seconds=1) as client:
        while monotonic() < end:
            try:
                client.server_info()
            except deltaserve.UnavailableError:
                sleep(0.01)
            else:
                return
    raise AssertionError("nobody listens")
