"""The experiment on optimizers: AdamW, SGD with momentum and Adadelta on digits, by policy and number of workers.

Every optimizer has a grid of learning rates for one worker, and one of them for everything else. That one had the best
test accuracy with one worker, in local runs of two seeds with torch's optimizer. It is fixed over policies and numbers
of workers, except in the row "sync, scaled". The same grid, trained by the most workers under async, tells how much a
learning rate for staleness helps.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.convergence_experiments import sync
from benchmarks.convergence_runs import Run, Setting, train_all
from benchmarks.convergence_tables import chosen, labels, markdown
from deltaserve import Async
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import Policy

GRID, WORKERS = "optimizers: lr", "optimizers"
"""The names of the two parts: the grid of learning rates, and the numbers of workers."""

STALENESS = "mean staleness"

Hyperparameters = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer in the experiment.

    Attributes:
        name: Name of the optimizer in the recipe.
        lrs: The grid.
        lr: The one that is fixed over policies and numbers of workers.
        scaling: What changes with the number of workers in the row "sync, scaled".
        scaled: Returns the hyperparameters of that row for a number of workers.
    """

    name: str
    lrs: tuple[float, ...]
    lr: float
    scaling: str
    scaled: Callable[[int], Hyperparameters]


CONTENDERS = (
    Contender(
        name="adadelta",
        lrs=(0.25, 0.5, 1.0, 2.0),
        lr=1.0,
        scaling="eps 1e-3 instead of 1e-6",
        scaled=lambda workers: (("lr", 1.0), ("eps", 1e-3)),
    ),
    Contender(  # linear: Goyal et al., 2017, arXiv:1706.02677, here without warm-up
        name="momentum",
        lrs=(0.0025, 0.005, 0.01, 0.02, 0.05),
        lr=0.01,
        scaling="lr times the number of workers",
        scaled=lambda workers: (("lr", 0.01 * workers),),
    ),
    Contender(  # by the square root: Malladi et al., 2022, arXiv:2205.10287
        name="adamw",
        lrs=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        lr=1e-3,
        scaling="lr times the square root of the number of workers",
        scaled=lambda workers: (("lr", 1e-3 * workers**0.5),),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the experiment.

    Attributes:
        seeds: Runs of each setting, at most.
        steps: Steps of all workers together, of 8 samples each.
        workers: Numbers of workers beside one.
        step_seconds: Simulated duration of a worker's step.
        slots: Workers that run at the same time.
    """

    seeds: int = 5
    steps: int = 2048
    workers: tuple[int, ...] = (4, 16)
    step_seconds: float = 0.01
    slots: int = 16


QUICK = Scale(seeds=1, steps=256)


def settings(scale: Scale) -> Iterator[Setting]:
    """Yields every setting of the experiment."""
    for contender in CONTENDERS:
        for lr in contender.lrs:
            yield _setting(GRID, scale, contender.name, "sync", sync(1), 1, (("lr", lr),))
            yield _setting(GRID, scale, contender.name, "async", Async(), max(scale.workers), (("lr", lr),))
        fixed: Hyperparameters = (("lr", contender.lr),)
        for workers in scale.workers:
            for label, policy, changes in (
                ("sync", sync(workers), fixed),
                ("sync, scaled", sync(workers), contender.scaled(workers)),
                ("async", Async(), fixed),
                ("async, damping", Async(damping=True), fixed),
            ):
                yield _setting(WORKERS, scale, contender.name, label, policy, workers, changes)


def measure(scale: Scale, recipe: NumpyRecipe, target: str, minutes: float, report: Callable[[str], None]) -> list[Run]:
    """Trains every setting with one seed after the other.

    Args:
        scale: How large the experiment is.
        recipe: The recipe digits.
        target: Address of the server.
        minutes: No further seed begins if it would probably end after this time; the first one always runs.
        report: Called with lines of progress.
    """
    started, runs = time.monotonic(), list[Run]()
    for seed in range(scale.seeds):
        runs += train_all(list(settings(scale)), {"digits": recipe}, target, [seed], scale.slots, report)
        used = time.monotonic() - started
        report(f"seed {seed} is done after {used / 60:.1f} minutes")
        if used * (seed + 2) / (seed + 1) > minutes * 60:
            break
    return runs


def tables(runs: Sequence[Run]) -> str:
    """Returns the tables as Markdown: means over the seeds, and ranges."""
    return "\n\n".join([*_workers(runs), _grid(runs), *(f"{one.name}, scaled: {one.scaling}" for one in CONTENDERS)])


def _grid(runs: Sequence[Run]) -> str:
    rows = []
    for contender in CONTENDERS:
        for lr in contender.lrs:
            alone, together = (
                chosen(runs, GRID, optimizer=contender.name, hyperparameters=(("lr", lr),), label=label)
                for label in ("sync", "async")
            )
            mark = " (chosen)" if lr == contender.lr else ""
            name = f"{contender.name} {lr:g}{mark}"
            rows.append([name, _accuracy(alone), _loss(alone), _accuracy(together), _loss(together)])
    many = f"{max(run.workers for run in chosen(runs, GRID))} workers, async"
    head = ["lr", *(f"{who}: {what}" for who in ("1 worker", many) for what in ("test accuracy", "final loss"))]
    return "### by lr: mean (range)\n\n" + markdown(head, rows)


def _workers(runs: Sequence[Run]) -> Iterator[str]:
    mine = chosen(runs, WORKERS)
    counts = sorted({run.workers for run in mine})
    cells: dict[str, Callable[[Sequence[Run]], str]] = {
        "test accuracy, mean (range)": _accuracy,
        "final loss, mean (range)": _loss,
        STALENESS: lambda group: f"{statistics.fmean(run.staleness for run in group):.1f}",
    }
    yield f"### digits by optimizer: {len({run.seed for run in mine})} seeds"
    for title, cell in cells.items():
        rows = []
        for contender in CONTENDERS:
            lr: Hyperparameters = (("lr", contender.lr),)
            one = chosen(runs, GRID, optimizer=contender.name, hyperparameters=lr, label="sync")
            for label in labels(mine):
                if title == STALENESS and label.startswith("sync"):
                    continue
                groups = [chosen(mine, WORKERS, optimizer=contender.name, label=label, workers=n) for n in counts]
                # With one worker all policies and scalings are the same.
                rows.append([contender.name, label, cell(one) if label == "sync" else "", *map(cell, groups)])
        yield markdown([title, "policy", "1 worker", *(f"{n} workers" for n in counts)], rows)


def _accuracy(group: Sequence[Run]) -> str:
    return _mean([run.accuracy for run in group if run.accuracy is not None])


def _loss(group: Sequence[Run]) -> str:
    return _mean([run.end.loss for run in group])


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _setting(
    experiment: str, scale: Scale, optimizer: str, label: str, policy: Policy, workers: int, changes: Hyperparameters
) -> Setting:
    return Setting(
        experiment=experiment,
        task="digits",
        label=label,
        policy=policy,
        workers=workers,
        batch=8,
        steps=scale.steps,
        step_seconds=scale.step_seconds,
        optimizer=optimizer,
        hyperparameters=changes,
        points=1,  # only the end is reported
    )
