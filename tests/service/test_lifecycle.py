"""Models: create, join, list, delete. Health and reflection."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, Event
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from messages import adadelta, creation, cut, push, sync
from wire import METHODS, SERVICES, Wire, eventually, refusal, unchanged

from deltaserve._common.optimizer_messages import to_message
from deltaserve._common.optimizers import SGD, Adam
from deltaserve.v1.common_pb2 import ModelConfig
from deltaserve.v1.model_service_pb2 import CreateModelRequest
from deltaserve.v1.worker_service_pb2 import PullRequest
from deltaserve_server import LocalServer, ServerConfig, app
from deltaserve_server.service.push_handler import PushHandler

SERVING = health_pb2.HealthCheckResponse.SERVING


def _health(wire: Wire, name: str) -> object:
    stub = health_pb2_grpc.HealthStub(wire.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status


def test_models_with_one_structure_load_its_kernels_once(
    own_wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While kernels compile, thousands of new models would otherwise each have a thread that waits for them."""

    def wait_for_kernels() -> None:
        for thread in threading.enumerate():
            if thread.name == "kernels":
                thread.join()

    wait_for_kernels()  # of earlier tests
    monkeypatch.setattr(app, "_kernels_loaded", set())
    caplog.set_level(logging.INFO)
    for number, optimizer in enumerate((SGD(), SGD(lr=0.5), Adam(), SGD())):
        own_wire.create(f"m{number}", {"w": (3,)}, groups=[to_message(optimizer)])
    wait_for_kernels()
    loaded = [message.split()[2] for message in caplog.messages if message.startswith("kernels of ")]
    assert sorted(loaded) == ["adam", "sgd"]


def test_a_model_is_created_with_every_default_filled_in(wire: Wire) -> None:
    answer = wire.create("m", {"w": (2, 3), "e": (0,), "s": ()}, weights=np.arange(7))
    assert (answer.created, answer.position.version) == (True, 0)
    assert answer.position.incarnation == wire.info().incarnation
    assert not answer.position.HasField("durable_version")
    config = wire.model("m").config
    assert [(t.name, tuple(t.shape), t.group, t.data_type) for t in config.tensors] == [
        ("w", (2, 3), 0, 1),
        ("e", (0,), 0, 1),
        ("s", (), 0, 1),
    ]
    default = adadelta(lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False)
    assert list(config.groups) == [default]
    assert config.policy.WhichOneof("policy") == "async"
    state = wire.snapshot("m")
    assert np.array_equal(state.weights, np.arange(7, dtype=np.float32))
    assert state.slots == ("square_avg", "acc_delta")
    assert not any(vector.any() for vector in state.arrays[1:])
    assert state.update_counts == (0, 0, 0)


def test_creating_a_model_again_joins_it_and_keeps_its_weights(wire: Wire) -> None:
    wire.create("m", weights=np.arange(5), policy=sync(2))
    with unchanged(wire, "m"):
        joined = wire.create("m", weights=np.full(5, 9.0), groups=[adadelta(lr=1.0)], policy=sync(2))
        assert not joined.created
        without_weights = wire.one("CreateModel", creation("m", policy=sync(2))[0])
        assert not without_weights.created


def test_joining_reads_no_weights(wire: Wire) -> None:
    """A worker that joins gets its answer at once, even while it still sends weights."""
    wire.create("m")
    never = Event()

    def feed() -> Iterator[bytes]:
        yield creation("m")[0].SerializeToString()
        never.wait(30)

    (answer,) = list(wire.start("CreateModel", feed()))
    never.set()
    assert answer


@pytest.mark.parametrize("limit", [1, 64])
def test_concurrent_creations_of_one_model_agree(limit: int) -> None:
    with (
        LocalServer(ServerConfig(bind="127.0.0.1:0", device="cpu", models=limit)) as server,
        Wire(server.target) as wire,
    ):
        available = wire.info().limits.memory_available_bytes
        for round_number in range(20):
            barrier = Barrier(4)

            def feed(value: float, barrier: Barrier = barrier) -> Iterator[bytes]:
                config, weights = creation("m", weights=np.full(5, value))
                yield config.SerializeToString()
                barrier.wait(10)
                yield weights.SerializeToString()

            with ThreadPoolExecutor(4) as threads:
                answers = list(threads.map(lambda value: list(wire.start("CreateModel", feed(value))), range(4)))
            assert all(len(answer) == 1 for answer in answers), round_number
            assert len(set(wire.snapshot("m").weights)) == 1
            wire.delete("m")
            eventually(lambda: wire.info().limits.memory_available_bytes == available, "a creation is still held")


