"""The experiments: policies, numbers of workers and numbers of steps."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.convergence_runs import Setting
from deltaserve import Async, Bounded, Sync
from deltaserve_server.recipes.recipe import Policy

STRAGGLER = 5.0
MAX_STALENESS = 4
EPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
LOCAL_EPS = 1e-3
LOCAL_STEPS = (1, 4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A recipe in the study.

    Attributes:
        name: Name of the recipe.
        batch: Samples of one worker in one step, as in the recipe.
        steps: Steps of all workers together, in experiments without local steps.
        local_lr: Learning rate of SGD in local steps.
        target: The loss for which the tables give the time until it is reached.
    """

    name: str
    batch: int
    steps: int
    local_lr: float
    target: float


TASKS = (
    Task(name="digits", batch=8, steps=1024, local_lr=0.1, target=0.3),
    Task(name="airfoil", batch=10, steps=640, local_lr=0.01, target=0.25),
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the study.

    Attributes:
        seeds: Runs of each setting.
        workers: Numbers of workers.
        fraction: Fraction of the tasks' steps that is run.
        step_seconds: Simulated duration of a worker's step, in experiments about wall time.
        local_steps: Steps of all workers together, in experiments with local steps.
        slots: Workers that run at the same time.
    """

    seeds: int = 5
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    fraction: float = 1.0
    step_seconds: float = 0.02
    local_steps: int = 2048
    slots: int = 16


QUICK = Scale(seeds=1, workers=(1, 4, 16), fraction=0.125, step_seconds=0.01, local_steps=256)


def settings(scale: Scale) -> list[Setting]:
    """Returns every setting of the study."""
    return [
        setting
        for task in TASKS
        for make in (_policies, _straggler, _eps, _local, _local_eps)
        for setting in make(task, scale)
    ]


def sync(workers: int) -> Sync:
    """Returns the policy that waits for all workers."""
    return Sync(min_workers=workers)


def _policies(task: Task, scale: Scale) -> Iterator[Setting]:
    for workers in scale.workers:
        policies: dict[str, Policy] = {"sync": sync(workers), "async": Async()}
        if workers > 1:
            policies["async, damping"] = Async(damping=True)
        if workers >= MAX_STALENESS:
            policies[f"async, max_staleness {MAX_STALENESS}"] = Async(max_staleness=MAX_STALENESS)
        if workers in (4, 16):
            policies |= {f"bounded, slack {slack}": Bounded(slack=slack) for slack in (0, 1, 4)}
        for label, policy in policies.items():
            yield _setting("policies", task, scale, label, policy, workers)


def _straggler(task: Task, scale: Scale) -> Iterator[Setting]:
    policies: dict[str, Policy] = {
        "sync": sync(4),
        "sync, quorum 3": Sync(quorum=3),
        "bounded, slack 4": Bounded(slack=4),
        "async": Async(),
        "async, damping": Async(damping=True),
    }
    for label, policy in policies.items():
        yield replace(_setting("straggler", task, scale, label, policy, 4), slow=STRAGGLER)


def _eps(task: Task, scale: Scale) -> Iterator[Setting]:
    for eps in EPS:
        setting = _setting("eps", task, scale, "sync", sync(16), 16)
        yield replace(setting, hyperparameters=(("eps", eps),), step_seconds=0.01)


def _local(task: Task, scale: Scale) -> Iterator[Setting]:
    policies: dict[str, Policy] = {"sync": sync(4)}
    if task.name == "digits":
        policies |= {"async": Async(), "async, damping": Async(damping=True)}
    for count, (label, policy) in product(LOCAL_STEPS, policies.items()):
        yield _with_local_steps("local", task, scale, label, policy, count, LOCAL_EPS)


def _local_eps(task: Task, scale: Scale) -> Iterator[Setting]:
    for eps in EPS:
        yield _with_local_steps("local eps", task, scale, "sync", sync(4), 16, eps)


def _with_local_steps(
    experiment: str, task: Task, scale: Scale, label: str, policy: Policy, count: int, eps: float
) -> Setting:
    return replace(
        _setting(experiment, task, scale, label, policy, 4),
        steps=scale.local_steps,
        step_seconds=0.004,
        local_steps=count,
        local_lr=task.local_lr,
        hyperparameters=(("eps", eps), ("rho", 0.9)),
    )


def _setting(experiment: str, task: Task, scale: Scale, label: str, policy: Policy, workers: int) -> Setting:
    return Setting(
        experiment=experiment,
        task=task.name,
        label=label,
        policy=policy,
        workers=workers,
        batch=task.batch,
        steps=int(task.steps * scale.fraction),
        step_seconds=scale.step_seconds,
    )
