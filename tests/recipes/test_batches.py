"""How examples are dealt out to workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_server.recipes.batches import Plan, Share


def plan(worker: int = 0, workers: int = 1, examples: int = 1500, batch_size: int = 10, seed: int = 3) -> Plan:
    return Plan(examples=examples, batch_size=batch_size, epochs=2, seed=(seed,), worker=worker, workers=workers)


@settings(max_examples=40)
@given(
    examples=st.integers(1, 200), batch_size=st.integers(1, 17), workers=st.integers(1, 9), seed=st.integers(0, 1000)
)
def test_workers_together_see_every_example_once_an_epoch(
    examples: int, batch_size: int, workers: int, seed: int
) -> None:
    parts = [list(plan(w, workers, examples, batch_size, seed).shares()) for w in range(workers)]
    steps = plan(0, workers, examples, batch_size, seed)
    assert {len(part) for part in parts} == {steps.steps}
    for epoch in range(2):
        here = slice(epoch * steps.steps_per_epoch, (epoch + 1) * steps.steps_per_epoch)
        rows = np.concatenate([share.rows for part in parts for share in part[here]])
        assert np.array_equal(np.sort(rows), np.arange(examples))


@settings(max_examples=40)
@given(examples=st.integers(1, 200), batch_size=st.integers(1, 17), workers=st.integers(1, 9))
def test_the_weighted_mean_over_workers_is_the_mean_over_the_batch(
    examples: int, batch_size: int, workers: int
) -> None:
    values = np.random.default_rng(examples).standard_normal(examples)
    together = plan(0, 1, examples, batch_size * workers)
    parts = [plan(w, workers, examples, batch_size).shares() for w in range(workers)]
    for whole, *shares in zip(together.shares(), *parts, strict=True):
        means = [values[share.rows].mean() if len(share.rows) else 0.0 for share in shares]
        assert np.average(means, weights=[share.weight for share in shares]) == pytest.approx(values[whole.rows].mean())
        assert {share.batch for share in shares} == {len(whole.rows)}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(np.concatenate([s.rows for s in part])) for seed in (1, 2) for part in epochs(plan(seed=seed))}
    assert len(orders) == 4


def epochs(whole: Plan) -> list[list[Share]]:
    shares = list(whole.shares())
    return [shares[: whole.steps_per_epoch], shares[whole.steps_per_epoch :]]
