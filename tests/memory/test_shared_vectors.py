"""Shared memory: its files, permissions and lifetime, and the stores that use it."""

import fcntl
import gc
import mmap
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tests.memory.store_states import Stage, assert_same_state, fresh, whole

from deltaserve_server.memory import Budget, Store, shared_memory
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.memory.store import Vector

FUTURE_WRITE = 0x10


def path(handle: Handle) -> Path:
    return Path(f"/proc/{handle.process_id}/fd/{handle.descriptor}")


def handle_of(vector: Vector) -> Handle:
    handle = shared_memory.handle(vector)
    assert handle is not None
    return handle


def opened(handle: Handle, *, write: bool = False) -> Vector:
    descriptor = os.open(path(handle), os.O_RDWR if write else os.O_RDONLY)
    try:
        access = mmap.PROT_READ | mmap.PROT_WRITE if write else mmap.PROT_READ
        return np.frombuffer(mmap.mmap(descriptor, handle.size_bytes, mmap.MAP_SHARED, access), np.float32)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 300_001])
@pytest.mark.parametrize("others_write", [True, False])
def test_both_processes_see_the_same_values(size: int, others_write: bool) -> None:
    vector = shared_memory.allocate(size, others_write=others_write)
    assert vector.size == size
    assert vector.dtype == np.float32
    assert not vector.any()
    assert vector.flags.writeable
    handle = handle_of(vector)
    assert handle.size_bytes == 4 * size
    theirs = opened(handle)
    vector[:] = np.arange(size)
    np.testing.assert_array_equal(theirs, np.arange(size))
    if others_write:
        opened(handle, write=True)[-1] = -5
        assert vector[-1] == -5
    else:
        with pytest.raises(PermissionError):
            opened(handle, write=True)


@pytest.mark.parametrize("others_write", [True, False])
def test_the_file_is_private_to_its_owner_and_sealed(others_write: bool) -> None:
    vector = shared_memory.allocate(10, others_write=others_write)
    handle = handle_of(vector)
    status = path(handle).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert (status.st_size, status.st_blocks * 512 >= 40) == (40, True), "its pages are allocated"
    seals = fcntl.fcntl(handle.descriptor, fcntl.F_GET_SEALS)
    size = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert seals == (size if others_write else size | FUTURE_WRITE)
    assert fcntl.fcntl(handle.descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_names_are_random() -> None:
    names = [handle_of(shared_memory.allocate(1, others_write=False)).name for _ in range(100)]
    assert len(set(names)) == 100
    numbers = [int(name.removeprefix("deltaserve-"), 16) for name in names]
    for bit in range(128):
        assert 0 < sum(number >> bit & 1 for number in numbers) < 100


def test_only_a_whole_shared_vector_has_a_handle() -> None:
    vector = shared_memory.allocate(10, others_write=False)
    assert shared_memory.handle(np.zeros(10, np.float32)) is None
    assert shared_memory.handle(np.zeros(20, np.float32)[:10]) is None
    assert shared_memory.handle(vector) == shared_memory.handle(vector)


def test_the_file_is_closed_with_the_last_reference() -> None:
    gc.collect()
    gc.disable()
    try:
        vector = shared_memory.allocate(1000, others_write=True)
        gone: list[int] = []
        shared_memory.when_gone(vector, lambda: gone.append(1))
        handle, part = handle_of(vector), vector[10:20]
        del vector
        assert path(handle).exists()
        assert gone == []
        theirs = opened(handle, write=True)
        del part
        assert gone == [1]
        assert not (path(handle).exists() and handle.name in str(path(handle).readlink()))
        theirs[:] = 3  # other processes keep their mappings
    finally:
        gc.enable()


def descriptors() -> list[str]:
    """Returns the open files of shared memory. Other files of this process come and go."""
    gc.collect()
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(entry.readlink()))
    return sorted(name for name in found if "deltaserve-" in name)


def test_thousands_of_vectors_leave_no_files_open() -> None:
    before = descriptors()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shared_memory.allocate(100, others_write=True).sum(), range(1000)))
    assert descriptors() == before


@pytest.mark.parametrize("call", ["memfd_create", "posix_fallocate", "fchmod"])
def test_a_failed_allocation_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fails(*_: object) -> int:
        raise OSError(28, "No space left on device")

    before = descriptors()
    monkeypatch.setattr(os, call, fails)
    for _ in range(5):
        with pytest.raises(OSError, match="No space left"):
            shared_memory.allocate(10, others_write=True)
    assert descriptors() == before


def test_a_system_without_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="has no memory files"):
        shared_memory.allocate(10, others_write=True)


# --- stores


SIZE = 70_001


def random(seed: int, size: int = SIZE) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@pytest.fixture
def stores() -> tuple[HostStore, HostStore]:
    """A store in shared memory and one in private memory, with the same weights."""
    executor = ThreadPoolExecutor(2)
    made = [HostStore(fresh(random(0)), 0, Budget(1 << 24), executor, 2) for _ in range(2)]
    made[0].use_shared_memory()
    return made[0], made[1]


