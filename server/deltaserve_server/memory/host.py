"""Vectors in host memory, updated by the CPU kernel on as many threads as it gains from."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import itemgetter
from typing import TypeVar

import numpy as np

from deltaserve._failpoints import failpoint
from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.adadelta.robust import trimmed_mean
from deltaserve_server.memory.budget import Allowance, Budget
from deltaserve_server.memory.store import (
    ELEMENT_BYTES,
    Pool,
    Range,
    Staging,
    State,
    Store,
    Vector,
    Version,
    check_combine,
    root_of_sum,
)

_ALONE = 1 << 16
"""Up to this many elements one thread is faster than several."""

_SMALL = 1 << 12
"""A received piece of fewer elements is joined with its neighbours."""

_PIECE = 1 << 18
"""Elements that a thread updates in one call: enough to make the call cheap, few enough to share the work evenly."""

_BLOCK = 1 << 15
"""Elements of every push that a thread combines at a time: large enough for numpy's calls to be cheap."""

_SCRATCH = 1 << 21
"""Elements of all pushes together that a thread combines at a time: 8 MiB."""


class HostStaging(Staging):
    """A push's values: the received messages themselves, in order of their offsets."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Vector]] = []

    def add(self, offset: int, values: Vector) -> None:
        """Keeps the piece; joins small ones, each of which would take more memory for itself than for its values."""
        if self.pieces and values.size < _SMALL:
            start, last = self.pieces[-1]
            if last.size < _SMALL and start + last.size == offset:
                self.pieces[-1] = start, np.concatenate([last, values])
                return
        self.pieces.append((offset, values))

    def scaled(self, start: int, factor: float, out: Vector) -> None:
        """Writes `factor` times the elements from `start` on to `out`, float32 rounded once; 0 where there are none."""
        stop = start + out.size
        out.fill(0)
        first = max(bisect_right(self.pieces, start, key=itemgetter(0)) - 1, 0)
        for offset, values in self.pieces[first : bisect_left(self.pieces, stop, key=itemgetter(0))]:
            low, high = max(offset, start), min(offset + values.size, stop)
            if low < high:
                held = values[low - offset : high - offset]
                np.multiply(held, np.float32(factor), out=out[low - start : high - start])


_Item = TypeVar("_Item")

_Work = tuple[int, int, Vector, Hyperparameters]
"""Elements `[start, stop)`, their gradient, and their hyperparameters."""


class HostStore(Store):
    """A model's vectors in host memory.

    Args:
        weights: The initial weights; kept, not copied.
        number: Their version.
        budget: Where readers of older versions take their memory from.
        executor: Runs the kernel, with `threads` threads.
        threads: How many parts an update is cut into.
    """

    def __init__(
        self, weights: Vector, number: int, budget: Budget, executor: ThreadPoolExecutor, threads: int
    ) -> None:
        self._budget = budget
        self._executor = executor
        self._threads = threads
        self._pool, self._readers = Pool(weights.size), Allowance(weights.nbytes, budget)
        self._square_avg = np.zeros(weights.size, np.float32)
        self._acc_delta = np.zeros(weights.size, np.float32)
        self._first: tuple[HostStaging, float] | None = None
        self._sum: Vector | None = None
        self._combined = False
        self.current = Version(number, weights, self._readers, self._pool)

    def stage(self) -> HostStaging:
        """Returns a place for a push's values."""
        return HostStaging()

    def staging_bytes(self, elements: int) -> int:
        """Returns the size of the messages that hold them."""
        return elements * ELEMENT_BYTES

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

        def combine(starts: Sequence[int]) -> None:
            rows = np.empty((len(stagings), min(block, target.size)), np.float32)
            for start in starts:
                part = target[start : start + block]
                for row, (staging, factor) in zip(rows, stagings, strict=True):
                    assert isinstance(staging, HostStaging)
                    staging.scaled(start, factor, row[: part.size])
                trimmed_mean(rows[:, : part.size], trim, part)

        self._share(combine, range(0, target.size, block))
        self._sum, self._combined = target, True

    def update(self, ranges: Sequence[Range], weight: float, number: int) -> float:
        """Applies the gradient in one pass and publishes the new version."""
        pieces, divisor = self._gradient(weight)
        weights = self._pool.take()
        self._keep_outside(ranges, weights)
        work = list(enumerate(_work(pieces, ranges)))
        squares = [0.0] * len(work)
        self._share(lambda part: self._update(part, divisor, weights, squares), work)
        if self._sum is not None:
            self._pool.give(self._sum)
        self._first, self._sum, self._combined = None, None, False
        failpoint("push.updated")
        self._publish(weights, number)
        return root_of_sum(squares)

    def state(self) -> State:
        """Returns a copy of the three vectors."""
        return State(self.current.weights.copy(), self._square_avg.copy(), self._acc_delta.copy())

    def put(self, state: State, number: int) -> None:
        """Replaces the three vectors."""
        self._square_avg, self._acc_delta = state.square_avg, state.acc_delta
        self._publish(state.weights, number)

    def extend(self, weights: Vector) -> None:
        """Adds elements with zero state at the end."""
        zeros = np.zeros(weights.size, np.float32)
        # All of them before any is kept: memory may run out.
        extended = np.concatenate([self.current.weights, weights])
        square_avg = np.concatenate([self._square_avg, zeros])
        acc_delta = np.concatenate([self._acc_delta, zeros])
        self._sum = None if self._sum is None else np.concatenate([self._sum, zeros])
        self._square_avg, self._acc_delta = square_avg, acc_delta
        self._pool, self._readers = Pool(extended.size), Allowance(extended.nbytes, self._budget)
        self._publish(extended, self.current.number)

    def _publish(self, weights: Vector, number: int) -> None:
        before, self.current = self.current, Version(number, weights, self._readers, self._pool)
        before.retire()

    def _add(self, staging: HostStaging, factor: float) -> None:
        from deltaserve_server.adadelta import cpu  # numba: not before the first update

        assert self._sum is not None
        for offset, values in staging.pieces:
            cpu.add(self._sum[offset : offset + values.size], values, factor)

    def _gradient(self, weight: float) -> tuple[Sequence[tuple[int, Vector]], float]:
        """Returns the pieces of the next update's gradient and what it is to be divided by."""
        if self._first is not None:
            staging, factor = self._first
            return staging.pieces, weight / factor
        return [] if self._sum is None else [(0, self._sum)], 1.0 if self._combined else weight

    def _keep_outside(self, ranges: Sequence[Range], weights: Vector) -> None:
        """Copies the weights that no range covers."""
        edges = [0, *(edge for part in ranges for edge in (part.start, part.stop)), weights.size]
        for start, stop in list(pairwise(edges))[::2]:
            weights[start:stop] = self.current.weights[start:stop]

    def _share(self, run: Callable[[Sequence[_Item]], None], items: Sequence[_Item]) -> None:
        """Does all items, on several threads where there is enough of them."""
        if self.current.weights.size <= _ALONE or self._threads == 1:
            run(items)
            return
        parts = [items[k :: self._threads] for k in range(self._threads)]
        for done in [self._executor.submit(run, part) for part in parts]:
            done.result()

    def _update(self, work: Sequence[tuple[int, _Work]], divisor: float, weights: Vector, squares: list[float]) -> None:
        from deltaserve_server.adadelta import cpu  # numba: not before the first update

        for index, (start, stop, gradient, hyperparameters) in work:
            squares[index] = cpu.update(
                gradient,
                divisor,
                self._square_avg[start:stop],
                self._acc_delta[start:stop],
                self.current.weights[start:stop],
                weights[start:stop],
                hyperparameters,
            )
            failpoint("push.mid_update")


def _work(pieces: Sequence[tuple[int, Vector]], ranges: Sequence[Range]) -> Iterator[_Work]:
    """Cuts the gradient where a piece, a range or a thread's portion ends. Pieces and ranges are in ascending order."""
    left = iter(pieces)
    offset, values = 0, np.empty(0, np.float32)
    for part in ranges:
        start = part.start
        while start < part.stop:
            while start >= offset + values.size:
                offset, values = next(left)
            stop = min(part.stop, offset + values.size, start + _PIECE)
            yield start, stop, values[start - offset : stop - offset], part.hyperparameters
            start = stop
