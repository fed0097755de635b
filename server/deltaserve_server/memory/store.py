"""What every place for a model's vectors offers; `host` and `device` are the two there are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.adadelta.formats import Values
from deltaserve_server.memory.budget import Allowance, Reservation

Vector = NDArray[np.float32]
"""A flat vector in host memory: float32, one dimension, contiguous."""

ELEMENT_BYTES = 4

_LINE_BYTES = 64
"""What the kernel needs to write around the caches: the longest vectors and the lines of caches have so many bytes."""

_KEPT = 2
"""Free vectors that a pool keeps: one for the next version, one for the next sum."""


@dataclass(frozen=True, slots=True)
class Range:
    """Elements `[start, stop)` of the flat vector, updated with one set of hyperparameters."""

    start: int
    stop: int
    hyperparameters: Hyperparameters


@dataclass(frozen=True, slots=True)
class State:
    """A model's three vectors in host memory, each of the layout's size."""

    weights: Vector
    square_avg: Vector
    acc_delta: Vector

    def copy(self) -> "State":
        """Returns a copy."""
        return State(self.weights.copy(), self.square_avg.copy(), self.acc_delta.copy())

    def pieces(self) -> list[tuple[int, Values]]:
        """Returns the vectors, each as one that begins at 0."""
        return [(0, self.weights), (0, self.square_avg), (0, self.acc_delta)]


@dataclass(frozen=True, slots=True)
class Gradient:
    """What an update takes, in host memory.

    Attributes:
        pieces: Values from an offset on, in ascending order.
        divisor: What they are divided by.
        done: To be called when they are not needed any more; until then they stay as they are.
    """

    pieces: Sequence[tuple[int, Values]]
    divisor: float
    done: Callable[[], None]


class Frozen(ABC):
    """A model's vectors as they were at one moment, however it goes on."""

    @abstractmethod
    def state(self) -> State:
        """Returns them, in host memory; they stay as they are until `release`."""

    @abstractmethod
    def release(self) -> None:
        """Lets go of them; to be called once."""


def root_of_sum(squares: Iterable[float]) -> float:
    """Returns the root of a sum, in float64 and in this order, which Python's own `sum` does not promise."""
    total = 0.0
    for square in squares:
        total += square
    return math.sqrt(total)


def check_combine(count: int, trim: int, pending: bool) -> None:
    """Raises ValueError where so many pushes cannot be combined now; see `Store.combine`."""
    if not 0 <= 2 * trim < count:
        raise ValueError(f"expected more than twice {trim} pushes, got {count}")
    if pending:
        raise ValueError("the next update has a gradient already")


class Staging(ABC):
    """One push's values on their way into an update."""

    @abstractmethod
    def add(self, offset: int, values: Values) -> None:
        """Takes the next piece: `values` are elements `[offset, offset + len(values))` and stay valid.

        All pieces of a push are of one format; each of them counts as what it is as float32.
        """


