"""Whole runs with worker processes: what comes out, and that nothing is left behind."""

import multiprocessing
import signal
import time
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

import deltaserve
from deltaserve_server.recipes import run as run_module
from deltaserve_server.recipes.data import load_airfoil, load_digits
from deltaserve_server.recipes.errors import WorkerError
from deltaserve_server.recipes.recipes import AirfoilScratch, Digits, Policy
from deltaserve_server.recipes.run import run
from deltaserve_server.recipes.worker import Progress


@pytest.fixture(scope="module")
def digits() -> Digits:
    train, test = load_digits()
    return Digits(train=train, test=test)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_digits_are_learned_under_both_policies(
    target: str, model: str, digits: Digits, workers: int, kind: str
) -> None:
    """With most workers to the end of the recipe; with fewer, where batches are smaller, a quarter of it is enough."""
    policy: Policy = deltaserve.Sync(min_workers=workers) if kind == "sync" else deltaserve.Async()
    recipe, accuracy, loss = (digits, 0.95, 0.1) if workers == 4 else (replace(digits, epochs=5), 0.9, 0.25)
    told: list[Progress] = []
    outcome = run(recipe, target=target, model=model, workers=workers, policy=policy, observer=told.append)
    assert outcome.accuracy is not None
    assert outcome.accuracy >= accuracy
    assert outcome.loss < loss
    assert outcome.updates == outcome.version
    assert outcome.version == (recipe.epochs * -(-1437 // (8 * workers)) * (1 if kind == "sync" else workers))
    assert {one.worker for one in told} == set(range(workers))
    assert [one.step for one in told if one.worker == 0] == sorted(one.step for one in told if one.worker == 0)
    assert outcome.samples_per_second > 100
    assert not multiprocessing.active_children()


def test_workers_that_are_done_end_by_themselves(
    target: str, model: str, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that came into the end of one was told on the terminal, though nothing was wrong."""
    stop, statuses = run_module._stop, list[int | None]()

    def stopping(processes: Any) -> None:
        statuses.extend(process.exitcode for process in processes.values())
        stop(processes)

    monkeypatch.setattr(run_module, "_stop", stopping)
    run(replace(digits, epochs=1), target=target, model=model, workers=2, policy=deltaserve.Async())
    assert statuses == [0, 0]


@pytest.mark.parametrize(
    "policy",
    [
        deltaserve.Sync(min_workers=2, quorum=2),
        deltaserve.Sync(min_workers=3, reduction="trimmed_mean", trim=1, clip_norm=5.0),
        deltaserve.Sync(min_workers=3, reduction="median", round_timeout_seconds=20.0),
        deltaserve.Async(max_staleness=0),
        deltaserve.Async(max_staleness=8, damping=True),
        deltaserve.Bounded(slack=1),
    ],
)
def test_digits_are_learned_under_every_policy(target: str, model: str, digits: Digits, policy: Policy) -> None:
    """In a quarter of the recipe's epochs, so less well; what each policy counts is exact all the same."""
    outcome = run(replace(digits, epochs=5), target=target, model=model, workers=3, policy=policy)
    rounds = 5 * -(-1437 // 24)
    assert outcome.accuracy is not None
    assert outcome.accuracy >= 0.9
    if isinstance(policy, deltaserve.Sync):
        # Whoever was late has left out what the others went past, so all were done with the same round.
        assert outcome.version == rounds
        assert outcome.pushes + outcome.passed == 3 * rounds
    else:
        assert outcome.pushes == 3 * rounds
        assert outcome.version == outcome.pushes - outcome.late
        assert not outcome.passed
    if policy in (deltaserve.Async(max_staleness=0), deltaserve.Sync(min_workers=2, quorum=2)):
        assert outcome.late


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for workers to leave on a busy machine: who is killed after it leaves a session."""
    monkeypatch.setattr("deltaserve_server.recipes.run.LEAVE_SECONDS", 60.0)


@pytest.mark.usefixtures("patience")
def test_a_killed_worker_ends_the_run_and_the_other_worker(target: str, model: str, digits: Digits) -> None:
    recipe = replace(digits, epochs=1000)
    killed: list[float] = []

    def kill(progress: Progress) -> None:
        if progress.worker == 1 and progress.step > 20 and not killed:
            victim = next(child for child in multiprocessing.active_children() if child.name == "worker 1")
            killed.append(time.monotonic())
            victim.kill()

    with pytest.raises(WorkerError, match=r"^worker 1 was ended by signal 9 \(Killed\); the others were stopped$"):
        run(recipe, target=target, model=model, workers=2, policy=deltaserve.Sync(min_workers=2), observer=kill)
    assert time.monotonic() - killed[0] < 30
    assert not multiprocessing.active_children()
    # The survivor has closed its session; the victim's ends with its lease.
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        assert len(client.model(model).info().sessions) <= 1


@pytest.mark.usefixtures("patience")
def test_an_interrupt_stops_the_workers_which_close_their_sessions(target: str, model: str, digits: Digits) -> None:
    recipe = replace(digits, epochs=1000)

    def interrupt(progress: Progress) -> None:
        if progress.step > 20:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, target=target, model=model, workers=2, policy=deltaserve.Async(), observer=interrupt)
    assert not multiprocessing.active_children()
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        assert not client.model(model).info().sessions


def test_a_model_that_differs_is_told_with_what_to_do(target: str, model: str, made_up_file: Path) -> None:
    recipe = AirfoilScratch(train=load_airfoil(made_up_file))
    run(recipe, target=target, model=model, workers=1, policy=deltaserve.Async())
    with pytest.raises(
        WorkerError, match=f"^worker 0: model {model} exists and differs: .*choose another --model"
    ) as told:
        run(recipe, target=target, model=model, workers=1, policy=deltaserve.Sync())
    assert f"deltaserve delete {model} --target {target}" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_worker_that_cannot_start_is_told(
    target: str, model: str, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource_tracker.ensure_running()
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    with pytest.raises(WorkerError, match=r"^worker \d ended with exit status 1 before its work was done"):
        run(digits, target=target, model=model, workers=2, policy=deltaserve.Async())
    assert not multiprocessing.active_children()
