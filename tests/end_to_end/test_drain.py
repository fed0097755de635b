"""A server process that is told to stop: what waits may go on, what is new is refused, and it ends in time."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

import deltaserve
from deltaserve.v1 import worker_service_pb2 as rpc

SERVER = """
import signal, sys, threading
import deltaserve_server

stopping = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopping.set())
server = deltaserve_server.Server(deltaserve_server.ServerConfig(bind="127.0.0.1:0", device="cpu"))
server.start()
print(server.target, flush=True)
while not stopping.wait(0.2):  # a signal may wake another thread than this one
    pass
server.stop(grace_seconds=float(sys.argv[1]))
print("stopped", flush=True)
"""
SERVICE = "/deltaserve.v1.WorkerService/"


class Process:
    """A server in a process of its own."""

    def __init__(self, grace_seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVER, str(grace_seconds)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self.target = self._process.stdout.readline().strip()
        self.channel = grpc.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._told = 0.0

    def terminate(self) -> None:
        """Sends SIGTERM, and returns when the server has begun to stop."""
        self._told = monotonic()
        self._process.send_signal(signal.SIGTERM)
        health = health_pb2_grpc.HealthStub(self.channel)
        while (
            health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        ):
            assert monotonic() - self._told < 10

    def ended(self) -> float:
        """Waits for the end, which is to be in good order; returns the seconds since SIGTERM."""
        output, _ = self._process.communicate(timeout=60)
        assert (self._process.returncode, output) == (0, "stopped\n")
        return monotonic() - self._told

    def close(self) -> None:
        """Ends the process."""
        self.channel.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def open(self, worker: str, model: str = "m") -> rpc.OpenSessionResponse:
        """OpenSession."""
        call: Any = self.channel.unary_unary(SERVICE + "OpenSession", None, rpc.OpenSessionResponse.FromString)
        request = rpc.OpenSessionRequest(model=model, worker=worker)
        opened: rpc.OpenSessionResponse = call(request.SerializeToString(), timeout=10)
        return opened

    def push(self, session: rpc.OpenSessionResponse, sequence: int = 1, model: str = "m") -> Any:
        """Begins a Step with a gradient of one; returns its future."""
        header = rpc.PushHeader(model=model, session_id=session.session_id, epoch=session.epoch, sequence=sequence)
        request = rpc.StepRequest(header=header, gradient=np.ones(1, "<f4").tobytes())
        call: Any = self.channel.unary_unary(SERVICE + "Step", None, rpc.StepResponse.FromString)
        return call.future(request.SerializeToString(), timeout=60)

    def close_session(self, session: rpc.OpenSessionResponse, model: str = "m") -> None:
        """CloseSession."""
        call: Any = self.channel.unary_unary(SERVICE + "CloseSession")
        request = rpc.CloseSessionRequest(model=model, session_id=session.session_id, epoch=session.epoch)
        call(request.SerializeToString(), timeout=10)

    def waits(self, client: deltaserve.Client) -> None:
        """Returns when a push waits for its round."""
        deadline = monotonic() + 30
        while not any(session.waiting for session in client.model("m").info().sessions):
            assert monotonic() < deadline


@pytest.fixture
def start() -> Iterator[Callable[[float], Process]]:
    started: list[Process] = []

    def make(grace_seconds: float) -> Process:
        started.append(Process(grace_seconds))
        return started[-1]

    yield make
    for process in started:
        process.close()


@pytest.fixture
def grace_seconds() -> float:
    """Longer than what ends before it may take on a busy machine."""
    return 30.0


@pytest.fixture
def waiting(
    start: Callable[[float], Process], grace_seconds: float
) -> Iterator[tuple[Process, Any, rpc.OpenSessionResponse]]:
    """A server where worker a's push waits for worker b; with that push and b's session."""
    process = start(grace_seconds)
    with deltaserve.connect(process.target, timeout_seconds=30) as client:
        client.create_model("m", {"w": np.zeros(1, np.float32)}, policy=deltaserve.Sync())
        a, b = process.open("a"), process.open("b")
        call = process.push(a)
        process.waits(client)
        yield process, call, b


def _reason(error: grpc.RpcError) -> tuple[str, bool]:
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), False
    for detail in status.details:
        detail.Unpack(info)
        retry = retry or detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return info.reason, retry


def test_a_server_without_work_ends_at_once(start: Callable[[float], Process]) -> None:
    process = start(30.0)
    process._told = monotonic()
    process._process.terminate()
    assert process.ended() < 20


def test_a_push_that_waits_is_answered_when_its_round_closes(
    waiting: tuple[Process, Any, rpc.OpenSessionResponse],
) -> None:
    process, call, b = waiting
    process.terminate()
    process.close_session(b)
    answer = call.result()
    assert (answer.result.version, answer.result.contributors) == (1, 1)
    assert process.ended() < 20


def test_a_round_under_way_is_finished_by_those_it_waits_for(
    waiting: tuple[Process, Any, rpc.OpenSessionResponse],
) -> None:
    process, call, b = waiting
    process.terminate()
    answers = [process.push(b).result(), call.result()]
    assert [(answer.result.version, answer.result.contributors) for answer in answers] == [(1, 2), (1, 2)]
    assert process.ended() < 20


def test_what_is_new_is_refused_with_the_time_to_try_again(
    waiting: tuple[Process, Any, rpc.OpenSessionResponse],
) -> None:
    process, _call, _b = waiting
    with deltaserve.connect(process.target, timeout_seconds=30) as client:
        client.create_model("other", {"w": np.zeros(1, np.float32)})
    other = process.open("a", "other")
    process.terminate()
    for begin in (lambda: process.open("c"), process.push(other, model="other").result):
        with pytest.raises(grpc.RpcError) as caught:
            begin()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert _reason(caught.value) == ("DRAINING", True)
    with deltaserve.connect(process.target, timeout_seconds=30) as client:
        client._connection.timeout_seconds = 0.5  # less than the time after which it would try again
        while True:  # a busy machine may first not answer in time
            with pytest.raises(deltaserve.UnavailableError) as raised:
                client.create_model("new", {"w": np.zeros(1, np.float32)})
            if raised.value.reason:
                break
        assert raised.value.reason == "DRAINING"
        client._connection.timeout_seconds = 30
        assert [(model.name, model.version) for model in client.models()] == [("m", 0), ("other", 0)]


@pytest.mark.parametrize("grace_seconds", [5.0])
def test_a_round_that_does_not_close_is_given_up_when_the_grace_is_over(
    waiting: tuple[Process, Any, rpc.OpenSessionResponse],
) -> None:
    process, call, _b = waiting
    process.terminate()
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert _reason(caught.value) == ("DRAINING", True)
    assert 4.5 < process.ended() < 30
