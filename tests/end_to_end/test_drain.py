"""A server that is told to stop: open rounds may finish, new work is refused, and it ends within its grace period."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic, sleep
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

import deltaserve
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server import LocalServer

SERVICE = "/deltaserve.v1.WorkerService/"


class Stoppable:
    """A server that a thread stops while the test goes on talking to it."""

    def __init__(self, grace_seconds: float) -> None:
        self._server = LocalServer()
        self._server.start()
        self.target = self._server.target
        self.channel = grpc.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._grace_seconds = grace_seconds
        self._thread = ThreadPoolExecutor(1)
        self._stopped: Future[bool] | None = None
        self._told = 0.0

    def stop(self) -> None:
        """Tells the server to stop."""
        self._told = monotonic()
        self._stopped = self._thread.submit(self._server.stop, self._grace_seconds)

    def drain(self) -> None:
        """Tells the server to stop; returns once it refuses new work."""
        self.stop()
        health = health_pb2_grpc.HealthStub(self.channel)
        request, serving = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING
        while health.Check(request, timeout=10).status == serving:
            assert monotonic() - self._told < 10

    def ended(self) -> float:
        """Waits until the server has stopped; returns the seconds that it took."""
        assert self._stopped
        assert self._stopped.result(60)
        return monotonic() - self._told

    def close(self) -> None:
        """Stops the server at once, if the test has not."""
        if not self._stopped:
            self._server.stop(grace_seconds=0)
        self._thread.shutdown()
        self.channel.close()

    def open(self, worker: str, model: str = "m") -> rpc.OpenSessionResponse:
        """Opens a session."""
        call: Any = self.channel.unary_unary(SERVICE + "OpenSession", None, rpc.OpenSessionResponse.FromString)
        request = rpc.OpenSessionRequest(model=model, worker=worker)
        opened: rpc.OpenSessionResponse = call(request.SerializeToString(), timeout=10)
        return opened

    def push(self, session: rpc.OpenSessionResponse, sequence: int = 1, model: str = "m") -> Any:
        """Begins a Step with a gradient of 1; returns its future."""
        header = rpc.PushHeader(model=model, session_id=session.session_id, epoch=session.epoch, sequence=sequence)
        request = rpc.StepRequest(header=header, gradient=np.ones(1, "<f4").tobytes())
        call: Any = self.channel.unary_unary(SERVICE + "Step", None, rpc.StepResponse.FromString)
        return call.future(request.SerializeToString(), timeout=60)

    def close_session(self, session: rpc.OpenSessionResponse, model: str = "m") -> None:
        """Closes a session."""
        call: Any = self.channel.unary_unary(SERVICE + "CloseSession")
        request = rpc.CloseSessionRequest(model=model, session_id=session.session_id, epoch=session.epoch)
        call(request.SerializeToString(), timeout=10)

    def waits(self, client: deltaserve.Client) -> None:
        """Returns when a push waits for its round."""
        deadline = monotonic() + 30
        while not any(session.waiting for session in client.model("m").info().sessions):
            assert monotonic() < deadline
            sleep(0.005)


@pytest.fixture
def start() -> Iterator[Callable[[float], Stoppable]]:
    with ExitStack() as stack:

        def make(grace_seconds: float) -> Stoppable:
            server = Stoppable(grace_seconds)
            stack.callback(server.close)
            return server

        yield make


@pytest.fixture
def grace_seconds() -> float:
    """Longer than any test needs."""
    return 30.0


@pytest.fixture
def waiting(
    start: Callable[[float], Stoppable], grace_seconds: float
) -> Iterator[tuple[Stoppable, Any, rpc.OpenSessionResponse]]:
    """A server where worker a's push waits for worker b; with that push and b's session."""
    server = start(grace_seconds)
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        client.create_model("m", {"w": np.zeros(1, np.float32)}, policy=deltaserve.Sync())
        a, b = server.open("a"), server.open("b")
        call = server.push(a)
        server.waits(client)
        yield server, call, b


def _reason(error: grpc.RpcError) -> tuple[str, bool]:
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), False
    for detail in status.details:
        detail.Unpack(info)
        retry = retry or detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return info.reason, retry


def test_a_server_without_work_stops_at_once(start: Callable[[float], Stoppable]) -> None:
    server = start(30.0)
    server.stop()
    assert server.ended() < 20


def test_a_waiting_push_is_answered_when_its_round_closes(
    waiting: tuple[Stoppable, Any, rpc.OpenSessionResponse],
) -> None:
    server, call, b = waiting
    server.drain()
    server.close_session(b)
    answer = call.result()
    assert (answer.result.version, answer.result.contributors) == (1, 1)
    assert server.ended() < 20


def test_an_open_round_accepts_the_pushes_that_it_waits_for(
    waiting: tuple[Stoppable, Any, rpc.OpenSessionResponse],
) -> None:
    server, call, b = waiting
    server.drain()
    answers = [server.push(b).result(), call.result()]
    assert [(answer.result.version, answer.result.contributors) for answer in answers] == [(1, 2), (1, 2)]
    assert server.ended() < 20


def test_new_work_is_refused_with_a_retry_delay(
    waiting: tuple[Stoppable, Any, rpc.OpenSessionResponse],
) -> None:
    server, call, b = waiting
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        client.create_model("other", {"w": np.zeros(1, np.float32)})
    other = server.open("a", "other")
    server.drain()
    for begin in (lambda: server.open("c"), server.push(other, model="other").result):
        with pytest.raises(grpc.RpcError) as caught:
            begin()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert _reason(caught.value) == ("DRAINING", True)
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        client._connection.timeout_seconds = 0.5  # less than the delay before it would try again
        while True:  # a busy machine may not answer in time at first
            with pytest.raises(deltaserve.UnavailableError) as raised:
                client.create_model("new", {"w": np.zeros(1, np.float32)})
            if raised.value.reason:
                break
        assert raised.value.reason == "DRAINING"
        client._connection.timeout_seconds = 30
        assert [(model.name, model.version) for model in client.models()] == [("m", 0), ("other", 0)]
    server.close_session(b)
    call.result()


@pytest.mark.parametrize("grace_seconds", [0.3])
def test_a_round_that_does_not_close_is_given_up_after_the_grace_period(
    waiting: tuple[Stoppable, Any, rpc.OpenSessionResponse],
) -> None:
    server, call, _b = waiting
    server.stop()
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert _reason(caught.value) == ("DRAINING", True)
    assert 0.3 <= server.ended() < 20


PROCESS = """
import signal, threading
import deltaserve_server