def allocate_host(size: int) -> Vector:
    """Returns a vector in ordinary memory, at a multiple of 64 bytes, whose values are undefined."""
    vector = np.empty(size + _LINE_BYTES // ELEMENT_BYTES, np.float32)
    first = -_address(vector) % _LINE_BYTES // ELEMENT_BYTES
    return vector[first : first + size]


def zeros_like(vector: Vector) -> Vector:
    """Returns a vector of zeros, of the same size."""
    return np.zeros(vector.size, np.float32)


def _address(vector: Vector) -> int:
    address: int = vector.__array_interface__["data"][0]
    return address


class Pool:
    """Vectors of one size to be used again: fresh pages cost more than the update itself."""

    def __init__(self, size: int, allocate: Callable[[int], Vector] = allocate_host) -> None:
        self.size = size
        self._allocate = allocate
        self._free: list[Vector] = []

    def take(self) -> Vector:
        """Returns a vector whose values are undefined."""
        try:
            return self._free.pop()
        except IndexError:
            return self._allocate(self.size)

    def give(self, vector: Vector) -> None:
        """Takes a vector back; keeps none that came from elsewhere and begins where `allocate_host` has none begin."""
        if len(self._free) < _KEPT and vector.size == self.size and _address(vector) % _LINE_BYTES == 0:
            self._free.append(vector)


class Version:
    """The weights of one version, in host memory; they never change while somebody reads them.

    The current version, one to write the next into and one that is read are part of the model's own reservation. A
    further version that is read at the same time is paid for by the first of its readers.

    Args:
        number: The version.
        weights: Its vector.
        readers: Where that comes from.
        pool: Where the vector goes when nobody needs it any more.
    """

    def __init__(self, number: int, weights: Vector, readers: Allowance, pool: Pool) -> None:
        self.number = number
        self.weights = weights
        self._allowance = readers
        self._pool = pool
        self._readers = 0
        self._reservation: Reservation | None = None
        self._retired = False
        self._lock = Lock()

    def acquire(self) -> Vector:
        """Gives the vector to read and keeps it as it is until `release`.

        Raises:
            BudgetExceeded: There is no memory to keep it.
        """
        with self._lock:
            if not self._readers:
                self._reservation = self._allowance.reserve(self.weights.nbytes)
            self._readers += 1
        return self.weights

    def release(self) -> None:
        """Ends one reading."""
        with self._lock:
            self._readers -= 1
            if not self._readers and self._reservation:
                self._reservation.release()
            self._recycle()

    def retire(self) -> None:
        """Says that a newer version is current."""
        with self._lock:
            self._retired = True
            self._recycle()

    def _recycle(self) -> None:
        if self._retired and not self._readers:
            self._pool.give(self.weights)


class Store(ABC):
    """One model's vectors. Everything but `current` and `stage` is for the engine alone.

    Attributes:
        current: The newest version.
    """

    current: Version

    @abstractmethod
    def stage(self) -> Staging:
        """Returns a place for a push's values."""

    @abstractmethod
    def staging_bytes(self, received_bytes: int) -> int:
        """Returns how many bytes a place for a push takes whose values come in so many bytes."""

    @abstractmethod
    def fold(self, staging: Staging, factor: float) -> None:
        """Adds `factor` times a push to the sum that the next update takes.

        In float32: the factor is rounded, then the product, then the sum. A push that remains alone is kept as it is,
        without a copy, and its factor goes into the divisor.

        Args:
            staging: The whole push; kept, or not needed any more afterwards.
            factor: Its weight in the sum, in (0, 1e9].
        """

    @abstractmethod
    def combine(self, stagings: Sequence[tuple[Staging, float]], trim: int) -> None:
        """Makes the gradient of the next update a trimmed mean, coordinate by coordinate (`adadelta.robust`).

        Where a push has no value, it counts as 0. The same pushes give the same bits in any order and on any device.

        Args:
            stagings: Whole pushes and their factors, in (0, 1e9], by each of which a push is first multiplied, in
                float32; not needed any more afterwards.
            trim: How many values go at either end; the median is (len(stagings) - 1) // 2.

        Raises:
            ValueError: There are not more than 2 * trim pushes, or the next update has a gradient already.
        """

    @abstractmethod
    def update(self, ranges: Sequence[Range], weight: float, number: int) -> float:
        """Applies what was folded, divided by `weight`, or what was combined, and makes version `number` current.

        Elements outside `ranges` keep their weights and state. Each range lies within what some push holds.

        Args:
            ranges: What is updated, in ascending order.
            weight: The sum of the contributors' weights, in [1e-9, 65536e9]; after `combine` of no meaning.
            number: The new version.

        Returns:
            The L2 norm of the change of all weights, float64.
        """

    @abstractmethod
    def gradient(self, weight: float) -> Gradient:
        """Returns what the next `update` of this `weight` is going to take.

        A store that is in the same state makes the same update, bit for bit, of a push that holds the pieces, folded
        with a factor of 1, when the divisor is its weight.
        """

    @abstractmethod
    def freeze(self) -> Frozen:
        """Returns the three vectors as they now are, at no cost until they are looked at, or changed.

        Raises:
            BudgetExceeded: There is no memory to keep them.
        """

    @abstractmethod
    def share(self) -> None:
        """Has versions lie where processes on this host can map them (`memory.shared`), if they can: from now on."""

    @abstractmethod
    def state(self) -> State:
        """Returns a copy of the three vectors."""

    @abstractmethod
    def put(self, state: State, number: int) -> None:
        """Replaces the three vectors, which it may keep, and makes version `number` current."""

    @abstractmethod
    def extend(self, weights: Vector) -> None:
        """Adds elements with zero state at the end; the current version keeps its number."""
