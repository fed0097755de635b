"""The interface of a model's vector store, which `host` and `device` implement."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.memory.budget import Budget, ReaderBudget, Reservation
from deltaserve_server.model.layout import Layout
from deltaserve_server.optimizers.formats import Values

Vector = NDArray[np.float32]
"""A flat vector in host memory: float32, one dimension, contiguous."""

ELEMENT_BYTES = 4

_PAGE_BYTES = 4096
"""Vectors begin at the same place in a page, as those in shared memory do. A processor takes a load for one that must
wait for an earlier store if the last 12 bits of their addresses agree. If the gradient lay 16 to 64 bytes behind the
vectors that the kernel writes, an update would take half as long again."""

_FREE_MAX = 2
"""Free vectors that the pool of weights keeps: one for the next version, one for the next sum."""


@dataclass(frozen=True, slots=True)
class Range:
    """Elements `[start, stop)` of the flat vector that are updated with one set of hyperparameters.

    Attributes:
        start: The first element.
        stop: The element after the last.
        optimizer: The hyperparameters.
        count: The optimizer's `relevant_count` for the number of updates, this one included.
    """

    start: int
    stop: int
    optimizer: Optimizer
    count: int


@dataclass(frozen=True, slots=True)
class State:
    """A model's vectors in host memory, each of the layout's size.

    Attributes:
        weights: The weights.
        slots: The optimizer's state, in the order of its slots.
    """

    weights: Vector
    slots: tuple[Vector, ...]

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """The weights, then each slot."""
        return (self.weights, *self.slots)

    def copy(self) -> "State":
        """Returns a copy of all vectors."""
        return State(joined(self.weights), tuple(map(joined, self.slots)))

    def pieces(self) -> list[tuple[int, Values]]:
        """Returns each whole vector as a piece at offset 0."""
        return [(0, vector) for vector in self.vectors]


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of the next update, in host memory.

    Attributes:
        pieces: Offsets and the values from there on, in ascending order.
        divisor: The update divides the values by this.
        done: The caller calls this when it no longer needs the values; until then they do not change.
    """

    pieces: Sequence[tuple[int, Values]]
    divisor: float
    done: Callable[[], None]


class Frozen(ABC):
    """A consistent view of a model's vectors at one moment, which later updates do not change."""

    @abstractmethod
    def state(self) -> State:
        """Returns the vectors in host memory. They do not change until `release`."""

    @abstractmethod
    def release(self) -> None:
        """Ends the view. The caller calls this once."""


def root_of_sum(squares: Iterable[float]) -> float:
    """Returns the root of a sum, added in float64 and in order.

    Python's `sum` compensates rounding errors since 3.12, so its bits would depend on Python's version.
    """
    total = 0.0
    for square in squares:
        total += square
    return math.sqrt(total)


def check_combine(count: int, trim: int, pending: bool) -> None:
    """Raises ValueError if `Store.combine` cannot combine `count` pushes now."""
    if not 0 <= 2 * trim < count:
        raise ValueError(f"expected more than {2 * trim} pushes to trim {trim} at either end, got {count}")
    if pending:
        raise ValueError("the next update has a gradient already")


class Staging(ABC):
    """The values of one push before they enter an update."""

    @abstractmethod
    def add(self, offset: int, values: Values) -> None:
        """Appends a piece: `values` are elements `[offset, offset + len(values))`, and stay valid and unchanged.

        All pieces of a push have one element type.
        """


