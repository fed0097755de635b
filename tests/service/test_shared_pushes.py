"""Pushes through shared memory have the same admission, results and bits as others."""

import gc
import os
import stat
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from attach import Sharer, free, mapped, open_memory, path
from expected import Twin, gradient, norm
from google.protobuf.message import Message
from messages import Vector, adadelta, asynchronous, bounded, cut, push, sync
from reused_server import ReusedServers
from wire import Snapshot, Wire, eventually, refusal, unchanged

from deltaserve.v1 import common_pb2
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve.v1.common_pb2 import Policy
from deltaserve_server import ServerConfig

SHAPES = {"a": (70_000, 4), "none": (0,), "b": (7, 101)}
SIZE = 280_707
"""Larger than a chunk, and not a multiple of one."""


@pytest.fixture
def tight(reused_servers: ReusedServers) -> Iterator[Wire]:
    """A server with room for a model of 1000 elements, the memory of one session, and 100 bytes."""
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", memory_bytes=7 * 4000 + 100, staged_bytes=4000)
    with reused_servers.serving(config) as server, Wire(server.target) as wire:
        yield wire


def test_only_the_owner_may_open_the_memory_and_names_are_unique(wire: Wire) -> None:
    wire.create("m", SHAPES)
    names = set()
    for number in range(20):
        sharer = Sharer(wire, "m", f"w{number}")
        names.add(sharer.memory.name)
        assert sharer.memory.bytes == 4 * SIZE
        assert not sharer.gradient.any()
        status = path(sharer.memory).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == os.geteuid()
    step = sharer.begin(1, gradient(1, SIZE))
    weights = step.answer().weights
    assert stat.S_IMODE(path(weights).stat().st_mode) == 0o600
    step.finish()
    names.add(weights.name)
    assert len(names) == 21
    assert all(len(name.removeprefix("deltaserve-")) == 32 for name in names), "16 bytes of chance each"


def test_memory_that_was_opened_is_opened_again_as_the_same(wire: Wire) -> None:
    wire.create("m")
    sharer, held = Sharer(wire, "m", "a"), free(wire)
    assert open_memory(wire, sharer.session) == sharer.memory
    assert free(wire) == held


def test_a_shared_push_equals_a_chunked_one(wire: Wire) -> None:
    twin = Twin(gradient(0, SIZE))
    wire.create("m", SHAPES, weights=twin.weights)
    sharer = Sharer(wire, "m", "a")
    for number in range(1, 5):
        pushed = gradient(number, SIZE)
        result, weights = sharer.step(number, pushed, base_version=number - 1)
        moved = twin.update(pushed)
        assert (result.version, result.duplicate, result.contributors, result.staleness) == (number, False, 1, 0)
        assert result.gradient_norm == pytest.approx(norm(pushed), rel=1e-12)
        assert result.update_norm == pytest.approx(moved, rel=1e-6)
        np.testing.assert_array_equal(weights, twin.weights)
    twin.check(wire.snapshot("m"))
    assert wire.snapshot("m").update_counts == (4, 4, 4)


POLICIES = {
    "async": asynchronous(),
    "damped": asynchronous(damping=True),
    "bounded": bounded(3),
    "sync": sync(3),
    "median": sync(3, reduction=common_pb2.REDUCTION_MEDIAN),
    "trimmed": sync(3, reduction=common_pb2.REDUCTION_TRIMMED_MEAN, trim=1),
    "clipped": sync(3, clip_norm=1.5),
}


