"""One training run: a model on a real server, worker threads, and its loss against samples and time.

The duration of a step is simulated: a worker computes its gradient, sleeps for the rest of `step_seconds`, varied by
20 %, and pushes. Workers therefore wait for each other as on separate machines, although they share two cores. They
are threads, because they mostly sleep; the server has its own process.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from secrets import token_hex

import numpy as np

import deltaserve
from benchmarks.convergence_learners import TIMEOUT_SECONDS, Learner, LocalLearner, PlainLearner
from deltaserve import StepResult
from deltaserve_server.recipes.batches import Rows
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import Policy, Weights

JITTER = 0.2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of a run.

    Attributes:
        experiment: The table and plot that the run belongs to.
        task: Name of the recipe.
        label: Name of the policy in tables and plots.
        policy: Policy of the model.
        workers: Number of workers.
        batch: Samples of one worker in one step.
        steps: Steps of all workers together.
        step_seconds: Duration of a worker's step, without the push.
        slow: Factor by which the last worker's steps are longer.
        local_steps: Steps of SGD per push; 0 means that every gradient is pushed.
        local_lr: Learning rate of SGD.
        optimizer: Name of the optimizer in the recipe.
        hyperparameters: Its hyperparameters that differ from the recipe's.
        points: Approximate number of measurements of the loss.
    """

    experiment: str
    task: str
    label: str
    policy: Policy
    workers: int
    batch: int
    steps: int
    step_seconds: float
    slow: float = 1.0
    local_steps: int = 0
    local_lr: float = 0.1
    optimizer: str = "adadelta"
    hyperparameters: tuple[tuple[str, float], ...] = ()
    points: int = 25


