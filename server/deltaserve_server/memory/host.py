"""Vectors in host memory, updated by the CPU kernel on several threads."""

import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np

from deltaserve._common.failpoints import failpoint
from deltaserve_server.memory import shared_memory
from deltaserve_server.memory.budget import Budget, ReaderBudget
from deltaserve_server.memory.parallel import run_parallel
from deltaserve_server.memory.store import (
    Frozen,
    Gradient,
    Range,
    Staging,
    State,
    Store,
    Vector,
    VectorPool,
    Version,
    allocate_host,
    check_combine,
    joined,
    root_of_sum,
    zeros_like,
)
from deltaserve_server.optimizers.formats import Values
from deltaserve_server.optimizers.robust import trimmed_mean

_log = logging.getLogger(__name__)

_SMALL = 1 << 12
"""A received piece with fewer elements is joined with its neighbour."""

_PORTION = 1 << 18
"""Elements that a thread updates in one call: enough to outweigh waking a thread, and few enough to share the work
evenly. Calls end at multiples of it, so that the kernel's streaming stores stay aligned."""

_STREAMED = 1 << 20
"""Smallest vector whose new weights go around the caches: a larger one would evict itself before anybody reads it."""

_BLOCK = 1 << 15
"""Elements of every push that a thread combines at a time: large enough to make numpy's call overhead small."""

_SCRATCH = 1 << 21
"""Elements of all pushes together that a thread combines at a time: 8 MiB."""


