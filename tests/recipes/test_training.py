"""Whole runs with worker processes: their results, and that no process is left behind."""

import multiprocessing
import signal
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltaserve
from deltaserve_server.recipes import training
from deltaserve_server.recipes.airfoil import AirfoilScratch
from deltaserve_server.recipes.data import Examples, load_airfoil, load_digits
from deltaserve_server.recipes.digits import Digits
from deltaserve_server.recipes.errors import WorkerError
from deltaserve_server.recipes.recipe import Policy
from deltaserve_server.recipes.training import run
from deltaserve_server.recipes.worker import Progress


@pytest.fixture(scope="module")
def digits() -> Digits:
    train, test = load_digits()
    return Digits(train=train, test=test)


@pytest.fixture(scope="module")
def noise() -> Digits:
    """Random pixels in the shape of the digits: nothing to learn, but quick."""
    random = np.random.default_rng(3)
    examples = Examples(features=random.random((240, 64), np.float32), labels=random.integers(0, 10, 240))
    return Digits(train=examples, test=examples, hidden=16, epochs=2)


@pytest.mark.parametrize("policy", [deltaserve.Sync(min_workers=2), deltaserve.Async()], ids=["sync", "async"])
def test_a_run_counts_its_updates_and_reports_progress(
    target: str, model: str, noise: Digits, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, statuses = training._stop, list[int | None]()

    def stopping(processes: Any) -> None:
        statuses.extend(process.exitcode for process in processes.values())
        stop(processes)

    monkeypatch.setattr(training, "_stop", stopping)
    reports: list[Progress] = []
    result = run(noise, target=target, model=model, workers=2, policy=policy, observer=reports.append)
    assert result.updates == result.version == 30 * (1 if isinstance(policy, deltaserve.Sync) else 2)
    assert (result.pushes, result.late, result.skipped) == (60, 0, 0)
    assert result.accuracy is not None
    assert {report.worker for report in reports} == {0, 1}
    steps = [report.step for report in reports if report.worker == 0]
    assert (steps[0], steps[-1]) == (0, 30)
    assert steps == sorted(steps)
    # Finished workers end by themselves; a signal during their shutdown would print an error.
    assert statuses == [0, 0]
    assert not multiprocessing.active_children()


@pytest.mark.deep
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_digits_are_learned_by_any_number_of_workers(
    target: str, model: str, digits: Digits, workers: int, kind: str
) -> None:
    """Four workers train all epochs of the recipe; fewer make more updates an epoch, so a quarter is enough."""
    policy: Policy = deltaserve.Sync(min_workers=workers) if kind == "sync" else deltaserve.Async()
    recipe, accuracy, loss = (digits, 0.95, 0.1) if workers == 4 else (replace(digits, epochs=5), 0.9, 0.25)
    result = run(recipe, target=target, model=model, workers=workers, policy=policy)
    assert result.accuracy is not None
    assert result.accuracy >= accuracy
    assert result.loss < loss
    assert result.version == (recipe.epochs * -(-1437 // (8 * workers)) * (1 if kind == "sync" else workers))
    assert result.samples_per_second > 100


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", [name for name in Digits.optimizers if name != "adadelta"])
def test_digits_are_learned_with_every_optimizer(target: str, model: str, digits: Digits, name: str, kind: str) -> None:
    policy: Policy = deltaserve.Sync(min_workers=4) if kind == "sync" else deltaserve.Async()
    recipe = replace(digits, optimizer=Digits.optimizers[name])
    result = run(recipe, target=target, model=model, workers=4, policy=policy)
    assert result.accuracy is not None
    assert result.accuracy >= 0.95
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        assert client.model(model).groups == (recipe.optimizer,)


@pytest.mark.deep
@pytest.mark.parametrize(
    "policy",
    [
        deltaserve.Sync(min_workers=2, quorum=2),
        deltaserve.Sync(min_workers=3, reduction="trimmed_mean", trim=1, clip_norm=5.0),
        deltaserve.Sync(min_workers=3, reduction="median", round_timeout_seconds=60.0),
        deltaserve.Async(max_staleness=0),
        deltaserve.Async(max_staleness=8, damping=True),
        deltaserve.Bounded(slack=1),
    ],
    ids=str,
)
def test_digits_are_learned_under_every_policy(target: str, model: str, digits: Digits, policy: Policy) -> None:
    result = run(replace(digits, epochs=5), target=target, model=model, workers=3, policy=policy)
    rounds = 5 * -(-1437 // 24)
    assert result.accuracy is not None
    assert result.accuracy >= 0.9
    if isinstance(policy, deltaserve.Sync):
        # Late workers skipped the rounds that closed without them, so all finished in the same round.
        assert result.version == rounds
        assert result.pushes + result.skipped == 3 * rounds
    else:
        assert result.pushes == 3 * rounds
        assert result.version == result.pushes - result.late
        assert not result.skipped
    if policy in (deltaserve.Async(max_staleness=0), deltaserve.Sync(min_workers=2, quorum=2)):
        assert result.late


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives workers on a busy machine time to leave: a killed worker would leave its session open."""
    monkeypatch.setattr(training, "LEAVE_SECONDS", 60.0)


@pytest.mark.usefixtures("patience")
def test_a_killed_worker_ends_the_run_and_the_other_worker(target: str, model: str, noise: Digits) -> None:
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.worker == 1 and progress.step > 5 and not killed:
            victim = next(child for child in multiprocessing.active_children() if child.name == "worker 1")
            killed.append(progress.step)
            victim.kill()

    endless, policy = replace(noise, epochs=100_000), deltaserve.Sync(min_workers=2)
    with pytest.raises(WorkerError, match=r"^worker 1 was ended by signal 9 \(Killed\); the other workers were stoppe"):
        run(endless, target=target, model=model, workers=2, policy=policy, observer=kill)
    assert not multiprocessing.active_children()
    # The survivor closed its session; the victim's session ends with its lease.
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        assert len(client.model(model).info().sessions) <= 1


@pytest.mark.usefixtures("patience")
def test_an_interrupt_stops_the_workers_which_close_their_sessions(target: str, model: str, noise: Digits) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step > 5:
            signal.raise_signal(signal.SIGINT)

    endless = replace(noise, epochs=100_000)
    with pytest.raises(KeyboardInterrupt):
        run(endless, target=target, model=model, workers=2, policy=deltaserve.Async(), observer=interrupt)
    assert not multiprocessing.active_children()
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        assert not client.model(model).info().sessions


def test_a_model_that_differs_is_an_error_that_says_what_to_do(target: str, model: str, synthetic_file: Path) -> None:
    recipe = AirfoilScratch(train=load_airfoil(synthetic_file))
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        client.create_model(model, recipe.initial_weights(), policy=deltaserve.Async())
    with pytest.raises(WorkerError, match=f"^worker 0: .*{model}.*: choose another --model, or delete") as raised:
        run(recipe, target=target, model=model, workers=1, policy=deltaserve.Sync())
    assert f"deltaserve delete {model} --target {target}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_worker_that_cannot_start_is_an_error(
    target: str, model: str, noise: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource_tracker.ensure_running()
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(WorkerError, match=r"^worker \d ended with exit status 1 before it finished"):
        run(noise, target=target, model=model, workers=2, policy=deltaserve.Async())
    assert not multiprocessing.active_children()