def update(store: Store, stage: Stage, number: int, size: int = SIZE) -> None:
    store.fold(stage(store, random(number, size)), 1.0)
    store.update(whole(size), 1.0, number)


def test_every_version_can_be_mapped_and_has_the_same_bits(stores: tuple[HostStore, HostStore], stage: Stage) -> None:
    mine, plain = stores
    for number in range(1, 6):
        for store in stores:
            update(store, stage, number)
        np.testing.assert_array_equal(opened(handle_of(mine.current.weights)), plain.current.weights)
        assert shared_memory.handle(plain.current.weights) is None
    state = plain.state()
    mine.put(state.copy(), 6)
    np.testing.assert_array_equal(opened(handle_of(mine.current.weights)), state.weights)
    for store in stores:
        store.extend(fresh(random(7, 100)))
        update(store, stage, 7, SIZE + 100)
    np.testing.assert_array_equal(opened(handle_of(mine.current.weights)), plain.current.weights)
    assert_same_state(mine, plain)


def test_a_move_to_shared_memory_changes_nothing_and_happens_once(
    stores: tuple[HostStore, HostStore], stage: Stage
) -> None:
    early, late = stores
    for store in stores:
        update(store, stage, 1)
    read = late.current
    held = read.acquire()
    before = held.copy()
    late.use_shared_memory()
    assert late.current.number == 1
    name = handle_of(late.current.weights).name
    late.use_shared_memory()
    assert handle_of(late.current.weights).name == name
    for store in stores:
        update(store, stage, 2)
        update(store, stage, 3)
    np.testing.assert_array_equal(held, before)
    read.release()
    np.testing.assert_array_equal(early.current.weights, late.current.weights)


def test_an_acquired_version_keeps_its_file_and_files_are_reused(
    stores: tuple[HostStore, HostStore], stage: Stage
) -> None:
    store, _ = stores
    names = set()
    read = store.current
    mine = opened(handle_of(read.acquire()))
    before = mine.copy()
    for number in range(1, 8):
        update(store, stage, number)
        names.add(handle_of(store.current.weights).name)
        np.testing.assert_array_equal(mine, before)
    assert len(names) <= 3
    read.release()
    for number in range(8, 14):
        update(store, stage, number)
    assert (mine != before).any(), "its file has another version now"


def test_a_version_lies_in_private_memory_if_files_run_out(
    stores: tuple[HostStore, HostStore], stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, plain = stores

    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    versions = [store.current]
    store.current.acquire()
    monkeypatch.setattr(os, "memfd_create", full)
    for number in range(1, 3):
        for held in stores:
            update(held, stage, number)
        versions.append(store.current)
        store.current.acquire()
    assert shared_memory.handle(store.current.weights) is None
    assert (
        "cannot put weights into shared memory, workers get them over the connection: [Errno 24] Too many open files"
        in caplog.text
    )
    np.testing.assert_array_equal(store.current.weights, plain.current.weights)
    for version in versions:
        version.release()


def test_concurrent_readers_and_updates(stores: tuple[HostStore, HostStore], stage: Stage) -> None:
    store, _ = stores
    over, torn = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            version = store.current
            try:
                weights = version.acquire()
            except Exception:
                continue
            if version is store.current:  # else it may have been recycled before it was acquired
                first = opened(handle_of(weights)).copy()
                torn.append(not np.array_equal(first, opened(handle_of(weights))))
            version.release()

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(1, 40):
        update(store, stage, number)
    over.set()
    thread.join()
    assert torn
    assert not any(torn)


def test_the_sum_of_a_round_moves_too(stage: Stage) -> None:
    """The pool reuses the vector of the sum for weights."""
    size = 20_000
    with ThreadPoolExecutor(2) as executor:
        store = HostStore(fresh(np.zeros(size, np.float32)), 0, Budget(1 << 30), executor, 2)
        for number in range(1, 9):
            for push in range(3):
                store.fold(stage(store, np.ones(size, np.float32)), 1.0)
                if (number, push) == (1, 1):
                    store.use_shared_memory()
            store.update(whole(size), 3.0, number)
            assert shared_memory.handle(store.current.weights)


def test_the_garbage_collector_may_release_a_reservation_inside_the_budgets_lock() -> None:
    """Python may collect garbage at any allocation."""
    budget = Budget(1000)
    vector = shared_memory.allocate(10, others_write=True)
    shared_memory.when_gone(vector, budget.reserve(400).release)
    garbage: list[object] = [vector]
    garbage.append(garbage)

    def collect() -> None:
        with budget._lock:
            garbage_of.clear()
            gc.collect()

    garbage_of = [garbage]
    del vector, garbage
    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert budget.available == 1000
