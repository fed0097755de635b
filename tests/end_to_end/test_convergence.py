"""The study of docs/convergence.md in small: runs that must agree do, and its tables and plots are produced."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.convergence_experiments import TASKS, sync
from benchmarks.convergence_figures import draw
from benchmarks.convergence_runs import Run, Setting, train
from benchmarks.convergence_tables import tables

from deltaserve import Async, Bounded, Sync
from deltaserve_server import LocalServer
from deltaserve_server.recipes.airfoil import AirfoilScratch
from deltaserve_server.recipes.data import Examples
from deltaserve_server.recipes.digits import Digits
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import Policy

# Made-up examples of the study's shapes: the tests need neither scikit-learn nor the airfoil file.
_random = np.random.default_rng(3)
_digits = Examples(features=_random.random((120, 64), np.float32), labels=_random.integers(0, 10, 120))
_features = _random.standard_normal((120, 5), np.float32)
_airfoil = Examples(features=_features, labels=_features @ np.array([0.5, -0.4, 0.3, -0.2, 0.1], np.float32))
RECIPES: dict[str, NumpyRecipe] = {
    "digits": Digits(train=_digits, test=_digits, hidden=16),
    "airfoil": AirfoilScratch(train=_airfoil),
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with LocalServer() as server:
        yield server.target


def setting(task: str, policy: Policy, workers: int, **changes: object) -> Setting:
    base = Setting(
        experiment="policies",
        task=task,
        label="sync" if isinstance(policy, Sync) else "async",
        policy=policy,
        workers=workers,
        batch=6,
        steps=32,
        step_seconds=0.001,
        points=8,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def run(target: str, chosen: Setting, seed: int = 0) -> Run:
    return train(chosen, RECIPES[chosen.task], target, seed)()


def losses(one: Run) -> list[float]:
    return [point.loss for point in one.points]


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        (Async(), "adadelta"),
        (Async(damping=True), "adam"),
        (Async(max_staleness=4), "momentum"),
        (Bounded(slack=1), "rmsprop"),
    ],
    ids=str,
)
def test_one_worker_learns_the_same_bits_under_every_policy(
    target: str, task: str, policy: Policy, optimizer: str
) -> None:
    expected = run(target, setting(task, sync(1), 1, optimizer=optimizer))
    got = run(target, setting(task, policy, 1, optimizer=optimizer))
    assert losses(got) == losses(expected)
    assert losses(expected)[-1] < losses(expected)[0]


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("workers", [2, 4])
def test_synchronous_workers_learn_like_one_with_the_joined_batch(target: str, task: str, workers: int) -> None:
    together = run(target, setting(task, sync(workers), workers))
    alone = run(target, setting(task, sync(1), 1, batch=6 * workers, steps=32 // workers))
    assert [point.samples for point in together.points] == [point.samples for point in alone.points]
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
    other = run(target, setting(task, sync(1), 1))
    assert abs(losses(other)[-1] / losses(alone)[-1] - 1) > 1e-3  # the tolerance above tells different batches apart


def test_every_sample_is_counted_once(target: str) -> None:
    for policy, slow in ((Sync(quorum=3), 5.0), (Async(max_staleness=1), 1.0), (Bounded(slack=0), 1.0)):
        got = run(target, setting("airfoil", policy, 4, slow=slow, step_seconds=0.004))
        assert (got.end.samples, got.end.pushes, got.pushes) == (32 * 6, 32, 32)
        assert sum(got.steps_by_worker) == 32
        assert [point.samples for point in got.points] == sorted(point.samples for point in got.points)


@pytest.mark.deep
def test_a_quorum_drops_the_straggler(target: str) -> None:
    got = run(target, setting("airfoil", Sync(quorum=3), 4, slow=5.0, step_seconds=0.02))
    assert 0 < got.refused <= got.steps_by_worker[3] < 32 / 4


@pytest.mark.parametrize("task", RECIPES)
def test_local_steps_push_less_often(target: str, task: str) -> None:
    got = run(target, setting(task, sync(2), 2, local_steps=8, hyperparameters=(("eps", 1e-3),)))
    assert got.end.samples == 32 * 6
    assert 4 <= got.pushes <= 6  # the worker that got more batches pushes a remainder at the end
    assert losses(got)[-1] < losses(got)[0]


@pytest.mark.deep
def test_tables_and_plots(target: str, tmp_path: Path) -> None:
    runs = []
    for task in TASKS:
        for experiment, changes in (
            ("policies", {}),
            ("straggler", {}),
            ("eps", {"hyperparameters": (("eps", 1e-3),)}),
            ("local", {"local_steps": 4}),
            ("local eps", {"local_steps": 4, "hyperparameters": (("eps", 1e-3),)}),
        ):
            chosen = setting(task.name, sync(2), 2, experiment=experiment, steps=8, **changes)
            runs += [run(target, chosen, seed) for seed in (0, 1)]
    text = tables(runs)
    assert re.search(r"\| sync \| \d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\) \|", text)
    draw(runs, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "curves.png",
        "eps.png",
        "local.png",
        "straggler.png",
        "workers.png",
    ]