@dataclass(frozen=True, slots=True)
class Point:
    """The loss over all training examples after some samples of all workers, seconds and pushes."""

    samples: int
    seconds: float
    pushes: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The outcome of a setting with a seed. The first fields are those of the setting.

    Attributes:
        pushes: Number of pushes, refused ones included.
        refused: Number of pushes that were refused as too stale.
        staleness: Mean staleness of the applied pushes.
        megabytes: Size of the gradients that all workers sent.
        steps_by_worker: Number of steps of each worker.
        accuracy: Fraction of the test examples that are classified correctly at the end; None without test examples.
        points: The curve, to the end of the run.
    """

    experiment: str
    task: str
    label: str
    workers: int
    local_steps: int
    optimizer: str
    hyperparameters: tuple[tuple[str, float], ...]
    seed: int
    pushes: int
    refused: int
    staleness: float
    megabytes: float
    steps_by_worker: tuple[int, ...]
    accuracy: float | None
    points: tuple[Point, ...]

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[-1]

    def reached(self, loss: float, what: str) -> float | None:
        """Returns the samples, seconds or pushes at which the curve first reaches a loss; None if it never does."""
        for before, after in pairwise(self.points):
            if after.loss <= loss:
                part = (before.loss - loss) / (before.loss - after.loss)
                low, high = getattr(before, what), getattr(after, what)
                return float(low + part * (high - low))
        return None


@dataclass(slots=True)
class _Shot:
    version: int
    seconds: float
    weights: Weights


@dataclass
class _Log:
    """The common record of the workers of a run."""

    stride: int
    started: float = 0.0
    applied: list[tuple[StepResult, int]] = field(default_factory=list)
    refused: list[tuple[float, int]] = field(default_factory=list)
    shots: dict[int, _Shot] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def push(self, learner: Learner, samples: int) -> None:
        """Records a push of some samples, and the weights if a measurement is due."""
        now = time.perf_counter() - self.started
        with self._lock:
            if learner.result is None:
                self.refused.append((now, samples))
            else:
                self.applied.append((learner.result, samples))
            turn = learner.version // self.stride
            due = turn not in self.shots
            if due:
                self.shots[turn] = _Shot(learner.version, now, {})
        if due:
            self.shots[turn].weights = {name: array.copy() for name, array in learner.weights.items()}


def train(setting: Setting, recipe: NumpyRecipe, target: str, seed: int) -> Callable[[], Run]:
    """Trains; returns a function that evaluates the losses, which must not disturb the timing of other runs.

    Args:
        setting: The settings of the run.
        recipe: The recipe `setting.task`; its seed and optimizer are replaced.
        target: Address of the server.
        seed: Decides initial weights, order of examples and jitter of the steps.
    """
    changes = dict(setting.hyperparameters)
    optimizer = replace(recipe.optimizers[setting.optimizer], **changes)
    recipe = replace(recipe, seed=seed, optimizer=optimizer)
    with deltaserve.connect(target, timeout_seconds=TIMEOUT_SECONDS) as client:
        name = f"{setting.task}-{token_hex(4)}"
        model = client.create_model(name, recipe.initial_weights(), optimizer=optimizer, policy=setting.policy)
        log = _Log(stride=max(_updates(setting) // setting.points, 1))
        try:
            counts, seconds = _train(setting, recipe, target, name, seed, log)
            state = model.pull_state(optimizer_state=False)
        finally:
            model.delete()
    last = _Shot(state.version, seconds, state.weights)
    return lambda: _evaluated(setting, recipe, seed, log, last, counts)


def _updates(setting: Setting) -> int:
    per_update = setting.workers if isinstance(setting.policy, deltaserve.Sync) else 1
    return setting.steps // (per_update * max(setting.local_steps, 1))


def _train(
    setting: Setting, recipe: NumpyRecipe, target: str, model: str, seed: int, log: _Log
) -> tuple[tuple[int, ...], float]:
    """Returns the number of steps of each worker, and the seconds until the last one finished."""
    batches = _Batches(len(recipe.train), setting.batch, setting.steps, seed)

    def begin() -> None:
        log.started = time.perf_counter()

    barrier = threading.Barrier(setting.workers, begin, timeout=TIMEOUT_SECONDS)

    def work(index: int) -> int:
        try:
            learner = _learner(setting, recipe, target, model, f"worker-{index:02}")
        except BaseException:
            barrier.abort()
            raise
        try:
            barrier.wait()
            return _work(setting, learner, batches, np.random.default_rng((seed, index, 1)), log, index)
        finally:
            learner.close()

    with ThreadPoolExecutor(setting.workers) as executor:
        counts = tuple(executor.map(work, range(setting.workers)))
    return counts, time.perf_counter() - log.started


def _learner(setting: Setting, recipe: NumpyRecipe, target: str, model: str, worker: str) -> Learner:
    if not setting.local_steps:
        return PlainLearner(recipe, target, model, worker)
    return LocalLearner(recipe, target, model, worker, setting.policy, setting.local_steps, setting.local_lr)


def _work(
    setting: Setting, learner: Learner, batches: "_Batches", random: np.random.Generator, log: _Log, index: int
) -> int:
    slow = setting.slow if index == setting.workers - 1 else 1.0
    count = samples = 0
    for rows in batches:
        ready = time.perf_counter() + setting.step_seconds * slow * random.uniform(1 - JITTER, 1 + JITTER)
        learner.compute(rows)
        time.sleep(max(ready - time.perf_counter(), 0.0))
        count, samples, before = count + 1, samples + len(rows), learner.pushes
        learner.step(float(len(rows)))
        if learner.pushes > before:
            log.push(learner, samples)
            samples = 0
    if samples:
        learner.finish()
        log.push(learner, samples)
    return count


class _Batches:
    """Hands out batches of equal size to the workers, epoch after epoch."""

    def __init__(self, examples: int, size: int, count: int, seed: int) -> None:
        random = np.random.default_rng((seed, 0))
        epochs = -(-size * count // examples)
        order = np.concatenate([random.permutation(examples) for _ in range(epochs)])
        self._batches = iter(order[: size * count].reshape(count, size))
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Rows]:
        while True:
            with self._lock:
                rows = next(self._batches, None)
            if rows is None:
                return
            yield rows


def _evaluated(
    setting: Setting, recipe: NumpyRecipe, seed: int, log: _Log, last: _Shot, counts: tuple[int, ...]
) -> Run:
    start = _Shot(0, 0.0, recipe.initial_weights())
    shots = [start, *sorted(log.shots.values(), key=lambda shot: shot.version), last]
    points = tuple(
        Point(*_cost(log, shot), recipe.loss(shot.weights))
        for shot, after in zip(shots, [*shots[1:], None], strict=True)
        if after is None or after.version > shot.version
    )
    pushes = len(log.applied) + len(log.refused)
    size = sum(array.nbytes for array in start.weights.values())
    return Run(
        experiment=setting.experiment,
        task=setting.task,
        label=setting.label,
        workers=setting.workers,
        local_steps=setting.local_steps,
        optimizer=setting.optimizer,
        hyperparameters=setting.hyperparameters,
        seed=seed,
        pushes=pushes,
        refused=len(log.refused),
        staleness=float(np.mean([result.staleness or 0 for result, _ in log.applied])),
        megabytes=pushes * size / 1e6,
        steps_by_worker=counts,
        accuracy=recipe.accuracy(last.weights),
        points=points,
    )


def _cost(log: _Log, shot: _Shot) -> tuple[int, float, int]:
    """Returns samples, seconds and pushes of a version: the pushes that it contains, and those refused by then."""
    held = [samples for result, samples in log.applied if result.version <= shot.version]
    lost = [samples for seconds, samples in log.refused if seconds <= shot.seconds]
    return sum(held) + sum(lost), shot.seconds, len(held) + len(lost)


def train_all(
    settings: Sequence[Setting],
    recipes: dict[str, NumpyRecipe],
    target: str,
    seeds: Sequence[int],
    slots: int,
    report: Callable[[str], None],
) -> list[Run]:
    """Trains every setting with every seed, seed by seed, so that other load on the machine affects all settings.

    Args:
        settings: The settings of the runs.
        recipes: Recipes by task.
        target: Address of the server.
        seeds: Each setting runs once with each seed.
        slots: Number of workers that run at the same time, in all runs together.
        report: Called with a line of progress.
    """
    runs: list[Run] = []
    for workers in sorted({setting.workers for setting in settings}):
        chosen = [(setting, seed) for seed in seeds for setting in settings if setting.workers == workers]
        started = time.perf_counter()
        with ThreadPoolExecutor(max(slots // workers, 1)) as executor:
            done = list(executor.map(lambda pair: train(pair[0], recipes[pair[0].task], target, pair[1]), chosen))
        runs += [evaluate() for evaluate in done]
        report(f"{len(chosen)} runs of {workers} workers: {time.perf_counter() - started:.0f} s")
    return runs
