"""Vectors in host memory, updated by the CPU kernel on as many threads as it gains from."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.memory.budget import Allowance, Budget
from deltaserve_server.memory.store import ELEMENT_BYTES, Pool, Range, Staging, State, Store, Vector, Version

_ALONE = 1 << 16
"""Up to this many elements one thread is faster than several."""

_SMALL = 1 << 12
"""A received piece of fewer elements is joined with its neighbours."""

_PIECE = 1 << 18
"""Elements that a thread updates in one call: enough to make the call cheap, few enough to share the work evenly."""


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
        self._first: HostStaging | None = None
        self._sum: Vector | None = None
        self.current = Version(number, weights, self._readers, self._pool)

    def stage(self) -> HostStaging:
        """Returns a place for a push's values."""
        return HostStaging()

    def staging_bytes(self, elements: int) -> int:
        """Returns the size of the messages that hold them."""
        return elements * ELEMENT_BYTES

    def fold(self, staging: Staging) -> None:
        """Adds a push to the sum."""
        assert isinstance(staging, HostStaging)
        if self._first is None and self._sum is None:
            self._first = staging
            return
        if self._sum is None:
            self._sum = self._pool.take()
            self._sum.fill(0)
            self._add(self._first)
            self._first = None
        self._add(staging)

    def update(self, ranges: Sequence[Range], contributors: int, number: int) -> None:
        """Applies the folded sum in one pass and publishes the new version."""
        pieces = self._first.pieces if self._first else [(0, self._sum)] if self._sum is not None else []
        weights = self._pool.take()
        self._keep_outside(ranges, weights)
        self._run(list(_work(pieces, ranges)), float(contributors), weights)
        if self._sum is not None:
            self._pool.give(self._sum)
        self._first = self._sum = None
        self._publish(weights, number)

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

    def _add(self, staging: HostStaging | None) -> None:
        assert staging is not None
        assert self._sum is not None
        for offset, values in staging.pieces:
            target = self._sum[offset : offset + values.size]
            np.add(target, values, out=target)

    def _keep_outside(self, ranges: Sequence[Range], weights: Vector) -> None:
        """Copies the weights that no range covers."""
        edges = [0, *(edge for part in ranges for edge in (part.start, part.stop)), weights.size]
        for start, stop in list(pairwise(edges))[::2]:
            weights[start:stop] = self.current.weights[start:stop]

    def _run(self, work: list[_Work], divisor: float, weights: Vector) -> None:
        """Updates all of `work`, on several threads where there is enough of it."""
        if weights.size <= _ALONE or self._threads == 1:
            self._update(work, divisor, weights)
            return
        parts = [work[k :: self._threads] for k in range(self._threads)]
        for done in [self._executor.submit(self._update, part, divisor, weights) for part in parts]:
            done.result()

    def _update(self, work: list[_Work], divisor: float, weights: Vector) -> None:
        from deltaserve_server.adadelta import cpu  # numba: not before the first update

        for start, stop, gradient, hyperparameters in work:
            cpu.update(
                gradient,
                divisor,
                self._square_avg[start:stop],
                self._acc_delta[start:stop],
                self.current.weights[start:stop],
                weights[start:stop],
                hyperparameters,
            )


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
