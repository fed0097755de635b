"""Streams and connections that no proper client makes: floods, endless uploads, garbage on the socket."""

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import grpc
import numpy as np
import pytest
from messages import creation, cut, floats, push
from wire import Wire, refusal, unchanged

from deltaserve.v1.common_pb2 import Chunk, ModelConfig, TensorSpec
from deltaserve.v1.model_service_pb2 import CreateModelRequest
from deltaserve.v1.worker_service_pb2 import StepRequest, StreamStepRequest
from deltaserve_server import LocalServer
from deltaserve_server.memory.host import HostStaging

SIZE = 1000
GARBAGE = {
    "nothing": b"",
    "noise": random.Random(1).randbytes(4096),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + bytes(200),
    "preface and noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.Random(2).randbytes(4096),
    "preface and a frame of 16 MiB": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(4096),
    "preface and many settings": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" * 5000,
    "half a preface": b"PRI * HTTP",
}


@pytest.fixture
def ready(wire: Wire) -> Wire:
    """A model with one push and a session."""
    wire.create("m", {"w": (SIZE,)})
    return wire


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_on_the_socket_disturbs_no_other_client(ready: Wire, server: LocalServer, kind: str) -> None:
    host, port = server.target.split(":")
    session = ready.open("m", "a")
    with unchanged(ready, "m"):
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(GARBAGE[kind])
                connection.settimeout(0.02)
                _drain(connection)
    assert ready.step(session.header(1), np.ones(SIZE)).result.version == 1


def _drain(connection: socket.socket) -> None:
    try:
        while connection.recv(65536):
            pass
    except OSError:
        pass


def test_silent_connections_disturb_no_other_client(ready: Wire, server: LocalServer) -> None:
    host, port = server.target.split(":")
    session = ready.open("m", "a")
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(200)]
    began = monotonic()
    ready.step(session.header(1), np.ones(SIZE))
    assert monotonic() - began < 5
    for connection in idle:
        connection.close()


def test_a_flood_of_chunks_after_the_end_is_cut_off(ready: Wire) -> None:
    session = ready.open("m", "a")
    flood = StreamStepRequest(gradient=Chunk(offset=SIZE, data=floats(np.ones(SIZE)))).SerializeToString()
    sent = 0

    def feed() -> Iterator[bytes]:
        nonlocal sent
        yield from push(session.header(1), cut(np.ones(SIZE)))
        for _ in range(1_000_000):
            sent += 1
            yield flood

    with unchanged(ready, "m"), pytest.raises(grpc.RpcError) as caught:
        list(ready.start("StreamStep", feed()))
    assert refusal(caught.value).reason == "CHUNK_SEQUENCE"
    assert sent < 100_000


def test_a_flood_of_weights_after_the_end_is_cut_off(wire: Wire) -> None:
    config, weights = creation("m", {"w": (SIZE,)})

    def feed() -> Iterator[bytes]:
        yield config.SerializeToString()
        for _ in range(1_000_000):
            yield weights.SerializeToString()

    with unchanged(wire), pytest.raises(grpc.RpcError) as caught:
        list(wire.start("CreateModel", feed()))
    assert refusal(caught.value).reason == "CHUNK_SEQUENCE"


def test_the_smallest_chunks_take_no_more_memory_than_the_largest() -> None:
    """A chunk of one element is one message; as a received message it would take a hundred times its bytes."""
    values = np.arange(10_000, dtype=np.float32)
    staging = HostStaging()
    for offset in (*range(9000), 9500):
        staging.add(offset, values[offset : offset + 1])
    assert len(staging.pieces) < 5
    assert np.array_equal(np.concatenate([piece for _, piece in staging.pieces]), [*values[:9000], 9500])
    assert [offset + piece.size for offset, piece in staging.pieces][-2:] == [9000, 9501]


