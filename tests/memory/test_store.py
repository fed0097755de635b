"""One suite for every place where a model's vectors can live."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaserve_server.adadelta import Hyperparameters, reference
from deltaserve_server.memory import Budget, BudgetExceeded, Range, State, Store
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector

MakeStore = Callable[[Vector, Budget], Store]

PLAIN = Hyperparameters()
OTHER = Hyperparameters(lr=0.5, rho=0.8, eps=1e-3, weight_decay=0.1, maximize=True)


def _cuda() -> bool:
    try:
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


@pytest.fixture(
    params=[
        "host-1",
        "host-3",
        pytest.param("device", marks=[pytest.mark.gpu, pytest.mark.skipif(not _cuda(), reason="needs an NVIDIA GPU")]),
    ]
)
def make_store(request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    """Makes stores of one kind."""
    if request.param == "device":
        from deltaserve_server.memory.device import DeviceStore

        yield lambda weights, budget: DeviceStore(weights, 0, budget)
        return
    threads = int(request.param[-1])
    with ThreadPoolExecutor(threads) as executor:
        yield lambda weights, budget: HostStore(weights, 0, budget, executor, threads)


def random(size: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def unaligned(values: Vector) -> Vector:
    """The values as they lie in a received message: read-only, at an odd address."""
    return np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1)


def push(store: Store, values: Vector, runs: list[tuple[int, int]], chunk: int = 1 << 18) -> None:
    staging = store.stage()
    for start, stop in runs:
        for at in range(start, stop, chunk):
            staging.add(at, unaligned(values[at : min(at + chunk, stop)]))
    store.fold(staging)


class Oracle:
    """The same in float64, by the equations."""

    def __init__(self, weights: Vector) -> None:
        self.weights = weights.astype(np.float64)
        self.square_avg = np.zeros(weights.size)
        self.acc_delta = np.zeros(weights.size)

    def update(self, gradient: NDArray[np.float64], ranges: list[Range]) -> None:
        for part in ranges:
            at = slice(part.start, part.stop)
            self.square_avg[at], self.acc_delta[at], self.weights[at] = reference.update(
                gradient[at], self.square_avg[at], self.acc_delta[at], self.weights[at], part.hyperparameters
            )

    def check(self, store: Store) -> None:
        state = store.state()
        np.testing.assert_array_equal(state.weights, store.current.weights)
        np.testing.assert_allclose(state.weights, self.weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.square_avg, self.square_avg, rtol=1e-5)
        np.testing.assert_allclose(state.acc_delta, self.acc_delta, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 1000, 300_001])
def test_an_update_is_adadeltas(make_store: MakeStore, size: int) -> None:
    weights = random(size, 0)
    store, oracle = make_store(weights.copy(), Budget(1 << 30)), Oracle(weights)
    half = size // 2
    ranges = [Range(0, half, PLAIN), Range(half, size, OTHER)] if half else [Range(0, size, PLAIN)]
    for step in range(1, 4):
        gradient = random(size, step)
        push(store, gradient, [(0, size)])
        store.update(ranges, 1, step)
        oracle.update(gradient.astype(np.float64), ranges)
        assert store.current.number == step
    oracle.check(store)


def test_a_round_takes_the_mean_in_the_order_of_folds(make_store: MakeStore) -> None:
    size = 70_000
    weights, gradients = random(size, 0), [random(size, k) * 10.0**k for k in range(1, 4)]
    store, oracle = make_store(weights.copy(), Budget(1 << 30)), Oracle(weights)
    ranges = [Range(0, size, PLAIN)]
    for gradient in gradients:
        push(store, gradient, [(0, size)])
    store.update(ranges, 3, 1)
    total = (gradients[0] + gradients[1]) + gradients[2]  # float32, in this order: the bits that must come out
    oracle.update(total.astype(np.float64) / 3, ranges)
    oracle.check(store)
    single = make_store(weights.copy(), Budget(1 << 30))
    push(single, total, [(0, size)])
    single.update(ranges, 3, 1)
    np.testing.assert_array_equal(single.current.weights, store.current.weights)


def test_what_no_push_holds_stays_as_it_is(make_store: MakeStore) -> None:
    size, kept = 300_000, slice(100, 200_000)
    weights, gradient = random(size, 0), random(size, 1)
    store = make_store(weights.copy(), Budget(1 << 30))
    ranges = [Range(0, 100, PLAIN), Range(200_000, size, PLAIN)]
    push(store, gradient, [(0, 100), (200_000, size)])
    store.update(ranges, 1, 1)
    state = store.state()
    np.testing.assert_array_equal(state.weights[kept], weights[kept])
    assert not state.square_avg[kept].any()
    assert state.square_avg[:100].all()
    assert state.square_avg[200_000:].all()


def test_a_part_that_one_push_lacks_counts_as_zero(make_store: MakeStore) -> None:
    size = 1000
    weights, first, second = random(size, 0), random(size, 1), random(size, 2)
    store, oracle = make_store(weights.copy(), Budget(1 << 30)), Oracle(weights)
    push(store, first, [(0, 400)])
    push(store, second, [(100, 900)])
    ranges = [Range(0, 900, PLAIN)]
    store.update(ranges, 2, 1)
    total = np.zeros(size, np.float32)
    total[:400] += first[:400]
    total[100:900] += second[100:900]
    oracle.update(total.astype(np.float64) / 2, ranges)
    oracle.check(store)


@pytest.mark.parametrize("chunk", [1, 7, 262_144])
def test_bits_do_not_depend_on_chunks(make_store: MakeStore, chunk: int) -> None:
    size = 3_000 if chunk < 10 else 600_000
    weights, gradient = random(size, 0), random(size, 1)
    stores = [make_store(weights.copy(), Budget(1 << 30)) for _ in range(2)]
    for store, length in zip(stores, (chunk, size), strict=True):
        push(store, gradient, [(0, size)], length)
        store.update([Range(0, size, OTHER)], 1, 1)
    np.testing.assert_array_equal(stores[0].current.weights, stores[1].current.weights)


def test_an_update_of_nothing_is_a_version(make_store: MakeStore) -> None:
    weights = random(10, 0)
    store = make_store(weights.copy(), Budget(1 << 30))
    push(store, weights, [])
    store.update([], 1, 1)
    assert store.current.number == 1
    np.testing.assert_array_equal(store.current.weights, weights)


def test_a_version_stays_while_it_is_read(make_store: MakeStore) -> None:
    size = 1000
    store = make_store(random(size, 0), Budget(1 << 20))
    read = store.current
    weights = read.acquire()
    before = weights.copy()
    for step in range(1, 5):
        push(store, random(size, step), [(0, size)])
        store.update([Range(0, size, PLAIN)], 1, step)
    np.testing.assert_array_equal(weights, before)
    read.release()


def test_a_second_version_that_is_read_is_paid_for_once(make_store: MakeStore) -> None:
    budget = Budget(4000)
    store = make_store(random(1000, 0), budget)
    read = []
    for number in range(1, 3):
        read += [store.current, store.current]
        for version in read[-2:]:
            version.acquire()
        push(store, random(1000, number), [(0, 1000)])
        store.update([Range(0, 1000, PLAIN)], 1, number)
    assert budget.available == 0
    with pytest.raises(BudgetExceeded) as refused:
        store.current.acquire()
    assert (refused.value.needed, refused.value.available, refused.value.passing) == (4000, 0, True)
    for version in read:
        version.release()
    assert budget.available == 4000


def test_put_replaces_all(make_store: MakeStore) -> None:
    store = make_store(random(100, 0), Budget(1 << 20))
    state = State(random(100, 1), random(100, 2) ** 2, random(100, 3) ** 2)
    store.put(State(*(vector.copy() for vector in (state.weights, state.square_avg, state.acc_delta))), 7)
    assert store.current.number == 7
    got = store.state()
    for name in ("weights", "square_avg", "acc_delta"):
        np.testing.assert_array_equal(getattr(got, name), getattr(state, name))


def test_extend_keeps_what_is_there_and_what_waits(make_store: MakeStore) -> None:
    size, more = 1000, 500
    weights, gradients = random(size, 0), [random(size, 1), random(size, 2), random(size + more, 3)]
    store, oracle = make_store(weights.copy(), Budget(1 << 20)), Oracle(np.concatenate([weights, random(more, 4)]))
    for gradient in gradients[:2]:
        push(store, gradient, [(0, size)])
    store.extend(random(more, 4))
    assert store.current.number == 0
    push(store, gradients[2], [(0, size + more)])
    ranges = [Range(0, size + more, PLAIN)]
    store.update(ranges, 3, 1)
    total = np.zeros(size + more, np.float32)
    for gradient in gradients:
        total[: gradient.size] += gradient
    oracle.update(total.astype(np.float64) / 3, ranges)
    oracle.check(store)
