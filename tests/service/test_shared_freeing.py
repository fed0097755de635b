"""Shared memory is freed when a session is closed or fenced, a lease expires, or a model is deleted."""

import gc
from collections.abc import Callable, Iterator
from time import monotonic, sleep

import numpy as np
import pytest
from attach import Sharer, descriptors, free, mapped, path
from expected import Twin, gradient, weighted_sum
from messages import sync
from wire import Wire, eventually, streamed

from deltaserve.v1 import worker_service_pb2 as rpc

SIZE = 5000
BYTES = 4 * SIZE


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """Memory must not wait for the cyclic garbage collector, which may run much later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _closed(wire: Wire, sharer: Sharer) -> None:
    wire.close(sharer.session)


def _taken_over(wire: Wire, sharer: Sharer) -> None:
    wire.open("m", "a")


def _deleted(wire: Wire, _: Sharer) -> None:
    wire.delete("m")
    wire.create("m", {"w": (SIZE,)})


@pytest.mark.parametrize("end", [_closed, _taken_over, _deleted])
def test_shared_memory_is_freed_when_a_session_ends(wire: Wire, end: Callable[[Wire, Sharer], None]) -> None:
    wire.create("m", {"w": (SIZE,)})
    before = free(wire)
    sharer = Sharer(wire, "m", "a")
    sharer.step(1, np.ones(SIZE))
    with pytest.raises(Exception, match="NaN"):
        sharer.step(2, np.full(SIZE, np.nan))
    assert free(wire) == before - BYTES
    end(wire, sharer)
    eventually(lambda: free(wire) == before, "its memory is still held")  # a lease lasts longer
    assert not _holds(sharer)
    sharer.gradient[:] = 1  # the worker's own mapping stays


@pytest.mark.deep
def test_shared_memory_is_freed_when_the_lease_expires(wire: Wire) -> None:
    wire.create("m", {"w": (SIZE,)})
    before = free(wire)
    began = monotonic()
    sharer = Sharer(wire, "m", "a", lease_seconds=5.0)
    sharer.step(1, np.ones(SIZE))
    eventually(lambda: free(wire) == before, "its memory is still held")
    assert monotonic() - began > 5.0
    assert not _holds(sharer)


def _holds(sharer: Sharer) -> bool:
    try:
        return sharer.memory.name in str(path(sharer.memory).readlink())
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["closed", "taken over", pytest.param("lease", marks=pytest.mark.deep)])
def test_a_waiting_shared_push_outlives_its_session(wire: Wire, end: str) -> None:
    wire.create("m", {"w": (SIZE,)}, policy=sync(2))
    before = free(wire)
    sharer = Sharer(wire, "m", "a", lease_seconds=4.0)
    other = wire.open("m", "b")
    pushed = gradient(1, SIZE), gradient(2, SIZE)
    step = sharer.begin(1, pushed[0])
    eventually(lambda: wire.waiting("m") == {"a"}, "the push does not wait")
    step.cancel()
    if end == "closed":
        wire.close(sharer.session)
    elif end == "taken over":
        wire.open("m", "a")
    eventually(lambda: free(wire) == before - BYTES, "the session's memory is gone, the staged copy is not")
    sharer.gradient[:] = np.nan
    if end == "taken over":
        assert wire.fate(sharer.session, 1).state == rpc.PUSH_STATE_WAITING
    answer = streamed(wire.begin(other.header(1), pushed[1]))
    assert answer.result.contributors == 2
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(weighted_sum(pushed, (1.0, 1.0)), 2.0)
    twin.check(wire.snapshot("m"))
    eventually(lambda: free(wire) == before, "memory is still held")


@pytest.mark.deep
def test_hundreds_of_sessions_leak_no_descriptor_and_no_byte(wire: Wire) -> None:
    wire.create("m", {"w": (SIZE,)})
    Sharer(wire, "m", "first").step(1, np.ones(SIZE))
    sleep(0.6)
    before, held = descriptors(), free(wire)
    for number in range(200):
        sharer = Sharer(wire, "m", f"w{number % 7}")
        sharer.step(1, np.full(SIZE, number))
        if number % 3:
            wire.close(sharer.session)
        del sharer
    for number in range(7):
        wire.close(wire.open("m", f"w{number}"))
    eventually(lambda: free(wire) == held, "memory is still held")
    eventually(lambda: descriptors() <= before + 4, f"{descriptors() - before} descriptors are lost")


@pytest.mark.deep
def test_created_and_deleted_models_leak_no_descriptor_and_no_byte(wire: Wire) -> None:
    before, held = descriptors(), free(wire)
    for number in range(40):
        wire.create("m", {"w": (SIZE,)})
        sharer = Sharer(wire, "m", "a")
        reading = sharer.begin(1, np.ones(SIZE))
        weights = mapped(reading.answer().weights)
        seen = weights.copy()
        wire.delete("m")
        np.testing.assert_array_equal(weights, seen)
        reading.finish()
        assert number < 1 or descriptors() < before + 40
        del sharer, weights, reading
    eventually(lambda: free(wire) == held, "memory is still held")
    eventually(lambda: descriptors() <= before + 4, f"{descriptors() - before} descriptors are lost")