def _trained(wire: Wire, name: str, policy: Policy, shared: tuple[bool, ...]) -> tuple[Snapshot, list[rpc.PushResult]]:
    """Trains with one worker for each of `shared`. Some steps have absent tensors or hyperparameters of their own."""
    wire.create(name, SHAPES, weights=gradient(0, SIZE), policy=policy)
    workers = [Sharer(wire, name, f"w{k}") for k in range(len(shared))]
    results = []
    for number in range(1, 4):
        calls = []
        own = [adadelta(lr=0.5, rho=0.8, weight_decay=0.01)] if number == 2 else []
        for k, worker in enumerate(workers):
            values = gradient(10 * k + number, SIZE)
            absent = [2] if (k, number) == (1, 3) else []
            header = worker.session.header(
                number, hyperparameters=own, absent_tensors=absent, weight=k + 0.5, base_version=_base(policy, number)
            )
            if shared[k]:
                header.shared_memory = True
                worker.gradient[:] = values
                calls.append(wire.start("StreamStep", [rpc.StreamStepRequest(header=header)]))
            else:
                calls.append(wire.start("StreamStep", push(header, _without(values, absent))))
            eventually(partial(_arrived, wire, header, calls[-1]), "it does not arrive")
        for call in calls:
            results.append(rpc.StreamStepResponse.FromString(next(call)).header.result)
            list(call)
    return wire.snapshot(name), results


def _base(policy: Policy, number: int) -> int:
    return number - 1 if policy.HasField("sync") else max(3 * number - 4, 0)


def _without(values: Vector, absent: list[int]) -> list[tuple[int, Vector]]:
    return [(at, part) for at, part in cut(values[:280_000] if absent else values) if part.size]


def _arrived(wire: Wire, header: rpc.PushHeader, call: Any) -> bool:
    if call.done():
        return True
    asked = rpc.KeepSessionRequest(model=header.model, session_id=header.session_id, epoch=header.epoch)
    return bool(wire.one("KeepSession", asked).last_accepted_sequence >= header.sequence)


@pytest.mark.parametrize("name", POLICIES)
def test_any_mixture_of_workers_gives_the_same_bits_and_results(wire: Wire, name: str) -> None:
    policy = POLICIES[name]
    (stream, expected), *others = (
        _trained(wire, f"m{k}", policy, shared)
        for k, shared in enumerate([(False,) * 3, (True,) * 3, (False, True, True), (True, False, False)])
    )
    assert stream.version == (3 if policy.HasField("sync") else 9)
    for state, results in others:
        assert (state.version, state.vectors, state.update_counts) == (
            stream.version,
            stream.vectors,
            stream.update_counts,
        )
        assert results == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
@pytest.mark.parametrize("place", [0, 262_143, 262_144, SIZE - 1])
def test_a_bad_value_is_refused_changes_nothing_and_leaves_the_number_free(
    wire: Wire, value: float, place: int
) -> None:
    wire.create("m", SHAPES)
    sharer = Sharer(wire, "m", "a")
    sharer.step(1, np.ones(SIZE))
    bad = np.ones(SIZE, np.float32)
    bad[place] = value
    with unchanged(wire, "m"), pytest.raises(grpc.RpcError) as caught:
        sharer.begin(2, bad).answer()
    refused = refusal(caught.value)
    assert refused.reason == ("VALUE_TOO_LARGE" if value == 1e20 else "VALUE_NOT_FINITE")
    tensor, index = ("a", place) if place < 280_000 else ("b", place - 280_000)
    assert refused.metadata == {"tensor": tensor, "index": str(index)}
    assert sharer.step(2, np.ones(SIZE))[0].version == 2


def test_absent_tensors_are_not_checked(wire: Wire) -> None:
    wire.create("m", {"a": (4,), "b": (3,)})
    sharer = Sharer(wire, "m", "a")
    pushed = np.ones(7, np.float32)
    pushed[4:] = np.nan
    result, weights = sharer.step(1, pushed, absent_tensors=[1])
    assert result.gradient_norm == pytest.approx(2.0)
    assert weights[:4].all()
    assert not weights[4:].any()


def test_a_duplicate_is_known_through_either_transport(wire: Wire) -> None:
    wire.create("m", SHAPES)
    sharer = Sharer(wire, "m", "a")
    pushed = gradient(1, SIZE)
    first, _ = sharer.step(1, pushed)
    again, weights = sharer.step(1, pushed)
    in_chunks = wire.stream_step(sharer.session.header(1), cut(pushed))
    assert again.duplicate
    assert in_chunks.result.duplicate
    first.duplicate = True
    assert again == in_chunks.result == first
    np.testing.assert_array_equal(in_chunks.weights, weights)
    with pytest.raises(grpc.RpcError) as caught:
        sharer.begin(1, gradient(2, SIZE)).answer()
    assert refusal(caught.value).reason == "SEQUENCE_REUSED"
    assert wire.snapshot("m").version == 1


