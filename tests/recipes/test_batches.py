"""How the workers of a run divide the examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_server.recipes.batches import BatchPlan, WorkerBatch


def plan(worker: int = 0, workers: int = 1, examples: int = 1500, batch_size: int = 10, seed: int = 3) -> BatchPlan:
    return BatchPlan(examples=examples, batch_size=batch_size, epochs=2, seed=(seed,), worker=worker, workers=workers)


@settings(max_examples=30)
@given(
    examples=st.integers(1, 200), batch_size=st.integers(1, 17), workers=st.integers(1, 9), seed=st.integers(0, 1000)
)
def test_workers_together_see_every_example_once_per_epoch(
    examples: int, batch_size: int, workers: int, seed: int
) -> None:
    parts = [list(plan(w, workers, examples, batch_size, seed).batches()) for w in range(workers)]
    steps = plan(0, workers, examples, batch_size, seed)
    assert {len(part) for part in parts} == {steps.steps}
    for epoch in range(2):
        here = slice(epoch * steps.steps_per_epoch, (epoch + 1) * steps.steps_per_epoch)
        rows = np.concatenate([batch.rows for part in parts for batch in part[here]])
        assert np.array_equal(np.sort(rows), np.arange(examples))


@settings(max_examples=30)
@given(examples=st.integers(1, 200), batch_size=st.integers(1, 17), workers=st.integers(1, 9))
def test_the_weighted_mean_over_workers_is_the_mean_over_the_batch(
    examples: int, batch_size: int, workers: int
) -> None:
    values = np.random.default_rng(examples).standard_normal(examples)
    together = plan(0, 1, examples, batch_size * workers)
    parts = [plan(w, workers, examples, batch_size).batches() for w in range(workers)]
    for whole, *slices in zip(together.batches(), *parts, strict=True):
        means = [values[batch.rows].mean() if len(batch.rows) else 0.0 for batch in slices]
        assert np.average(means, weights=[batch.weight for batch in slices]) == pytest.approx(values[whole.rows].mean())
        assert {batch.batch_examples for batch in slices} == {len(whole.rows)}


def test_each_epoch_and_each_seed_has_another_order() -> None:
    orders = {
        tuple(np.concatenate([batch.rows for batch in part])) for seed in (1, 2) for part in epochs(plan(seed=seed))
    }
    assert len(orders) == 4


def epochs(whole: BatchPlan) -> list[list[WorkerBatch]]:
    batches = list(whole.batches())
    return [batches[: whole.steps_per_epoch], batches[whole.steps_per_epoch :]]