class HostStaging(Staging):
    """A push's values: views into the received messages, in order of their offsets."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Values]] = []

    def add(self, offset: int, values: Values) -> None:
        """Appends the piece without a copy, or joins it with the one before if both are small."""
        # A piece costs some 100 bytes beside its values: many small ones would exceed what the budget counts.
        if self.pieces and values.size < _SMALL:
            start, last = self.pieces[-1]
            if last.size < _SMALL and start + last.size == offset and last.dtype == values.dtype:
                self.pieces[-1] = start, np.concatenate([last, values])
                return
        self.pieces.append((offset, values))

    def scaled(self, start: int, factor: float, out: Vector) -> None:
        """Writes `factor` times the elements from `start` on to `out`, rounded to float32, and 0 for missing ones."""
        from deltaserve_server.optimizers import cpu  # imports numba, which a server without updates does not need

        stop = start + out.size
        out.fill(0)
        first = max(bisect_right(self.pieces, start, key=itemgetter(0)) - 1, 0)
        for offset, values in self.pieces[first : bisect_left(self.pieces, stop, key=itemgetter(0))]:
            low, high = max(offset, start), min(offset + values.size, stop)
            if low < high:
                cpu.add(out[low - start : high - start], values[low - offset : high - offset], factor)


@dataclass(slots=True)
class _Single:
    """The gradient of an update with one push, which stays in the received messages."""

    staging: HostStaging
    factor: float


@dataclass(slots=True)
class _Total:
    """A gradient computed from several pushes.

    Attributes:
        vector: Its values, from the store's pool.
        is_mean: Whether it is a mean from `combine`, which the update does not divide any more.
        is_lent: Whether a caller of `gradient` has the vector and returns it to the pool.
    """

    vector: Vector
    is_mean: bool = False
    is_lent: bool = False


_Work = tuple[int, int, Values, Range]
"""Elements `[start, stop)`, their gradient, and the range that they are part of."""


class HostStore(Store):
    """A model's vectors in host memory.

    Args:
        state: The initial state, of version `number`; kept, not copied.
        budget: Pays for older versions that readers keep.
        executor: Runs the kernel beside the calling thread.
        threads: Maximum number of threads of an update, including the calling one.
    """

    def __init__(self, state: State, number: int, budget: Budget, executor: ThreadPoolExecutor, threads: int) -> None:
        self._budget = budget
        self._executor = executor
        self._threads = threads
        self._allocate: Callable[[int], Vector] = allocate_host
        weights, self._slots = state.weights, state.slots
        self._pool, self._readers = VectorPool(weights.size, self._allocate), ReaderBudget(weights.nbytes, budget)
        self._pending: _Single | _Total | None = None
        self._slots_pool = VectorPool(weights.size, free_max=len(state.slots))
        self._frozen: _HostFrozen | None = None
        self.current = Version(number, weights, self._readers, self._pool)

    def stage(self) -> HostStaging:
        """Returns an empty staging for a push."""
        return HostStaging()

    def staging_bytes(self, received_bytes: int) -> int:
        """Returns the size of the messages, which stay where they are."""
        return received_bytes

    def fold(self, staging: Staging, factor: float) -> None:
        """Adds a push to the sum."""
        assert isinstance(staging, HostStaging)
        failpoint("push.reduce")
        first = self._pending
        if first is None:
            # Most updates have one push. It stays in its messages, which saves the sum and a pass over memory.
            self._pending = _Single(staging, factor)
            return
        if isinstance(first, _Single):
            self._pending = _Total(self._pool.take())
            self._pending.vector.fill(0)
            self._add(self._pending.vector, first.staging, first.factor)
        assert isinstance(self._pending, _Total)
        assert not self._pending.is_mean
        self._add(self._pending.vector, staging, factor)

    def combine(self, stagings: Sequence[tuple[Staging, float]], trim: int) -> None:
        """Sets the gradient to the trimmed mean of pushes, block by block."""
        check_combine(len(stagings), trim, self._pending is not None)
        failpoint("push.reduce")
        target = self._pool.take()
        block = max(1, min(_BLOCK, _SCRATCH // len(stagings)))
        shape = len(stagings), min(block, target.size)
        # One buffer for each thread, which takes it while it works on a block.
        buffers = deque([np.empty(shape, np.float32) for _ in range(self._threads)])

        def combine_block(start: int) -> None:
            rows = buffers.pop()
            part = target[start : start + block]
            for row, (staging, factor) in zip(rows, stagings, strict=True):
                assert isinstance(staging, HostStaging)
                staging.scaled(start, factor, row[: part.size])
            trimmed_mean(rows[:, : part.size], trim, part)
            buffers.append(rows)

        run_parallel(combine_block, range(0, target.size, block), self._executor, self._threads)
        self._pending = _Total(target, is_mean=True)

    def update(self, ranges: Sequence[Range], weight: float, number: int) -> float:
        """Applies the gradient in one pass and publishes the new version."""
        pieces, divisor = self._gradient(weight)
        # Another vector than the current version's, which readers may hold.
        weights = self._pool.take()
        _copy_outside(ranges, self.current.weights, weights)
        slots = self._slots
        if self._frozen is not None:
            slots = tuple(self._slots_pool.take() for _ in self._slots)
            for vector, other in zip(self._slots, slots, strict=True):
                _copy_outside(ranges, vector, other)
        work = list(_split(pieces, ranges))
        squares = [0.0] * len(work)

        def update_portion(index: int) -> None:
            squares[index] = self._update(work[index], divisor, weights, slots)

        run_parallel(update_portion, range(len(work)), self._executor, self._threads)
        self._slots, self._frozen = slots, None
        if isinstance(self._pending, _Total) and not self._pending.is_lent:
            self._pool.give(self._pending.vector)
        self._pending = None
        failpoint("push.updated")
        self._publish(weights, number)
        # In the order of the portions, not of the threads, so that the norm has the same bits each time.
        return root_of_sum(squares)

    def gradient(self, weight: float) -> Gradient:
        """Returns the received messages themselves, or the sum, which goes back to the pool with `done`."""
        pieces, divisor = self._gradient(weight)
        total, pool = self._pending, self._pool  # `extend` may replace the pool before `done`
        if not isinstance(total, _Total):
            return Gradient(pieces, divisor, lambda: None)
        total.is_lent = True
        return Gradient(pieces, divisor, lambda: pool.give(total.vector))

    def freeze(self) -> Frozen:
        """Returns the vectors themselves. An update before `release` writes the slots elsewhere."""
        self.current.acquire()
        self._frozen = _HostFrozen(self, self.current, self._slots)
        return self._frozen

    def thaw(self, frozen: "_HostFrozen") -> None:
        """Ends a view of the slots: updates may write to them again, or their vectors return to the pool.

        Called from any thread, also during an update.
        """
        if self._frozen is frozen:  # a running update has allocated other slots already, and switches to them
            self._frozen = None
        elif frozen.slots is not self._slots:
            for vector in frozen.slots:
                self._slots_pool.give(vector)

    def use_shared_memory(self) -> None:
        """Moves the current version to shared memory and allocates all later ones there."""
        if self._allocate is allocate_host:
            self._allocate = _allocate_shared
            # A new pool, because the free vectors of the old one lie in private memory.
            self._pool = VectorPool(self.current.weights.size, self._allocate)
            # After the update the sum's vector goes to the pool, which then gives it out for weights: move it too.
            if isinstance(self._pending, _Total):
                self._pending.vector = self._placed(self._pending.vector)
            self._publish(self._placed(self.current.weights), self.current.number)

    def state(self) -> State:
        """Returns a copy of the vectors."""
        return State(self.current.weights, self._slots).copy()

    def put(self, state: State, number: int) -> None:
        """Replaces the vectors."""
        # Nobody has frozen the new slots; a view of the old ones keeps its vectors.
        self._slots, self._frozen = state.slots, None
        self._publish(self._placed(state.weights), number)

    def extend(self, state: State) -> None:
        """Appends elements."""
        # All are allocated before the store changes: memory may run out at any of them.
        extended = joined(self.current.weights, state.weights)
        slots = tuple(joined(*pair) for pair in zip(self._slots, state.slots, strict=True))
        if isinstance(self._pending, _Total):
            self._pending.vector = joined(self._pending.vector, zeros_like(state.weights))
        self._slots, self._frozen = slots, None
        # Vectors of the old size are of no use any more: versions that readers hold return to the old pool.
        self._pool = VectorPool(extended.size, self._allocate)
        self._slots_pool = VectorPool(extended.size, free_max=len(slots))
        self._readers = ReaderBudget(extended.nbytes, self._budget)
        self._publish(self._placed(extended), self.current.number)

    def _placed(self, vector: Vector) -> Vector:
        """Returns the vector, or a copy in shared memory if versions lie there."""
        if self._allocate is allocate_host:
            return vector
        placed = self._pool.take()
        placed[:] = vector
        return placed

    def _publish(self, weights: Vector, number: int) -> None:
        # Retired last, so that no reader finds a retired version as the current one.
        before, self.current = self.current, Version(number, weights, self._readers, self._pool)
        before.retire()

    def _add(self, total: Vector, staging: HostStaging, factor: float) -> None:
        from deltaserve_server.optimizers import cpu  # imports numba, which a server without updates does not need

        def add_piece(piece: tuple[int, Values]) -> None:
            offset, values = piece
            cpu.add(total[offset : offset + values.size], values, factor)

        run_parallel(add_piece, staging.pieces, self._executor, self._threads)

    def _gradient(self, weight: float) -> tuple[Sequence[tuple[int, Values]], float]:
        """Returns the pieces of the next update's gradient, and their divisor."""
        match self._pending:
            case None:
                return [], weight
            case _Single(staging, factor):
                # One rounding of the quotient instead of one for each product.
                return staging.pieces, weight / factor
            case _Total(vector, is_mean):
                return [(0, vector)], 1.0 if is_mean else weight

    def _update(self, work: _Work, divisor: float, weights: Vector, slots: tuple[Vector, ...]) -> float:
        """Updates one portion on the calling thread; returns the sum of the squares of its change."""
        from deltaserve_server.optimizers import cpu  # imports numba, which a server without updates does not need

        start, stop, gradient, part = work
        for target, current in zip(slots, self._slots, strict=True):
            if target is not current:
                # Copied portion by portion, so that the kernel finds the values in the cache.
                target[start:stop] = current[start:stop]
        squares = cpu.update(
            gradient,
            divisor,
            [slot[start:stop] for slot in slots],
            self.current.weights[start:stop],
            weights[start:stop],
            part.optimizer,
            part.count,
            streaming=weights.size >= _STREAMED,
        )
        failpoint("push.mid_update")
        return squares


