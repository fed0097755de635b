"""Which examples each worker computes its gradients on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]

EMPTY_WEIGHT = 1e-9
"""The weight of a gradient of no examples: the server needs a positive one, and the mean must not feel it."""


@dataclass(frozen=True, kw_only=True)
class WorkerBatch:
    """One worker's slice of one batch.

    Attributes:
        rows: Row numbers of the worker's examples; empty if the batch has fewer examples than there are workers.
        batch_examples: Number of examples in the whole batch, of all workers.
    """

    rows: Rows
    batch_examples: int

    @property
    def weight(self) -> float:
        """The weight of this slice's mean gradient in its round, which makes the update the mean over the batch."""
        return len(self.rows) or EMPTY_WEIGHT


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the workers of a run divide the examples.

    Attributes:
        examples: Number of training examples.
        batch_size: Examples of one worker in one step; a batch of all workers is `workers` times as large.
        epochs: Passes over the examples.
        seed: Decides the order of the examples. The workers of a run share a seed, and so take slices of the same
            batches.
        worker: This worker's index, from 0.
        workers: Number of workers.
    """

    examples: int
    batch_size: int
    epochs: int
    seed: tuple[int, ...]
    worker: int = 0
    workers: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch; the last one may be smaller."""
        return -(-self.examples // (self.batch_size * self.workers))

    @property
    def steps(self) -> int:
        """Number of batches in all epochs, the same for every worker."""
        return self.steps_per_epoch * self.epochs

    def batches(self) -> Iterator[WorkerBatch]:
        """Yields this worker's slice of every batch."""
        random = np.random.default_rng(self.seed)  # workers with one seed agree on the order without a message
        size = self.batch_size * self.workers
        for _ in range(self.epochs):
            order = random.permutation(self.examples)
            for start in range(0, self.examples, size):
                batch = order[start : start + size]
                # The examples of the last, smaller batch are shared out evenly; some workers may get none.
                rows = np.array_split(batch, self.workers)[self.worker]
                yield WorkerBatch(rows=rows, batch_examples=len(batch))
