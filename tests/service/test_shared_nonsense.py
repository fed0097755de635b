"""Invalid, excessive and cancelled calls about shared memory are refused as documented and leak nothing."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from attach import Sharer, descriptors, free, open_memory, path
from reused_server import ReusedServers
from wire import Wire, eventually, refusal, unchanged

from deltaserve.v1 import worker_service_pb2 as rpc

SIZE = 5000


@pytest.fixture
def sharer(wire: Wire) -> Sharer:
    """A worker of model "m"."""
    wire.create("m", {"w": (SIZE,)})
    return Sharer(wire, "m", "a")


def test_shared_memory_is_not_for_step(wire: Wire, sharer: Sharer) -> None:
    header = sharer.session.header(1, shared_memory=True)
    with unchanged(wire, "m"):
        refused = wire.refused("Step", rpc.StepRequest(header=header, gradient=bytes(4 * SIZE)))
    assert (refused.reason, refused.fields) == ("PUSH_INVALID", ("shared_memory",))
    sharer.step(1, np.ones(SIZE))


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_push_in_memory_that_was_never_opened(wire: Wire, sharer: Sharer, name: str) -> None:
    held = free(wire)
    session = wire.open("m", name)
    if name == "a":  # an older session of this name had some, which the next tick gives back
        eventually(lambda: free(wire) > held, "the older session's memory is still held")
    message = rpc.StreamStepRequest(header=session.header(1, shared_memory=True))
    with unchanged(wire, "m"):
        assert wire.refused("StreamStep", message).reason == "SHARED_MEMORY_UNAVAILABLE"


def test_opening_under_false_names(wire: Wire, sharer: Sharer) -> None:
    wire.create("n", {"w": (SIZE,)})
    good: dict[str, Any] = sharer.session.id
    kind = rpc.OpenSharedMemoryRequest
    with unchanged(wire, "m", "n"):
        for bad, reason in (
            ({"session_id": b""}, "SESSION_UNKNOWN"),
            ({"session_id": bytes(16)}, "SESSION_UNKNOWN"),
            ({"session_id": bytes(1 << 20)}, "SESSION_UNKNOWN"),
            ({"epoch": 0}, "PUSH_INVALID"),
            ({"epoch": (1 << 64) - 1}, "PUSH_INVALID"),
            ({"model": "n"}, "SESSION_UNKNOWN"),
            ({"model": "../m"}, "MODEL_NOT_FOUND"),
        ):
            assert wire.refused("OpenSharedMemory", kind(**(good | bad))).reason == reason
        assert wire.refused("OpenSharedMemory", b"\xff\xff").reason == "MESSAGE_INVALID"
    newer = wire.open("m", "a")
    assert wire.refused("OpenSharedMemory", kind(**good)).reason == "SESSION_FENCED"
    wire.close(newer)
    assert wire.refused("OpenSharedMemory", kind(**newer.id)).reason == "SESSION_UNKNOWN"


def test_hundreds_of_openings_of_one_session_take_no_more_than_one(wire: Wire, sharer: Sharer) -> None:
    before, held = descriptors(), free(wire)
    for _ in range(200):
        open_memory(wire, sharer.session)
    assert descriptors() <= before + 2
    assert free(wire) == held


def test_many_openings_at_once_are_of_one_memory(wire: Wire) -> None:
    wire.create("m", {"w": (SIZE,)})
    session = wire.open("m", "a")
    held, before = free(wire), descriptors()
    calls = [wire.start("OpenSharedMemory", [rpc.OpenSharedMemoryRequest(**session.id)]) for _ in range(100)]
    names = {rpc.OpenSharedMemoryResponse.FromString(next(call)).gradient.name for call in calls}
    assert len(names) == 1
    assert free(wire) == held - 4 * SIZE
    eventually(lambda: descriptors() <= before + 4, "descriptors are lost")


@pytest.fixture
def without_files(reused_servers: ReusedServers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A server on a system that has no file descriptors left."""

    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with reused_servers.serving() as server, Wire(server.target) as wire:
        wire.create("m", {"w": (SIZE,)})
        monkeypatch.setattr(os, "memfd_create", full)
        yield wire


def test_chunks_work_where_the_system_has_no_memory_files(without_files: Wire) -> None:
    session = without_files.open("m", "a")
    with unchanged(without_files, "m"):
        refused = without_files.refused("OpenSharedMemory", rpc.OpenSharedMemoryRequest(**session.id))
    assert refused.reason == "SHARED_MEMORY_UNAVAILABLE"
    assert refused.metadata == {"why": "Too many open files"}
    assert without_files.step(session.header(1), np.ones(SIZE)).result.version == 1


def test_weights_come_in_chunks_once_descriptors_run_out(own_wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own server: pytest keeps the logged error, whose frames keep a version's memory, until the test is over.
    own_wire.create("m", {"w": (SIZE,)})
    sharer, reading = Sharer(own_wire, "m", "a"), []
    for number in range(1, 4):
        reading.append(sharer.begin(number, np.ones(SIZE)))
        reading[-1].answer()

    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", full)
    step = sharer.begin(4, np.ones(SIZE))
    answer = step.answer()
    assert not answer.HasField("weights")
    data = b"".join(message.weights.data for message in step.finish())
    assert data == own_wire.snapshot("m").vectors[0]
    for earlier in reading:
        earlier.finish()


def test_a_descriptor_that_was_closed_is_never_another_memory_of_that_name(wire: Wire) -> None:
    """The system reuses descriptor numbers at once, so the client must check the name."""
    wire.create("m", {"w": (SIZE,)})
    seen: dict[tuple[int, str], int] = {}
    for _ in range(10):
        sharer = Sharer(wire, "m", "a")
        seen[sharer.memory.file_descriptor, sharer.memory.name] = 1
        wire.close(sharer.session)
        eventually(partial(_is_gone, sharer.memory), "it is still there")
    assert len(seen) == len({name for _, name in seen}) == 10
    assert len({descriptor for descriptor, _ in seen}) < 10, "numbers were used again"


def _is_gone(memory: rpc.SharedMemory) -> bool:
    try:
        return memory.name not in str(path(memory).readlink())
    except FileNotFoundError:
        return True


def test_floods_of_calls_that_are_cut_leave_nothing(wire: Wire, sharer: Sharer) -> None:
    held, before = free(wire), descriptors()
    number = 1
    for k in range(60):
        step = sharer.begin(number, np.full(SIZE, k + 1.0))
        if k % 3:
            step.cancel()
        else:
            step.answer()
            step.cancel()
        number = wire.keep(sharer.session).last_accepted_sequence + 1
        if wire.fate(sharer.session, number - 1).state == rpc.PUSH_STATE_WAITING:
            pytest.fail("nothing waits under AsyncPolicy")
        eventually(step.call.done, "the call does not end")
        _flush(wire, sharer)
        number = wire.keep(sharer.session).last_accepted_sequence + 1
    eventually(lambda: free(wire) == held, "memory is still held")
    eventually(lambda: descriptors() <= before + 8, "descriptors are lost")
    assert sharer.step(number, np.ones(SIZE))[0].version == number


def _flush(wire: Wire, sharer: Sharer) -> None:
    """Waits until a cancelled call has ended on the server too: it may still hold the next sequence number."""
    with pytest.raises(grpc.RpcError) as caught:
        sharer.begin(1 << 40, None).answer()
    assert refusal(caught.value).reason == "SEQUENCE_GAP"