def test_half_a_creation_leaves_nothing(wire: Wire) -> None:
    stop = Event()

    def feed() -> Iterator[bytes]:
        yield from (message.SerializeToString() for message in creation("m", {"w": (500_000,)})[:2])
        stop.wait(30)

    with unchanged(wire):
        call = wire.start("CreateModel", feed())
        eventually(lambda: wire.info().limits.memory_available_bytes < wire.info().limits.memory_bytes, "no upload")
        call.cancel()
        stop.set()
    assert wire.create("m").created


def test_models_are_listed_by_name(wire: Wire) -> None:
    wire.create("z", {"w": (2, 2), "b": ()})
    wire.create("a", policy=sync(3))
    session = wire.open("z", "w")
    wire.step(session.header(1), np.ones(5))
    first, last = wire.models()
    assert (first.name, first.policy.sync.min_workers, first.session_count) == ("a", 3, 0)
    assert (last.name, last.element_count, last.tensor_count, last.session_count) == ("z", 5, 2, 1)
    assert last.position.version == 1


def test_a_deleted_model_loses_its_sessions_and_can_be_created_anew(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.step(session.header(1), np.ones(5))
    with unchanged(wire):
        wire.create("other")
        wire.delete("other")
    wire.delete("m")
    assert not wire.models()
    assert wire.create("m", weights=np.ones(5)).position.version == 0
    assert not wire.model("m").sessions
    assert wire.open("m", "a").opened.epoch == 1


def test_a_push_in_flight_is_refused_when_its_model_is_deleted(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    available = wire.info().limits.memory_bytes

    def feed() -> Iterator[bytes]:
        header, *chunks = push(session.header(1), cut(np.ones(5), 2))
        yield from (header, chunks[0])
        wire.delete("m")
        yield from chunks[1:]

    with pytest.raises(grpc.RpcError) as caught:
        list(wire.start("StreamStep", feed()))
    assert refusal(caught.value).reason == "MODEL_NOT_FOUND"
    eventually(lambda: wire.info().limits.memory_available_bytes == available, "the push is still held")


def test_a_push_that_was_applied_is_answered_though_the_server_stops_before_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied, stopped, really_wait = Event(), Event(), PushHandler._wait

    def wait(*given: Any) -> Any:
        result = really_wait(*given)
        applied.set()
        assert stopped.wait(20)
        return result

    with LocalServer() as server, Wire(server.target) as wire, ThreadPoolExecutor(1) as threads:
        wire.create("m")
        monkeypatch.setattr(PushHandler, "_wait", wait)
        step = threads.submit(wire.step, wire.open("m", "a").header(1), np.ones(5))
        assert applied.wait(20)
        really_stop = server._catalog.stop

        def stop() -> bool:
            kept = really_stop()
            stopped.set()
            return kept

        monkeypatch.setattr(server._catalog, "stop", stop)
        server.stop(20)
        assert step.result().result.version == 1


def test_extended_models_are_not_joined_by_their_old_layout(wire: Wire) -> None:
    wire.create("m")
    config = ModelConfig()
    config.CopyFrom(wire.model("m").config)
    del config.tensors[1:]
    assert wire.refused("CreateModel", CreateModelRequest(config=config)).reason == "MODEL_MISMATCH"


def test_health_tells_of_the_server_each_service_and_each_model(wire: Wire) -> None:
    for name in ("", *SERVICES):
        assert _health(wire, name) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        _health(wire, "healthy")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    wire.create("healthy")
    assert _health(wire, "healthy") == SERVING
    wire.delete("healthy")
    assert _health(wire, "healthy") == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_a_model_of_a_service_s_name_does_not_speak_for_the_service(wire: Wire) -> None:
    for name in SERVICES:
        wire.create(name)
        wire.delete(name)
        assert _health(wire, name) == SERVING


def test_reflection_lists_the_services_and_has_their_files(wire: Wire) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=10)
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    for name in SERVICES:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=10)
        assert answer.file_descriptor_response.file_descriptor_proto


def test_every_rpc_of_the_proto_is_served(wire: Wire) -> None:
    for name in METHODS:
        call = wire.start(name, [b""], seconds=10)
        with suppress(grpc.RpcError):
            list(call)
        assert call.code() is not grpc.StatusCode.UNIMPLEMENTED, name


def test_a_call_to_a_server_that_is_busy_with_waiting_pulls_is_answered(wire: Wire) -> None:
    wire.create("m")
    calls = [wire.start("Pull", [PullRequest(model="m", wait_for_version=1)]) for _ in range(100)]
    assert wire.info().version
    for call in calls:
        call.cancel()