@dataclass(eq=False)
class _HostFrozen(Frozen):
    """A view of an acquired version's weights and of slots, which their store does not write to until `release`."""

    store: HostStore
    version: Version
    slots: tuple[Vector, ...]

    def state(self) -> State:
        """Returns the vectors themselves."""
        return State(self.version.weights, self.slots)

    def release(self) -> None:
        """Ends the view."""
        self.version.release()
        self.store.thaw(self)


def _copy_outside(ranges: Sequence[Range], vector: Vector, out: Vector) -> None:
    """Copies the elements that no range covers."""
    # Pairs of edges alternate between gaps and ranges, and the first pair is a gap.
    edges = [0, *(edge for part in ranges for edge in (part.start, part.stop)), out.size]
    for start, stop in list(pairwise(edges))[::2]:
        out[start:stop] = vector[start:stop]


def _allocate_shared(size: int) -> Vector:
    """Returns a vector that others can read, or one in private memory where the system cannot share any."""
    try:
        return shared_memory.allocate(size, others_write=False)
    except OSError as error:
        _log.warning("cannot put weights into shared memory, workers get them over the connection: %s", error)
        return allocate_host(size)


def _split(pieces: Sequence[tuple[int, Values]], ranges: Sequence[Range]) -> Iterator[_Work]:
    """Splits the gradient where a piece, a range or a thread's portion ends. Pieces and ranges are ascending."""
    remaining = iter(pieces)
    offset = 0
    values: Values = np.empty(0, np.float32)
    for part in ranges:
        start = part.start
        while start < part.stop:
            while start >= offset + values.size:
                offset, values = next(remaining)
            stop = min(part.stop, offset + values.size, (start // _PORTION + 1) * _PORTION)
            yield start, stop, values[start - offset : stop - offset], part
            start = stop
