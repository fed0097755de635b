"""Which examples a worker computes a gradient on, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_WEIGHT = 1e-9


@dataclass(frozen=True, kw_only=True)
class Share:
    """One worker's part of one batch.

    Attributes:
        rows: Row numbers of the worker's examples. May be empty where a last batch has fewer examples than workers.
        batch: Number of examples in the whole batch, of all workers.
    """

    rows: NDArray[np.intp]
    batch: int

    @property
    def weight(self) -> float:
        """What the mean gradient of the share counts in its round, so that the round's is the mean of the batch."""
        return len(self.rows) or LEAST_WEIGHT


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How an epoch's examples are dealt out.

    Attributes:
        examples: Number of training examples.
        batch_size: Examples a worker takes at a step; the batch they make together is `workers` times as large.
        epochs: Passes over the examples.
        seed: Workers with the same seed see the same order and so take parts of the same batches.
        worker: Which part is this worker's, from 0.
        workers: How many parts there are.
    """

    examples: int
    batch_size: int
    epochs: int
    seed: tuple[int, ...]
    worker: int = 0
    workers: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch; the last one may be smaller."""
        return -(-self.examples // (self.batch_size * self.workers))

    @property
    def steps(self) -> int:
        """Number of batches in all, the same for every worker."""
        return self.steps_per_epoch * self.epochs

    def shares(self) -> Iterator[Share]:
        """Yields this worker's part of every batch."""
        random = np.random.default_rng(self.seed)
        whole = self.batch_size * self.workers
        for _ in range(self.epochs):
            order = random.permutation(self.examples)
            for start in range(0, self.examples, whole):
                batch = order[start : start + whole]
                rows = np.array_split(batch, self.workers)[self.worker]
                yield Share(rows=rows, batch=len(batch))
