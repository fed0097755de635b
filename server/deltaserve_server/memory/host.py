"""Vectors in host memory, updated by the CPU kernel on as many threads as it gains from."""

import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import itemgetter
from typing import TypeVar

import numpy as np

from deltaserve._common.failpoints import failpoint
from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.adadelta.formats import Values
from deltaserve_server.adadelta.robust import trimmed_mean
from deltaserve_server.memory import shared_memory
from deltaserve_server.memory.budget import Allowance, Budget
from deltaserve_server.memory.parallel import run_parallel
from deltaserve_server.memory.store import (
    Frozen,
    Gradient,
    Pool,
    Range,
    Staging,
    State,
    Store,
    Vector,
    Version,
    allocate_host,
    check_combine,
    root_of_sum,
)

_log = logging.getLogger(__name__)

_SMALL = 1 << 12
"""A received piece of fewer elements is joined with its neighbours."""

_PIECE = 1 << 18
"""Elements that a thread updates in one call: so many take longer than it takes to wake another thread, and few enough
to share the work evenly. Calls end at multiples of it, so that the kernel can write what it makes around the caches."""

_STREAMED = 1 << 20
"""From so many elements on, new weights go around the caches: they are gone from there before somebody reads them."""

_BLOCK = 1 << 15
"""Elements of every push that a thread combines at a time: large enough for numpy's calls to be cheap."""

_SCRATCH = 1 << 21
"""Elements of all pushes together that a thread combines at a time: 8 MiB."""