def test_another_message_is_refused_and_the_version_given_back(wire: Wire) -> None:
    wire.create("m")
    sharer = Sharer(wire, "m", "a")
    chunk = rpc.StreamStepRequest(gradient=common_pb2.Chunk(offset=0, data=bytes(20)))
    held = free(wire)
    for number in range(1, 8):
        step = sharer.begin(number, np.ones(5), chunk)
        assert step.answer().result.version == number
        with pytest.raises(grpc.RpcError) as caught:
            step.finish()
        refused = refusal(caught.value)
        assert (refused.reason, refused.code) == ("MESSAGE_INVALID", grpc.StatusCode.INVALID_ARGUMENT)
    eventually(lambda: free(wire) == held, "a version is still held")
    assert wire.snapshot("m").version == 7


def test_a_call_that_never_half_closes_pins_its_version(wire: Wire) -> None:
    wire.create("m", {"w": (1000,)})
    sharer = Sharer(wire, "m", "a")
    other = wire.open("m", "b")
    held = free(wire)
    reading, seen = [], []
    for number in range(1, 8):
        reading.append(sharer.begin(number, np.full(1000, number)))
        weights = mapped(reading[-1].answer().weights)
        seen.append((weights, weights.copy()))
    assert free(wire) == held - 6 * 4000, "all but one of them are beyond the model's own memory"
    for number in range(1, 6):
        wire.step(other.header(number), gradient(number, 1000))
    assert len({before.tobytes() for _, before in seen}) == 7
    for weights, before in seen:
        np.testing.assert_array_equal(weights, before)
    for step in reading[::2]:
        step.cancel()
    for step in reading[1::2]:
        step.finish()
    eventually(lambda: free(wire) == held, "a version is still held")


def test_a_session_shares_memory_for_the_tensors_that_it_knows(wire: Wire) -> None:
    wire.create("m", {"a": (100,)})
    sharer = Sharer(wire, "m", "a")
    sharer.step(1, np.ones(100))
    header = _extension("m", 1, 50)
    wire.call("ExtendModel", *header)
    step = sharer.begin(2, np.ones(100))
    answer = step.answer()
    whole = mapped(answer.weights).copy()
    step.finish()
    newer = Sharer(wire, "m", "b")
    assert (sharer.memory.bytes, newer.memory.bytes, answer.weights.bytes) == (400, 600, 600)
    np.testing.assert_array_equal(whole, wire.snapshot("m").weights)
    result, weights = newer.step(1, np.ones(150))
    assert result.version == 3
    assert weights.size == 150


def _extension(model: str, count: int, size: int) -> list[Message]:
    from deltaserve.v1 import model_service_pb2 as models

    header = models.ExtendModelHeader(
        model=model, tensor_count=count, group_count=1, tensors=[common_pb2.TensorSpec(name="more", shape=[size])]
    )
    kind = models.ExtendModelRequest
    chunk = common_pb2.Chunk(offset=100, data=np.full(size, 3, "<f4").tobytes())
    return [kind(header=header), kind(weights=chunk)]


def test_shared_memory_over_the_budget_is_refused_and_the_session_continues(tight: Wire) -> None:
    tight.create("m", {"w": (1000,)})
    first, second = Sharer(tight, "m", "a"), tight.open("m", "b")
    assert free(tight) == 100
    refused = tight.refused("OpenSharedMemory", rpc.OpenSharedMemoryRequest(**second.id))
    assert free(tight) == 100
    assert (refused.reason, refused.metadata) == ("MEMORY_BUDGET", {"needed": "4000", "available": "100"})
    tight.close(first.session)
    eventually(lambda: free(tight) == 4100, "the memory does not come back")
    assert tight.stream_step(second.header(1), [(0, np.ones(1000))]).result.version == 1
    open_memory(tight, second)
    gc.collect()
    assert free(tight) == 100
