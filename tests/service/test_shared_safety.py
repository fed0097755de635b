"""What a worker cannot do to the server through the memory that they share, though it is the same user."""

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from attach import Sharer, mapped, path
from expected import Twin, gradient, weighted_sum
from messages import sync
from wire import Wire, eventually, refusal, streamed

from deltaserve_server.service import admission, push_handler

SIZE = 5000


@pytest.fixture
def sharer(wire: Wire) -> Sharer:
    """A worker of model "m"."""
    wire.create("m", {"w": (SIZE,)})
    return Sharer(wire, "m", "a")


def _attempts(descriptor: int) -> dict[str, Callable[[], object]]:
    """What would alter a file, or its size."""
    libc = ctypes.CDLL(None, use_errno=True)

    def punch() -> None:
        keep_size_punch_hole = 1 | 2
        if libc.fallocate(descriptor, keep_size_punch_hole, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")

    return {
        "write": lambda: os.write(descriptor, b"x"),
        "write at": lambda: os.pwrite(descriptor, b"x", 4),
        "map for writing": lambda: mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "cut a hole": punch,
        "truncate": lambda: os.ftruncate(descriptor, 0),
        "cut short": lambda: os.ftruncate(descriptor, 4 * SIZE - 1),
        "grow": lambda: os.ftruncate(descriptor, 8 * SIZE),
        "allocate beyond": lambda: os.posix_fallocate(descriptor, 0, 8 * SIZE),
        "take the seals off": lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    }


RESIZING = ("truncate", "cut short", "grow", "allocate beyond", "take the seals off")


@pytest.mark.parametrize("what", _attempts(0))
def test_weights_cannot_be_altered(wire: Wire, sharer: Sharer, what: str) -> None:
    step = sharer.begin(1, np.ones(SIZE))
    weights = step.answer().weights
    before = mapped(weights).copy()
    try:
        descriptor = os.open(path(weights), os.O_RDWR)
    except PermissionError:
        return
    try:
        with pytest.raises(PermissionError):
            _attempts(descriptor)[what]()
    finally:
        os.close(descriptor)
    np.testing.assert_array_equal(mapped(weights), before)
    step.finish()


def test_a_mapping_of_weights_cannot_be_made_writable(sharer: Sharer) -> None:
    step = sharer.begin(1, np.ones(SIZE))
    weights = step.answer().weights
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (os.O_RDONLY, os.O_RDWR):
        descriptor = os.open(path(weights), flags)
        mapping = mmap.mmap(descriptor, 4 * SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        os.close(descriptor)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        assert libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    step.finish()


@pytest.mark.parametrize("what", RESIZING)
def test_the_gradients_memory_keeps_its_size(wire: Wire, sharer: Sharer, what: str) -> None:
    """Else the server's next look at it would be its end: SIGBUS."""
    descriptor = os.open(path(sharer.memory), os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            _attempts(descriptor)[what]()
    finally:
        os.close(descriptor)
    assert sharer.step(1, np.ones(SIZE))[0].version == 1


def test_a_hole_in_the_gradient_is_zeros(wire: Wire, sharer: Sharer) -> None:
    sharer.gradient[:] = 1
    descriptor = os.open(path(sharer.memory), os.O_RDWR)
    _attempts(descriptor)["cut a hole"]()
    os.close(descriptor)
    result, _ = sharer.step(1, None)
    assert result.gradient_norm == pytest.approx((SIZE - 1024) ** 0.5)


def test_changing_a_gradient_that_waits_in_its_round_has_no_effect(wire: Wire) -> None:
    wire.create("m", {"w": (SIZE,)}, policy=sync(2))
    sharer, other = Sharer(wire, "m", "a"), wire.open("m", "b")
    pushed = gradient(1, SIZE), gradient(2, SIZE)
    step = sharer.begin(1, pushed[0])
    eventually(lambda: wire.waiting("m") == {"a"}, "the push does not wait")
    sharer.gradient[:] = np.nan
    call = wire.begin(other.header(1), pushed[1])
    assert step.answer().result.contributors == 2
    step.finish()
    streamed(call)
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(weighted_sum(pushed, (1.0, 1.0)), 2.0)
    twin.check(wire.snapshot("m"))


@pytest.fixture
def altered_after_inspection(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sharer, float], None]:
    """Has a worker write another value over all its gradient, right after the server has found it good."""

    def arrange(sharer: Sharer, value: float) -> None:
        def reached(name: str) -> None:
            if name == "push.admitted":
                sharer.gradient[:] = value

        monkeypatch.setattr(admission, "failpoint", reached)

    return arrange


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_changing_a_gradient_after_its_check_leaves_the_state_finite(
    wire: Wire, sharer: Sharer, altered_after_inspection: Callable[[Sharer, float], None], value: float
) -> None:
    altered_after_inspection(sharer, value)
    sharer.step(1, np.ones(SIZE))
    state = wire.snapshot("m")
    for vector in state.arrays:
        assert np.isfinite(vector).all()


def test_a_push_in_place_does_not_start_to_wait_when_the_policy_changes(
    wire: Wire, sharer: Sharer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came under AsyncPolicy, and SyncPolicy began in between: again, it is copied, and waits as it came."""
    other = wire.open("m", "b")

    def reached(name: str) -> None:
        if name == "push.headers" and not changed:
            changed.append(wire.update("m", policy=sync(2)))

    changed: list[object] = []
    monkeypatch.setattr(push_handler, "failpoint", reached)
    with pytest.raises(grpc.RpcError) as caught:
        sharer.begin(1, np.ones(SIZE)).answer()
    refused = refusal(caught.value)
    assert (refused.reason, refused.metadata) == ("SHARED_MEMORY_UNAVAILABLE", {"why": "the policy has just changed"})
    assert refused.retry_seconds is not None
    step = sharer.begin(1, np.ones(SIZE))
    eventually(lambda: wire.waiting("m") == {"a"}, "the push does not wait")
    sharer.gradient[:] = 7
    call = wire.begin(other.header(1), np.ones(SIZE))
    assert step.answer().result.contributors == 2
    step.finish()
    streamed(call)
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(np.full(SIZE, 2, np.float32), 2.0)
    twin.check(wire.snapshot("m"))


def test_a_gradient_that_changes_all_the_time_harms_no_other_worker(wire: Wire, sharer: Sharer) -> None:
    """Good values all of them: whatever mixture is applied, the weights of a version are the same for everybody."""
    over = threading.Event()

    def alter() -> None:
        while not over.is_set():
            sharer.gradient[:] = np.random.default_rng().standard_normal(SIZE)

    thread = threading.Thread(target=alter)
    thread.start()
    try:
        for number in range(1, 60):
            step = sharer.begin(number, None)
            weights = mapped(step.answer().weights).copy()
            state = wire.snapshot("m")
            step.finish()
            assert state.version == number
            np.testing.assert_array_equal(weights, state.weights)
            assert np.isfinite(state.weights).all()
    finally:
        over.set()
        thread.join()