class HostStaging(Staging):
    """A push's values: the received messages themselves, in order of their offsets."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Values]] = []

    def add(self, offset: int, values: Values) -> None:
        """Keeps the piece; joins small ones, each of which would take more memory for itself than for its values."""
        if self.pieces and values.size < _SMALL:
            start, last = self.pieces[-1]
            if last.size < _SMALL and start + last.size == offset and last.dtype == values.dtype:
                self.pieces[-1] = start, np.concatenate([last, values])
                return
        self.pieces.append((offset, values))

    def scaled(self, start: int, factor: float, out: Vector) -> None:
        """Writes `factor` times the elements from `start` on to `out`, float32 rounded once; 0 where there are none."""
        from deltaserve_server.adadelta import cpu  # numba: not before the first update

        stop = start + out.size
        out.fill(0)
        first = max(bisect_right(self.pieces, start, key=itemgetter(0)) - 1, 0)
        for offset, values in self.pieces[first : bisect_left(self.pieces, stop, key=itemgetter(0))]:
            low, high = max(offset, start), min(offset + values.size, stop)
            if low < high:
                held = values[low - offset : high - offset]
                cpu.add(out[low - start : high - start], held, factor)


_Item = TypeVar("_Item")

_Work = tuple[int, int, Values, Hyperparameters]
"""Elements `[start, stop)`, their gradient, and their hyperparameters."""


class HostStore(Store):
    """A model's vectors in host memory.

    Args:
        weights: The initial weights; kept, not copied.
        number: Their version.
        budget: Where readers of older versions take their memory from.
        executor: Runs the kernel beside the calling thread.
        threads: How many threads an update runs on at most, the calling one among them.
    """

    def __init__(
        self, weights: Vector, number: int, budget: Budget, executor: ThreadPoolExecutor, threads: int
    ) -> None:
        self._budget = budget
        self._executor = executor
        self._threads = threads
        self._allocate: Callable[[int], Vector] = allocate_host
        self._pool, self._readers = Pool(weights.size, self._allocate), Allowance(weights.nbytes, budget)
        self._square_avg = np.zeros(weights.size, np.float32)
        self._acc_delta = np.zeros(weights.size, np.float32)
        self._first: tuple[HostStaging, float] | None = None
        self._sum: Vector | None = None
        self._combined = False
        self._kept = False
        self._averages = Pool(weights.size)
        self._frozen: _HostFrozen | None = None
        self.current = Version(number, weights, self._readers, self._pool)

    def stage(self) -> HostStaging:
        """Returns a place for a push's values."""
        return HostStaging()

    def staging_bytes(self, received_bytes: int) -> int:
        """Returns the size of the messages: they are kept as they are."""
        return received_bytes

    def fold(self, staging: Staging, factor: float) -> None:
        """Adds a push to the sum."""
        assert isinstance(staging, HostStaging)
        assert not self._combined
        failpoint("push.reduce")
        if self._first is None and self._sum is None:
            self._first = staging, factor
            return
        if self._first is not None:
            self._sum = self._pool.take()
            self._sum.fill(0)
            self._add(*self._first)
            self._first = None
        self._add(staging, factor)

    def combine(self, stagings: Sequence[tuple[Staging, float]], trim: int) -> None:
        """Makes the gradient of the next update a trimmed mean, block by block."""
        check_combine(len(stagings), trim, self._first is not None or self._sum is not None)
        failpoint("push.reduce")
        target = self._pool.take()
        block = max(1, min(_BLOCK, _SCRATCH // len(stagings)))

        shape = len(stagings), min(block, target.size)
        # As many as threads: each takes one for as long as it works on a block.
        scratch = deque([np.empty(shape, np.float32) for _ in range(self._threads)])

        def combine(start: int) -> None:
            rows = scratch.pop()
            part = target[start : start + block]
            for row, (staging, factor) in zip(rows, stagings, strict=True):
                assert isinstance(staging, HostStaging)
                staging.scaled(start, factor, row[: part.size])
            trimmed_mean(rows[:, : part.size], trim, part)
            scratch.append(rows)

        self._share(combine, range(0, target.size, block))
        self._sum, self._combined = target, True

    def update(self, ranges: Sequence[Range], weight: float, number: int) -> float:
        """Applies the gradient in one pass and publishes the new version."""
        pieces, divisor = self._gradient(weight)
        weights = self._pool.take()
        _copy_outside(ranges, self.current.weights, weights)
        averages = self._averages_to_write(ranges)
        work = list(_work(pieces, ranges))
        squares = [0.0] * len(work)

        def update(index: int) -> None:
            squares[index] = self._update(work[index], divisor, weights, averages)

        self._share(update, range(len(work)))
        (self._square_avg, self._acc_delta), self._frozen = averages, None
        if self._sum is not None and not self._kept:
            self._pool.give(self._sum)
        self._first, self._sum, self._combined, self._kept = None, None, False, False
        failpoint("push.updated")
        self._publish(weights, number)
        return root_of_sum(squares)

    def gradient(self, weight: float) -> Gradient:
        """Returns the messages themselves, or the sum, which is not used again before it is given back."""
        pieces, divisor = self._gradient(weight)
        total, pool, self._kept = self._sum, self._pool, True  # another pool may be in its place by then
        return Gradient(pieces, divisor, lambda: None if total is None else pool.give(total))

    def freeze(self) -> Frozen:
        """Returns the vectors themselves: the next update writes elsewhere, if they are still needed then."""
        self.current.acquire()
        self._frozen = _HostFrozen(self, self.current, self._square_avg, self._acc_delta)
        return self._frozen

    def thaw(self, frozen: "_HostFrozen") -> None:
        """Takes back what `freeze` gave: its averages may be written to, or are used again if others are in place."""
        if self._frozen is frozen:  # an update that runs meanwhile has found others already, and takes them
            self._frozen = None
        elif frozen.square_avg is not self._square_avg:
            self._averages.give(frozen.square_avg)
            self._averages.give(frozen.acc_delta)

    def share(self) -> None:
        """Has versions lie in shared memory, the current one too."""
        if self._allocate is allocate_host:
            self._allocate = _allocate_shared
            self._pool = Pool(self.current.weights.size, self._allocate)
            # The pool takes the sum when it is used, and would give it for a version's weights.
            self._sum = None if self._sum is None else self._placed(self._sum)
            self._publish(self._placed(self.current.weights), self.current.number)

    def state(self) -> State:
        """Returns a copy of the three vectors."""
        return State(self.current.weights, self._square_avg, self._acc_delta).copy()

    def put(self, state: State, number: int) -> None:
        """Replaces the three vectors."""
        self._square_avg, self._acc_delta, self._frozen = state.square_avg, state.acc_delta, None
        self._publish(self._placed(state.weights), number)

    def extend(self, weights: Vector) -> None:
        """Adds elements with zero state at the end."""
        zeros = np.zeros(weights.size, np.float32)
        # All of them before any is kept: memory may run out.
        extended = np.concatenate([self.current.weights, weights])
        square_avg = np.concatenate([self._square_avg, zeros])
        acc_delta = np.concatenate([self._acc_delta, zeros])
        self._sum = None if self._sum is None else np.concatenate([self._sum, zeros])
        self._square_avg, self._acc_delta, self._frozen = square_avg, acc_delta, None
        self._pool, self._averages = Pool(extended.size, self._allocate), Pool(extended.size)
        self._readers = Allowance(extended.nbytes, self._budget)
        self._publish(self._placed(extended), self.current.number)

    def _placed(self, weights: Vector) -> Vector:
        """Returns the vector, or where versions are shared, one that others can map in its place."""
        if self._allocate is allocate_host:
            return weights
        placed = self._pool.take()
        placed[:] = weights
        return placed

    def _publish(self, weights: Vector, number: int) -> None:
        before, self.current = self.current, Version(number, weights, self._readers, self._pool)
        before.retire()

    def _add(self, staging: HostStaging, factor: float) -> None:
        from deltaserve_server.adadelta import cpu  # numba: not before the first update

        total = self._sum
        assert total is not None

        def add(piece: tuple[int, Values]) -> None:
            offset, values = piece
            cpu.add(total[offset : offset + values.size], values, factor)

        self._share(add, staging.pieces)

    def _gradient(self, weight: float) -> tuple[Sequence[tuple[int, Values]], float]:
        """Returns the pieces of the next update's gradient and what it is to be divided by."""
        if self._first is not None:
            staging, factor = self._first
            return staging.pieces, weight / factor
        return [] if self._sum is None else [(0, self._sum)], 1.0 if self._combined else weight

    def _averages_to_write(self, ranges: Sequence[Range]) -> tuple[Vector, Vector]:
        """Returns where an update writes square_avg and acc_delta: others than those that are to stay as they are."""
        held = self._square_avg, self._acc_delta
        if self._frozen is None:
            return held
        others = self._averages.take(), self._averages.take()
        for vector, other in zip(held, others, strict=True):
            _copy_outside(ranges, vector, other)
        return others

    def _share(self, run: Callable[[_Item], None], items: Sequence[_Item]) -> None:
        """Does all items, on several threads where there are several."""
        run_parallel(run, items, self._executor, self._threads)

    def _update(self, work: _Work, divisor: float, weights: Vector, averages: tuple[Vector, Vector]) -> float:
        """Updates one range on the calling thread; returns the sum of the squares of its change."""
        from deltaserve_server.adadelta import cpu  # numba: not before the first update

        start, stop, gradient, hyperparameters = work
        for vector, held in zip(averages, (self._square_avg, self._acc_delta), strict=True):
            if vector is not held:
                vector[start:stop] = held[start:stop]  # here, where the kernel finds it in the cache
        squares = cpu.update(
            gradient,
            divisor,
            averages[0][start:stop],
            averages[1][start:stop],
            self.current.weights[start:stop],
            weights[start:stop],
            hyperparameters,
            streaming=weights.size >= _STREAMED,
        )
        failpoint("push.mid_update")
        return squares


class _HostFrozen(Frozen):
    """Vectors that their store does not write to.

    Args:
        store: Theirs.
        version: Has the weights, acquired.
        square_avg: As in `State`.
        acc_delta: Likewise.
    """

    def __init__(self, store: HostStore, version: Version, square_avg: Vector, acc_delta: Vector) -> None:
        self._store = store
        self._version = version
        self.square_avg = square_avg
        self.acc_delta = acc_delta

    def state(self) -> State:
        """Returns the vectors."""
        return State(self._version.weights, self.square_avg, self.acc_delta)

    def release(self) -> None:
        """Lets go of them."""
        self._version.release()
        self._store.thaw(self)


def _copy_outside(ranges: Sequence[Range], vector: Vector, out: Vector) -> None:
    """Copies the elements that no range covers."""
    edges = [0, *(edge for part in ranges for edge in (part.start, part.stop)), out.size]
    for start, stop in list(pairwise(edges))[::2]:
        out[start:stop] = vector[start:stop]


def _allocate_shared(size: int) -> Vector:
    """Returns a vector that others can only read; one of ordinary memory where the system has none, or no more."""
    try:
        return shared_memory.allocate(size, others_write=False)
    except OSError as error:
        _log.warning("weights are not shared: %s", error)
        return allocate_host(size)


def _work(pieces: Sequence[tuple[int, Values]], ranges: Sequence[Range]) -> Iterator[_Work]:
    """Cuts the gradient where a piece, a range or a thread's portion ends. Pieces and ranges are in ascending order."""
    left = iter(pieces)
    offset = 0
    values: Values = np.empty(0, np.float32)
    for part in ranges:
        start = part.start
        while start < part.stop:
            while start >= offset + values.size:
                offset, values = next(left)
            stop = min(part.stop, offset + values.size, (start // _PIECE + 1) * _PIECE)
            yield start, stop, values[start - offset : stop - offset], part.hyperparameters
            start = stop