def _resident_bytes() -> int:
    from deltaserve_server.optimizers import cpu, values  # noqa: F401  else the server's thread may load them meanwhile

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.deep
def test_a_compressed_message_over_the_limit_is_not_unpacked(ready: Wire, server: LocalServer) -> None:
    session = ready.open("m", "a")
    bomb = StepRequest(header=session.header(1), gradient=bytes(300 << 20)).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.target, options, compression=grpc.Compression.Gzip) as channel:
        step: Any = channel.unary_unary("/deltaserve.v1.WorkerService/Step")
        before = _resident_bytes()
        with unchanged(ready, "m"), pytest.raises(grpc.RpcError) as caught:
            step(bomb, timeout=100)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert _resident_bytes() - before < 100 << 20
        good = StepRequest(header=session.header(1), gradient=floats(np.ones(SIZE))).SerializeToString()
        assert step(good, timeout=100)
    assert ready.model("m").position.version == 1


@pytest.mark.deep
def test_a_million_empty_tensors_are_refused_and_a_hundred_thousand_work(wire: Wire) -> None:
    """A million do not fit into one message; a hundred thousand do."""
    specs = [TensorSpec(name=f"{number:x}", shape=[0]) for number in range(1_000_000)]
    with unchanged(wire), pytest.raises(grpc.RpcError) as caught:
        wire.call("CreateModel", CreateModelRequest(config=ModelConfig(name="m", tensors=specs)), seconds=100)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    config = ModelConfig(name="m", tensors=[*specs[:100_000], TensorSpec(name="real")])
    weights = CreateModelRequest(weights=Chunk(data=floats([1.0])))
    assert wire.one("CreateModel", CreateModelRequest(config=config), weights, seconds=100).created
    session = wire.open("m", "a")
    assert wire.step(session.header(1), [1.0], seconds=100).result.version == 1
    assert wire.step(session.header(2, absent_tensors=range(100_000)), [1.0], seconds=100).result.version == 2


def test_huge_shapes_are_refused_before_anything_is_allocated(wire: Wire) -> None:
    before = _resident_bytes()
    with unchanged(wire):
        for shape, reason in (
            ((1 << 40,), "MEMORY_BUDGET"),
            ((1 << 47,), "MEMORY_BUDGET"),
            ((1 << 48,), "SHAPE_INVALID"),
            (((1 << 63) - 1,), "SHAPE_INVALID"),
            (((1 << 63) - 1,) * 8, "SHAPE_INVALID"),
            ((1 << 32, 0, 1 << 32), "SHAPE_INVALID"),
            ((1,) * 2_000, "SHAPE_INVALID"),
        ):
            config = ModelConfig(name="m", tensors=[TensorSpec(name="w", shape=shape), TensorSpec(name="b")])
            assert wire.refused("CreateModel", CreateModelRequest(config=config)).reason == reason
    assert _resident_bytes() - before < 30 << 20


def test_a_header_that_claims_another_s_session_needs_its_id_and_epoch(ready: Wire) -> None:
    mine, other = ready.open("m", "mine"), ready.open("m", "other")
    gradient = floats(np.ones(SIZE))
    forged = mine.header(1)
    with unchanged(ready, "m"):
        for session_id, epoch, reason in (
            (bytes(16), 1, "SESSION_UNKNOWN"),
            (other.opened.session_id[:15], 1, "SESSION_UNKNOWN"),
            (other.opened.session_id + b"\0", 1, "SESSION_UNKNOWN"),
            (b"", 1, "SESSION_UNKNOWN"),
            (bytes(1 << 20), 1, "SESSION_UNKNOWN"),
            (other.opened.session_id, 2, "PUSH_INVALID"),
            (other.opened.session_id, 0, "PUSH_INVALID"),
        ):
            forged.session_id, forged.epoch = session_id, epoch
            assert ready.refused("Step", StepRequest(header=forged, gradient=gradient)).reason == reason


def test_streams_that_are_cut_anywhere_leave_nothing(ready: Wire) -> None:
    session = ready.open("m", "a")
    messages = list(push(session.header(1), cut(np.ones(SIZE), 50)))
    with unchanged(ready, "m"):
        for length in range(len(messages)):
            never = Event()

            def feed(length: int = length, never: Event = never) -> Iterator[bytes]:
                yield from messages[:length]
                never.wait(30)

            call = ready.start("StreamStep", feed())
            call.cancel()
            never.set()
    assert ready.step(session.header(1), np.ones(SIZE)).result.version == 1
