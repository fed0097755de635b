"""One training run: a model on a real server, worker threads, and its loss against samples and time.

A worker's step takes a simulated time: it computes its gradient, sleeps for the rest of `step_seconds`, give or take
20 %, and pushes. So workers wait for each other as on machines of their own, though they share two cores. They are
threads: what they do beside sleeping is short, and the server has a process, and an interpreter, of its own.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
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
    """What is run.

    Attributes:
        experiment: Which table and plot it belongs to.
        task: The recipe's name.
        label: The policy's name in tables and plots.
        policy: Of the model.
        workers: How many.
        batch: Samples of a worker's step.
        steps: Of all workers together.
        step_seconds: What a worker's step takes, without the push.
        slow: The last worker's step takes so many times as long.
        local_steps: Steps of SGD before a push; 0 means that every gradient is pushed as it is.
        local_lr: Of SGD.
        hyperparameters: Of Adadelta, where they are not the recipe's.
        points: How often the loss is looked at, about.
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
    hyperparameters: tuple[tuple[str, float], ...] = ()
    points: int = 25


@dataclass(frozen=True, slots=True)
class Point:
    """The loss over all training examples, and what it had cost by then: samples of all workers, seconds, pushes."""

    samples: int
    seconds: float
    pushes: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a setting with a seed; the fields but the last few are the setting's.

    Attributes:
        pushes: How many were made, refused ones included.
        refused: How many of them were too old.
        staleness: The mean over the pushes that count.
        megabytes: Of gradients, sent by all workers.
        steps_by_worker: Its steps, by worker.
        points: The curve; the last point is the end.
    """

    experiment: str
    task: str
    label: str
    workers: int
    local_steps: int
    hyperparameters: tuple[tuple[str, float], ...]
    seed: int
    pushes: int
    refused: int
    staleness: float
    megabytes: float
    steps_by_worker: tuple[int, ...]
    points: tuple[Point, ...]

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[-1]

    def reached(self, loss: float, what: str) -> float | None:
        """Returns the samples, seconds or pushes at which the curve first has a loss; None where it never has."""
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
    """What the workers of a run note down together."""

    stride: int
    started: float = 0.0
    applied: list[tuple[StepResult, int]] = field(default_factory=list)
    refused: list[tuple[float, int]] = field(default_factory=list)
    shots: dict[int, _Shot] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def push(self, learner: Learner, samples: int) -> None:
        """Notes a push of so many samples, and keeps the weights where it is time to."""
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
    """Trains; returns what then evaluates the losses, which is not to disturb the clock of other runs.

    Args:
        setting: What is run.
        recipe: Of `setting.task`; its seed is replaced.
        target: The server.
        seed: For initial weights, order of examples, and the jitter of the steps.
    """
    recipe = replace(recipe, seed=seed)
    with deltaserve.connect(target, timeout_seconds=TIMEOUT_SECONDS) as client:
        hyperparameters = {**asdict(recipe.hyperparameters()), **dict(setting.hyperparameters)}
        name = f"{setting.task}-{token_hex(4)}"
        model = client.create_model(name, recipe.initial_weights(), policy=setting.policy, **hyperparameters)
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
    """Returns the steps of each worker, and the seconds until the last of them was done."""
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
    settings = dict(setting.hyperparameters)
    if not setting.local_steps:
        return PlainLearner(recipe, target, model, worker, settings)
    return LocalLearner(recipe, target, model, worker, settings, setting.policy, setting.local_steps, setting.local_lr)


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
    """Hands out batches to whoever asks first: one epoch's order after the other, cut into batches of equal size."""

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
        hyperparameters=setting.hyperparameters,
        seed=seed,
        pushes=pushes,
        refused=len(log.refused),
        staleness=float(np.mean([result.staleness or 0 for result, _ in log.applied])),
        megabytes=pushes * size / 1e6,
        steps_by_worker=counts,
        points=points,
    )


def _cost(log: _Log, shot: _Shot) -> tuple[int, float, int]:
    """Returns what the weights of a version had cost: the pushes in them, and those refused until then."""
    held = [samples for result, samples in log.applied if result.version <= shot.version]
    lost = [samples for seconds, samples in log.refused if seconds <= shot.seconds]
    return sum(held) + sum(lost), shot.seconds, len(held) + len(lost)


def train_all(
    settings: Sequence[Setting],
    recipes: dict[str, NumpyRecipe],
    target: str,
    seeds: Sequence[int],
    slots: int,
    tell: Callable[[str], None],
) -> list[Run]:
    """Trains every setting with every seed, seed by seed, so that what else the machine does meets all settings.

    Args:
        settings: What is run.
        recipes: By task.
        target: The server.
        seeds: Each setting is run once with each.
        slots: How many workers may work at the same time, in all runs that go on.
        tell: Is told what is done.
    """
    runs: list[Run] = []
    for workers in sorted({setting.workers for setting in settings}):
        chosen = [(setting, seed) for seed in seeds for setting in settings if setting.workers == workers]
        started = time.perf_counter()
        with ThreadPoolExecutor(max(slots // workers, 1)) as executor:
            done = list(executor.map(lambda one: train(one[0], recipes[one[0].task], target, one[1]), chosen))
        runs += [evaluate() for evaluate in done]
        tell(f"{len(chosen)} runs of {workers} workers: {time.perf_counter() - started:.0f} s")
    return runs