stopping = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopping.set())
server = deltaserve_server.Server(deltaserve_server.ServerConfig(bind="127.0.0.1:0", device="cpu"))
server.start()
print(server.target, flush=True)
while not stopping.wait(0.2):  # the signal may wake another thread
    pass
server.stop(grace_seconds=30)
print("stopped", flush=True)
"""


@pytest.mark.deep
def test_a_process_that_stops_on_a_signal_finishes_its_open_round() -> None:
    command = [sys.executable, "-W", "error", "-c", PROCESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            target = process.stdout.readline().strip()
            with deltaserve.connect(target, timeout_seconds=30) as client, ThreadPoolExecutor(1) as thread:
                model = client.create_model("m", {"w": np.zeros(1, np.float32)}, policy=deltaserve.Sync())
                with model.worker("a") as a, model.worker("b") as b:
                    for worker in (a, b):
                        worker.pull()
                    first = thread.submit(a.step, {"w": np.ones(1, np.float32)})
                    while not any(session.waiting for session in model.info().sessions):
                        sleep(0.005)
                    process.send_signal(signal.SIGTERM)
                    b.step({"w": np.ones(1, np.float32)})
                    first.result()
                    assert a.last_result
                    assert a.last_result.contributors == 2
            output, _ = process.communicate(timeout=60)
            assert (process.returncode, output) == (0, "stopped\n")
        finally:
            process.kill()
