"""Limits: they hold, GetServerInfo reports them, and memory is given back."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from messages import creation, cut, push, sync
from reused_server import ReusedServers
from wire import Session, Wire, eventually, refusal, unchanged

from deltaserve.v1.model_service_pb2 import PullStateRequest
from deltaserve.v1.worker_service_pb2 import PullRequest, StepRequest
from deltaserve_server import LocalServer, ServerConfig

SIZE = 1000
SMALL = ServerConfig(
    bind="127.0.0.1:0",
    device="cpu",
    threads=1,
    memory_bytes=200_000,
    staged_bytes=50_000,
    message_bytes=100_000,
    models=4,
    sessions=5,
    lease_seconds=7.0,
    lease_seconds_min=2.0,
    lease_seconds_max=60.0,
)


@pytest.fixture
def small(reused_servers: ReusedServers) -> Iterator[Wire]:
    """A server whose limits are near."""
    with reused_servers.serving(SMALL) as server, Wire(server.target) as wire:
        yield wire


def _free(wire: Wire) -> int:
    return wire.info().limits.memory_available_bytes


def test_the_server_tells_its_limits(small: Wire) -> None:
    limits = small.info().limits
    assert limits.message_bytes == 100_000
    assert (limits.models, limits.sessions) == (4, 5)
    assert (limits.memory_bytes, limits.memory_available_bytes, limits.staged_bytes) == (200_000, 200_000, 50_000)
    leases = (limits.lease_seconds_min, limits.lease_seconds_default, limits.lease_seconds_max)
    assert leases == (2.0, 7.0, 60.0)


def test_a_lease_is_the_default_or_within_the_limits(small: Wire) -> None:
    small.create("m")
    assert small.open("m", "a").opened.lease_seconds == 7.0
    assert small.open("m", "b", lease_seconds=2.0).opened.lease_seconds == 2.0
    assert small.open("m", "c", lease_seconds=60.0).opened.lease_seconds == 60.0
    assert 40.0 < small.model("m").sessions[2].lease_left_seconds <= 60.0


def test_a_message_over_the_limit_ends_its_call_and_changes_nothing(small: Wire) -> None:
    small.create("m", {"w": (SIZE,)})
    session = small.open("m", "a")
    too_large = StepRequest(header=session.header(1), gradient=bytes(101_000))
    with unchanged(small, "m"):
        for method in ("Step", "GetModel", "StreamStep", "CreateModel"):
            with pytest.raises(grpc.RpcError) as caught:
                small.call(method, too_large)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert small.step(session.header(1), np.ones(SIZE)).result.version == 1


def test_the_number_of_sessions_is_over_all_models_and_a_worker_may_take_over_its_own(small: Wire) -> None:
    small.create("m")
    small.create("n")
    held = [small.open("mn"[k % 2], f"w{k}") for k in range(5)]
    for model in ("m", "n"):
        with pytest.raises(grpc.RpcError):
            small.open(model, "late")
    assert small.open("m", "w0").opened.epoch == 2
    small.close(held[1])
    assert small.open("m", "late").opened.rank == 3
    small.delete("n")
    small.open("m", "more")


def test_models_take_memory_up_to_the_budget_and_give_it_back(small: Wire) -> None:
    with unchanged(small):
        for name in ("m", "n"):
            before = _free(small)
            small.create(name, {"w": (4 * SIZE,)})
            assert _free(small) == before - 6 * 4 * 4 * SIZE
        with pytest.raises(grpc.RpcError) as caught:
            small.create("o", {"w": (4 * SIZE,)})
        refused = refusal(caught.value)
        assert refused.metadata == {"needed": "96000", "available": "8000"}
        assert refused.retry_seconds is not None
        small.delete("m")
        small.create("o", {"w": (4 * SIZE,)})
        small.delete("n")
        small.delete("o")


def test_waiting_pushes_take_staged_memory_until_they_are_reduced(small: Wire) -> None:
    small.create("m", {"w": (SIZE,)}, policy=sync(3))
    a, b, c = (small.open("m", name) for name in "abc")
    free = _free(small)
    calls = [small.begin(c.header(1), np.ones(SIZE))]
    eventually(lambda: _free(small) == free - 4 * SIZE, "the push is not counted")
    calls.append(small.begin(a.header(1), np.ones(SIZE)))
    eventually(lambda: _free(small) == free - 8 * SIZE, "the push is not counted")
    small.step(b.header(1), np.ones(SIZE))
    eventually(lambda: _free(small) == free, "something is still held")
    assert all(list(call) for call in calls)


def test_a_push_is_answered_where_no_memory_is_left(small: Wire) -> None:
    small.create("m", {"w": (8_000,)})
    session = small.open("m", "a")
    small.create("n", {"w": (_free(small) // 24,)})
    assert _free(small) < 24
    answer = small.one("Step", StepRequest(header=session.header(1, absent_tensors=[0])))
    assert answer.result.version == 1
    assert (
        small.refused("Step", StepRequest(header=session.header(2), gradient=bytes(32_000))).reason == "MEMORY_BUDGET"
    )


class Mixture:
    """Makes good, bad and cancelled calls at random."""

    def __init__(self, wire: Wire, seed: int) -> None:
        self._wire = wire
        self._random = random.Random(seed)
        self._name = f"w{seed}"
        self._sequences: dict[str, tuple[Session, int]] = {}

    def run(self, calls: int) -> None:
        """Makes this many calls."""
        actions = (self._step, self._step, self._stream, self._cut, self._pull, self._create, self._put, self._open)
        for _ in range(calls):
            try:
                self._random.choice(actions)()
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                    raise

    def _open(self, model: str | None = None) -> tuple[Session, int]:
        name = model or self._random.choice(("fast", "slow"))
        self._sequences[name] = self._wire.open(name, self._name), 1
        return self._sequences[name]

    def _next(self, model: str) -> tuple[Session, int]:
        return self._sequences.get(model) or self._open(model)

    def _gradient(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        gradient = np.ones(SIZE + self._random.choice((0, 0, 0, 1, -1)))
        gradient[self._random.randrange(SIZE - 1)] = self._random.choice((1.0, 1.0, np.nan, 1e30))
        return gradient

    def _step(self) -> None:
        model = self._random.choice(("fast", "fast", "slow"))
        session, number = self._next(model)
        self._wire.step(session.header(number), self._gradient(), seconds=self._random.choice((0.02, 0.2)))
        self._sequences[model] = session, number + 1

    def _stream(self) -> None:
        session, number = self._next("fast")
        self._wire.stream_step(session.header(number), cut(self._gradient(), self._random.choice((100, 1000))))
        self._sequences["fast"] = session, number + 1

    def _cut(self) -> None:
        session, number = self._next("fast")
        messages = list(push(session.header(number), cut(np.ones(SIZE), 100)))
        call = self._wire.start("StreamStep", messages[: self._random.randrange(len(messages))])
        if self._random.random() < 0.7:
            call.cancel()
        list(call)

    def _pull(self) -> None:
        requests: list[tuple[str, Message]] = [
            ("Pull", PullRequest(model="fast")),
            ("Pull", PullRequest(model="fast", wait_for_version=1 << 40)),
            ("PullState", PullStateRequest(model="slow", optimizer_state=True)),
        ]
        method, request = self._random.choice(requests)
        call = self._wire.start(method, [request], seconds=5.0)
        if request.ByteSize() > 12 or self._random.random() < 0.5:
            call.cancel()
        list(call)

    def _create(self) -> None:
        name = f"new-{self._name}"
        weights = np.full(SIZE, self._random.choice((1.0, np.nan)))
        messages = creation(name, {"w": (SIZE,)}, weights=weights)[: self._random.choice((1, 2, 2))]
        call = self._wire.start("CreateModel", messages)
        if self._random.random() < 0.3:
            call.cancel()
        list(call)
        self._wire.delete(name)

    def _put(self) -> None:
        self._wire.put("fast", [np.zeros(SIZE)] * self._random.choice((2, 3, 3, 4)))


@pytest.mark.deep
def test_hundreds_of_good_bad_and_cancelled_calls_leak_no_memory() -> None:
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", memory_bytes=400_000, lease_seconds=1.0)
    with LocalServer(config) as server, Wire(server.target) as wire:
        for _ in range(2):
            wire.create("fast", {"w": (SIZE,)})
            wire.create("slow", {"w": (SIZE,)}, policy=sync(2))
            with ThreadPoolExecutor() as threads:
                list(threads.map(lambda seed: Mixture(wire, seed).run(120), range(4)))
            for model in wire.models():
                wire.delete(model.name)
            eventually(lambda: _free(wire) == 400_000, "something is still held")