def allocate_host(size: int) -> Vector:
    """Returns an uninitialized vector in private memory that starts at a page."""
    return _from_page(np.empty(size + _PAGE_BYTES // ELEMENT_BYTES, np.float32), size)


def zeros_like(vector: Vector) -> Vector:
    """Returns a vector of zeros of the same size that starts at a page."""
    # np.zeros gets zeroed pages from the system when they are first used; np.zeros_like would write them all now.
    return _from_page(np.zeros(vector.size + _PAGE_BYTES // ELEMENT_BYTES, np.float32), vector.size)


def joined(*parts: Values) -> Vector:
    """Returns a copy of vectors, one after the other, as one vector that starts at a page."""
    whole = allocate_host(sum(part.size for part in parts))
    at = 0
    for part in parts:
        whole[at : at + part.size] = part
        at += part.size
    return whole


def _from_page(vector: Vector, size: int) -> Vector:
    """Returns the elements from the first page in a vector on; numpy itself aligns to 16 bytes only."""
    first = -vector.ctypes.data % _PAGE_BYTES // ELEMENT_BYTES
    return vector[first : first + size]


def initial_state(weights: Vector, layout: Layout, groups: Sequence[Optimizer]) -> State:
    """Returns weights with the optimizer state before the first update.

    Args:
        weights: The weights of the tensors of `layout`; kept, not copied.
        layout: The whole layout of a model, or the tensors that an extension appends.
        groups: The model's optimizers, by parameter group.
    """
    slots = tuple(zeros_like(weights) for _ in groups[0].slots)
    for start, stop, optimizer, _ in layout.ranges((), groups, [0] * len(layout.tensors)):
        for vector, slot in zip(slots, optimizer.slots, strict=True):
            if slot.initial:  # else the zeros stay untouched, and take no memory yet
                vector[start:stop] = slot.initial
    return State(weights, slots)


class VectorPool:
    """A pool of vectors of one size. Fresh pages from the system cost more than the update itself.

    Args:
        size: Number of elements of a vector.
        allocate: Returns a new vector.
        free_max: The largest number of free vectors that it keeps.
    """

    def __init__(self, size: int, allocate: Callable[[int], Vector] = allocate_host, free_max: int = _FREE_MAX) -> None:
        self.size = size
        self._free_max = free_max
        self._allocate = allocate
        self._free: list[Vector] = []

    def take(self) -> Vector:
        """Returns a vector with undefined values."""
        try:
            return self._free.pop()
        except IndexError:
            return self._allocate(self.size)

    def give(self, vector: Vector) -> None:
        """Returns a vector to the pool, unless the pool is full or the vector has another size or alignment."""
        # One from elsewhere may begin within a cache line, which would switch off the kernel's streaming stores.
        if len(self._free) < self._free_max and vector.size == self.size and vector.ctypes.data % _PAGE_BYTES == 0:
            self._free.append(vector)


class Version:
    """The weights of one version, in host memory. They do not change while they are acquired.

    The model's own reservation covers the current version, the one being written and one that readers keep. The first
    reader of any further version reserves its bytes.

    Args:
        readers: The budget that the first reader reserves from.
        pool: Receives the vector when the version is retired and has no readers.
    """

    def __init__(self, number: int, weights: Vector, readers: ReaderBudget, pool: VectorPool) -> None:
        self.number = number
        self.weights = weights
        self._budget = readers
        self._pool = pool
        self._readers = 0
        self._reservation: Reservation | None = None
        self._retired = False
        self._lock = Lock()

    def acquire(self) -> Vector:
        """Returns the weights, which do not change until the matching `release`.

        Raises:
            BudgetExceeded: The budget has no bytes left for a further version.
        """
        with self._lock:
            # All readers share the vector, so only the first one reserves its bytes.
            if not self._readers:
                self._reservation = self._budget.reserve(self.weights.nbytes)
            self._readers += 1
        return self.weights

    def release(self) -> None:
        """Ends one `acquire`."""
        with self._lock:
            self._readers -= 1
            if not self._readers and self._reservation:
                self._reservation.release()
            self._recycle()

    def retire(self) -> None:
        """Marks the version as no longer current."""
        with self._lock:
            self._retired = True
            self._recycle()

    def _recycle(self) -> None:
        # The next update writes into a pooled vector, so no reader may have it any more.
        if self._retired and not self._readers:
            self._pool.give(self.weights)


class Store(ABC):
    """One model's vectors: weights, optimizer state, and the gradient of the next update.

    `current` and `stage` may be used by any thread; the caller serializes all other calls.

    Attributes:
        current: The newest version.
    """

    current: Version

    @abstractmethod
    def stage(self) -> Staging:
        """Returns an empty staging for a push."""

    @abstractmethod
    def staging_bytes(self, received_bytes: int) -> int:
        """Returns the memory that the staging of a push needs, in bytes, from the size of its values on the wire."""

    @abstractmethod
    def fold(self, staging: Staging, factor: float) -> None:
        """Adds `factor` times a push to the gradient of the next update.

        The factor, the product and the sum are each rounded to float32. A single push is not copied: its factor goes
        into the divisor.

        Args:
            staging: The whole push. The store may keep it until the update.
            factor: Its weight in the sum, in (0, 1e9].
        """

    @abstractmethod
    def combine(self, stagings: Sequence[tuple[Staging, float]], trim: int) -> None:
        """Sets the gradient of the next update to the trimmed mean of pushes (`optimizers.robust`).

        A missing value of a push counts as 0. The same pushes give the same bits in any order and on any device.

        Args:
            stagings: The whole pushes and their factors, in (0, 1e9]. Each push is first multiplied by its factor, in
                float32. The store does not keep them.
            trim: Number of values to drop at either end; (len(stagings) - 1) // 2 gives the median.

        Raises:
            ValueError: There are no more than 2 * trim pushes, or the next update has a gradient already.
        """

    @abstractmethod
    def update(self, ranges: Sequence[Range], weight: float, number: int) -> float:
        """Applies the gradient and makes version `number` current.

        The gradient is the sum from `fold`, divided by `weight`, or the mean from `combine`. Elements outside `ranges`
        keep their weights and state.

        Args:
            ranges: The elements to update, in ascending order. Some push has values for each of them.
            weight: The sum of the contributors' weights, in [1e-9, 65536e9]; ignored after `combine`.
            number: The number of the new version.

        Returns:
            The L2 norm of the change of all weights, float64.
        """

    @abstractmethod
    def gradient(self, weight: float) -> Gradient:
        """Returns the gradient that the next `update` with this `weight` applies.

        In a store with the same state, folding the pieces as one push with a factor of 1 and updating with the divisor
        as weight gives the same update, bit for bit.
        """

    @abstractmethod
    def freeze(self) -> Frozen:
        """Returns a view of the vectors at this moment. It costs no copy until an update changes them.

        Raises:
            BudgetExceeded: The budget has no bytes left for a further version.
        """

    @abstractmethod
    def use_shared_memory(self) -> None:
        """Puts the current version and all later ones into shared memory, if the store and the system support it."""

    @abstractmethod
    def state(self) -> State:
        """Returns a copy of the vectors."""

    @abstractmethod
    def put(self, state: State, number: int) -> None:
        """Replaces the vectors and makes version `number` current. The store may keep the given vectors."""

    @abstractmethod
    def extend(self, state: State) -> None:
        """Appends elements: their weights and optimizer state. The current version keeps its number."""


MakeStore = Callable[[State, Optimizer, Budget], Store]
"""Makes a store of a model's state, which it may keep, of version 0. The optimizer stands for all groups."""
