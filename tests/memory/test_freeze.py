"""Frozen vectors do not change during later updates, and freezing does not change the updates."""

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
from tests.memory.store_states import OPTIMIZERS, PLAIN, MakeStore, Stage, bits, fresh, other, whole
from tests.memory.store_states import random as vector

from deltaserve._common.optimizers import Adam, Optimizer
from deltaserve_server.memory import Budget, BudgetExceeded, Frozen, Range, State, Store, shared_memory
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector

BUDGET = 1 << 30


class Life:
    """Random operations on a store. The same seed gives the same operations.

    Args:
        store: The store.
        stage: Stages pushes.
        seed: Seed of the operations.
        optimizer: The optimizer, whose slots the store has.
    """

    def __init__(self, store: Store, stage: Stage, seed: int, optimizer: Optimizer = PLAIN) -> None:
        self.store = store
        self.optimizer = optimizer
        self.size = store.current.weights.size
        self.version = 0
        self._stage = stage
        self._chance = random.Random(seed)

    def act(self) -> None:
        self._chance.choice([self.update] * 6 + [self.round] * 3 + [self.combine, self.put, self.extend, self.share])()

    def update(self) -> None:
        """Applies one push, sometimes without values for a part of the vector."""
        hole = self._chance.choice((0, 0, self.size // 3))
        start = self._chance.randrange(self.size - hole)
        runs = [(0, start), (start + hole, self.size)] if hole else [(0, self.size)]
        self.store.fold(self._stage(self.store, self._gradient(), runs), 1.0)
        self._make([self._range(low, high) for low, high in runs if low < high], 1.0)

    def round(self) -> None:
        for _ in range(3):
            self.store.fold(self._stage(self.store, self._gradient()), 2.0)
        self._make([self._range(0, self.size // 2), self._range(self.size // 2, self.size)], 6.0)

    def combine(self) -> None:
        self.store.combine([(self._stage(self.store, self._gradient()), 1.0) for _ in range(3)], 1)
        self._make([self._range(0, self.size)], 1.0)

    def put(self) -> None:
        self.version += 1
        slots = tuple(vector(self.size, self.version + k) ** 2 for k in range(len(self.optimizer.slots)))
        self.store.put(State(vector(self.size, self.version), slots), self.version)

    def extend(self) -> None:
        if self.size < 5000:
            self.store.extend(fresh(vector(77, self.size), self.optimizer))
            self.size += 77

    def share(self) -> None:
        self.store.use_shared_memory()

    def _make(self, ranges: list[Range], weight: float) -> None:
        self.version += 1
        if self._chance.random() < 0.5:  # as a journal does
            gradient = self.store.gradient(weight)
            self.store.update(ranges, weight, self.version)
            gradient.done()
        else:
            self.store.update(ranges, weight, self.version)

    def _gradient(self) -> Vector:
        return vector(self.size, self._chance.randrange(1 << 30))

    def _range(self, start: int, stop: int) -> Range:
        """Returns a range with one of two sets of hyperparameters, and one of a few counts."""
        optimizer = self._chance.choice((self.optimizer, other(self.optimizer)))
        return Range(start, stop, optimizer, optimizer.relevant_count(self._chance.choice((1, 2, 9))))


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.deep) for seed in range(4, 16))])
def test_frozen_vectors_stay_and_updates_are_the_same_as_without_them(
    make_store: MakeStore, stage: Stage, seed: int
) -> None:
    size, chance, optimizer = 1 + 997 * (seed % 3), random.Random(seed), OPTIMIZERS[seed % len(OPTIMIZERS)]
    state = fresh(vector(size, 0), optimizer)
    frozen_now_and_then = Life(make_store(state.copy(), Budget(BUDGET)), stage, seed, optimizer)
    undisturbed = Life(make_store(state, Budget(BUDGET)), stage, seed, optimizer)
    held: tuple[Frozen, tuple[bytes, ...]] | None = None
    snapshots = 0
    for _ in range(150):
        if held is None and chance.random() < 0.4:
            frozen = frozen_now_and_then.store.freeze()
            held = frozen, bits(frozen_now_and_then.store.state())
        frozen_now_and_then.act()
        undisturbed.act()
        assert bits(frozen_now_and_then.store.state()) == bits(undisturbed.store.state())
        if held:
            assert bits(held[0].state()) == held[1]
            if chance.random() < 0.3:
                held[0].release()
                held, snapshots = None, snapshots + 1
    assert snapshots > 10


def test_frozen_vectors_can_be_read_during_updates(make_store: MakeStore, stage: Stage) -> None:
    """Another thread writes the snapshot."""
    size = 300_000
    store = make_store(fresh(vector(size, 0)), Budget(BUDGET))
    life, wrong, stop = Life(store, stage, 1), [0], Event()
    for _ in range(2):
        life.update()
    for _ in range(4):
        frozen = store.freeze()
        before = bits(store.state())

        def read(frozen: Frozen = frozen, before: tuple[bytes, ...] = before) -> None:
            while not stop.is_set():
                wrong[0] += bits(frozen.state()) != before

        stop.clear()
        thread = Thread(target=read)
        thread.start()
        for _ in range(3):
            life.update()
        stop.set()
        thread.join()
        frozen.release()
        life.update()
    assert wrong == [0]


def test_a_release_during_an_update(make_store: MakeStore, stage: Stage) -> None:
    """The thread that writes the snapshot calls `release` whenever it is done."""
    size = 40_000
    weights = vector(size, 0)
    store, other = (make_store(fresh(weights), Budget(BUDGET)) for _ in range(2))
    lives = Life(store, stage, 3), Life(other, stage, 3)
    for number in range(60):
        frozen = store.freeze()
        before = bits(store.state())
        thread = Thread(target=frozen.release)
        if number % 2:
            thread.start()
            lives[0].update()
        else:
            lives[0].update()
            thread.start()
        lives[1].update()
        thread.join()
        assert bits(store.state()) == bits(other.state()) != before


def test_the_vectors_of_snapshots_are_reused() -> None:
    """Each slot alternates between two vectors, for any number of snapshots."""
    optimizer = Adam(amsgrad=True)
    with ThreadPoolExecutor(1) as executor:
        store = HostStore(fresh(vector(4096, 0), optimizer), 0, Budget(BUDGET), executor, 1)
        seen: set[int] = set()
        for number in range(1, 30):
            frozen = store.freeze()
            for step in range(2):
                staging = store.stage()
                staging.add(0, vector(4096, number))
                store.fold(staging, 1.0)
                store.update(whole(4096, optimizer), 1.0, 2 * number + step)
            frozen.release()
            if number > 2:  # numpy allocated the first ones
                seen |= {slot.ctypes.data for slot in store._slots}
        assert len(seen) <= 6


def test_freezing_without_updates(make_store: MakeStore, stage: Stage) -> None:
    store = make_store(fresh(vector(1000, 0)), Budget(BUDGET))
    before = bits(store.state())
    for _ in range(5):
        frozen = store.freeze()
        assert bits(frozen.state()) == before
        frozen.release()
    life = Life(store, stage, 0)
    life.update()
    assert bits(store.state()) != before


def test_a_frozen_version_counts_against_the_budget(make_store: MakeStore, stage: Stage) -> None:
    budget = Budget(4000)
    store = make_store(fresh(vector(1000, 0)), budget)
    life, held = Life(store, stage, 0), []
    for _ in range(2):
        held.append(store.freeze())
        life.update()
    with pytest.raises(BudgetExceeded):
        store.freeze()
    life.update()
    for frozen in held:
        frozen.release()
    store.freeze().release()
    assert budget.available == 4000


@pytest.mark.parametrize("pushes", [1, 3])
def test_a_journals_gradient_stays_until_done_and_repeats_the_update(
    make_store: MakeStore, stage: Stage, pushes: int
) -> None:
    """A journal may write a record long after its update, and the record makes the same update again."""
    size, kept = 5000, []
    weights = vector(size, 0)
    store, again = (make_store(fresh(weights), Budget(BUDGET)) for _ in range(2))
    for number in range(1, 6):
        for push in range(pushes):
            store.fold(stage(store, vector(size, 10 * number + push), chunk=700), 0.5)
        gradient = store.gradient(0.5 * pushes)
        store.update(whole(size, other(PLAIN)), 0.5 * pushes, number)
        kept.append((gradient, bits(store.state())))
    for number, (gradient, wanted) in enumerate(kept, 1):
        staging = again.stage()
        for offset, values in gradient.pieces:
            staging.add(offset, values)
        again.fold(staging, 1.0)
        again.update(whole(size, other(PLAIN)), gradient.divisor, number)
        assert bits(again.state()) == wanted
        gradient.done()


def test_a_sum_that_a_journal_returns_late_does_not_become_a_shared_version(stage: Stage) -> None:
    """The sum from before the move lies in private memory, which workers cannot map."""
    with ThreadPoolExecutor(1) as executor:
        store = HostStore(fresh(vector(4096, 0)), 0, Budget(BUDGET), executor, 1)
        for push in range(2):
            store.fold(stage(store, vector(4096, push)), 1.0)
        gradient = store.gradient(2.0)
        store.update(whole(4096), 2.0, 1)
        store.use_shared_memory()
        gradient.done()
        for number in range(2, 6):
            store.fold(stage(store, vector(4096, number)), 1.0)
            store.update(whole(4096), 1.0, number)
            assert shared_memory.handle(store.current.weights)
