"""The recipes against a server, workers in this process: the numbers of a local run, the losses of the book."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.recipes import book

import deltaserve
from deltaserve_server.recipes import linear
from deltaserve_server.recipes.airfoil import AirfoilConcise, AirfoilScratch
from deltaserve_server.recipes.batches import BatchPlan, Rows, WorkerBatch
from deltaserve_server.recipes.data import Examples, load_airfoil
from deltaserve_server.recipes.recipe import JoinOptions, Policy, Recipe
from deltaserve_server.recipes.worker import Job, Message, Progress, Trainer, WorkerResult, train

Doubles = NDArray[np.float64]


@pytest.fixture(scope="module")
def examples(synthetic_file: Path) -> Examples:
    """The first 300 synthetic examples, which keeps the trainings short."""
    whole = load_airfoil(synthetic_file)
    return Examples(features=whole.features[:300], labels=whole.labels[:300])


def join(target: str, model: str, policy: Policy) -> JoinOptions:
    return JoinOptions(target=target, model=model, policy=policy, timeout_seconds=30.0)


def jobs(recipe: Recipe, options: JoinOptions, workers: int) -> list[Job]:
    return [
        Job(recipe=recipe, join=options, worker=worker, workers=workers, elastic=False) for worker in range(workers)
    ]


def train_together(work: Sequence[Job]) -> None:
    """Does the jobs' steps in threads, the sessions opened one after the other: the first one makes the weights."""
    with ExitStack() as stack, ThreadPoolExecutor(len(work)) as threads:
        learners = [stack.enter_context(job.recipe.learner(job.join)) for job in work]

        def steps(number: int) -> None:
            for batch in work[number].plan(learners[number].rank).batches():
                learners[number].step(batch)

        assert list(threads.map(steps, range(len(work)))) == [None] * len(work)


def final_weights(target: str, model: str) -> tuple[int, list[NDArray[np.float32]]]:
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        state = client.model(model).pull_state(optimizer_state=False)
    return state.version, list(state.weights.values())


def local_adadelta(
    weights: dict[str, Doubles],
    batches: Iterator[WorkerBatch],
    gradients: Callable[[dict[str, Doubles], Rows], dict[str, Doubles]],
    eps: float,
) -> dict[str, Doubles]:
    """The book's update (equations 1 to 4, rho 0.9), in float64, one worker."""
    s = {name: np.zeros_like(value) for name, value in weights.items()}
    delta = {name: np.zeros_like(value) for name, value in weights.items()}
    for batch in batches:
        for name, g in gradients(weights, batch.rows).items():
            s[name] = 0.9 * s[name] + 0.1 * g**2
            step = np.sqrt(delta[name] + eps) / np.sqrt(s[name] + eps) * g
            weights[name] = weights[name] - step
            delta[name] = 0.9 * delta[name] + 0.1 * step**2
    return weights


def whole_batches(recipe: Recipe, workers: int) -> Iterator[WorkerBatch]:
    """Returns the batches of several workers as one worker would take them."""
    return BatchPlan(
        examples=len(recipe.train),
        batch_size=recipe.batch_size * workers,
        epochs=recipe.epochs,
        seed=(recipe.seed,),
    ).batches()


# The server and the local run make the same updates, in float32 and float64. An update's rounding error is 1e-7 of the
# weights, which are below 1. The optimum attracts both runs, so that errors do not add up over the updates.
WEIGHTS_TOLERANCE = 2e-6
LOSS_TOLERANCE = 1e-6


@pytest.mark.parametrize("workers", [1, 4])
def test_scratch_with_n_workers_is_the_local_run_with_n_times_the_batch(
    target: str, model: str, examples: Examples, workers: int
) -> None:
    recipe = AirfoilScratch(train=examples, seed=5)
    x, y = examples.features.astype(np.float64), examples.labels.astype(np.float64)

    def gradients(v: dict[str, Doubles], rows: Rows) -> dict[str, Doubles]:
        error = (x[rows] @ v["w"] + v["b"]).ravel() - y[rows]
        return {"w": (x[rows].T @ error).reshape(5, 1) / len(error), "b": error.mean(keepdims=True)}

    train_together(jobs(recipe, join(target, model, deltaserve.Sync(min_workers=workers)), workers))
    first = {name: value.astype(np.float64) for name, value in recipe.initial_weights().items()}
    expected = local_adadelta(first, whole_batches(recipe, workers), gradients, eps=1e-5)
    version, (w, b) = final_weights(target, model)
    assert version == 2 * -(-300 // (10 * workers))
    np.testing.assert_allclose(w, expected["w"], atol=WEIGHTS_TOLERANCE)
    np.testing.assert_allclose(b, expected["b"], atol=WEIGHTS_TOLERANCE)
    local_loss = np.square((x @ expected["w"] + expected["b"]).ravel() - y).mean() / 2
    assert recipe.loss({"w": w, "b": b}) == pytest.approx(local_loss, abs=LOSS_TOLERANCE)


TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adadelta": partial(torch.optim.Adadelta, rho=0.9),
    "sgd": partial(torch.optim.SGD, lr=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.005, momentum=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, alpha=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
"""The book's concise optimizers, and AdamW."""


def train_torch(recipe: Recipe, name: str, workers: int = 1) -> tuple[torch.nn.Linear, float]:
    """Trains with torch's own optimizer; returns the network, and half the mean squared error."""
    torch.manual_seed(recipe.seed)
    net = torch.nn.Linear(5, 1)
    torch.nn.init.normal_(net.weight, std=0.01)
    optimizer, criterion = TORCH[name](net.parameters()), torch.nn.MSELoss()
    x, y = torch.from_numpy(recipe.train.features), torch.from_numpy(recipe.train.labels).reshape(-1, 1)
    for batch in whole_batches(recipe, workers):
        optimizer.zero_grad()
        criterion(net(x[batch.rows]), y[batch.rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return net, criterion(net(x), y).item() / 2


@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in TORCH), ("adadelta", 4), ("adam", 4)])
def test_concise_with_n_workers_is_torch_with_n_times_the_batch(
    target: str, model: str, examples: Examples, name: str, workers: int
) -> None:
    recipe = AirfoilConcise(train=examples, seed=5, optimizer=AirfoilConcise.optimizers[name])
    net, local_loss = train_torch(recipe, name, workers)
    train_together(jobs(recipe, join(target, model, deltaserve.Sync(min_workers=workers)), workers))
    version, (bias, weight) = final_weights(target, model)  # the order of gradients
    assert version == 4 * -(-300 // (10 * workers))
    np.testing.assert_allclose(weight, net.weight.detach().numpy(), atol=WEIGHTS_TOLERANCE)
    np.testing.assert_allclose(bias, net.bias.detach().numpy(), atol=WEIGHTS_TOLERANCE)
    assert recipe.loss({"weight": weight, "bias": bias}) == pytest.approx(local_loss, abs=LOSS_TOLERANCE)


def final_loss(recipe: Recipe, target: str, model: str) -> float:
    """Trains with one worker, and returns the final loss."""
    reports: list[Message] = []
    train(jobs(recipe, join(target, model, deltaserve.Async()), 1)[0], reports.append)
    assert isinstance(reports[-1], WorkerResult)
    return reports[-1].curve[-1][1]


@pytest.fixture(scope="module")
def bands(real_file: Path) -> dict[str, list[float]]:
    """The final losses of ten local seeds, by optimizer of the book."""
    examples = load_airfoil(real_file)
    return {name: book.losses(update, examples) for name, update in book.UPDATES.items()}


@pytest.mark.parametrize("name", book.UPDATES)
def test_every_optimizer_of_the_book_lands_in_the_band_of_ten_local_seeds(
    target: str, model: str, real_file: Path, bands: dict[str, list[float]], name: str
) -> None:
    examples, band = load_airfoil(real_file), bands[name]
    loss = final_loss(AirfoilScratch(train=examples, optimizer=AirfoilScratch.optimizers[name]), target, model)
    assert min(band) <= loss <= max(band)
    # The same seed: what differs is rounding, and the place of eps in Adagrad and RMSprop.
    assert loss == pytest.approx(band[0], abs=1e-4 if name in ("adagrad", "rmsprop") else LOSS_TOLERANCE)


def test_the_bands_hold_the_losses_that_the_book_prints(bands: dict[str, list[float]]) -> None:
    for name, printed in {"sgd": 0.246, "momentum": 0.243, "adagrad": 0.243, "rmsprop": 0.245, "adam": 0.243}.items():
        assert round(min(bands[name]), 3) <= printed <= round(max(bands[name]), 3)


@pytest.mark.deep
@pytest.mark.parametrize("name", AirfoilConcise.optimizers)
def test_every_concise_optimizer_lands_in_the_band_of_ten_local_seeds(
    target: str, model: str, real_file: Path, name: str
) -> None:
    examples = load_airfoil(real_file)
    band = [train_torch(AirfoilConcise(train=examples, seed=seed), name)[1] for seed in range(10)]
    optimizer = AirfoilConcise.optimizers[name]
    loss = final_loss(AirfoilConcise(train=examples, seed=0, optimizer=optimizer), target, model)
    assert min(band) - LOSS_TOLERANCE <= loss <= max(band) + LOSS_TOLERANCE


@pytest.mark.deep
@pytest.mark.parametrize(("kind", "low", "high"), [(AirfoilScratch, 0.2417, 0.2520), (AirfoilConcise, 0.2417, 0.2440)])
def test_ten_seeds_land_where_the_book_does(
    target: str, model: str, real_file: Path, kind: type[AirfoilScratch | AirfoilConcise], low: float, high: float
) -> None:
    examples = load_airfoil(real_file)
    losses = [final_loss(kind(train=examples, seed=seed), target, f"{model}-{seed}") for seed in range(10)]
    assert low <= min(losses)
    assert max(losses) <= high


def test_a_worker_reports_its_progress_and_the_books_curve(target: str, model: str, examples: Examples) -> None:
    reports: list[Message] = []
    recipe = AirfoilScratch(train=examples)
    train(jobs(recipe, join(target, model, deltaserve.Async()), 1)[0], reports.append)
    *progress, done = reports
    assert isinstance(done, WorkerResult)
    assert done.samples == 600
    assert 0 < done.training_seconds <= done.ended - done.started
    # Every 200 examples, as the book's train_ch11 does.
    assert [round(300 * epoch) for epoch, _ in done.curve] == [200, 400, 600]
    steps = [one.step for one in progress if isinstance(one, Progress)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 60)
    _, (w, b) = final_weights(target, model)
    assert done.curve[-1][1] == pytest.approx(linear.loss(w, b, examples.features, examples.labels))


def test_a_later_run_continues_from_the_models_weights(target: str, model: str, examples: Examples) -> None:
    recipe = AirfoilScratch(train=examples)
    for run in (1, 2):
        reports: list[Message] = []
        train(jobs(recipe, join(target, model, deltaserve.Async()), 1)[0], reports.append)
        assert final_weights(target, model)[0] == 60 * run
    assert isinstance(reports[-1], WorkerResult)
    assert reports[-1].curve[0][1] < 0.3


def test_elastic_workers_take_their_examples_in_different_orders(examples: Examples) -> None:
    job = Job(
        recipe=AirfoilScratch(train=examples),
        join=join("localhost:1", "m", deltaserve.Sync()),
        worker=0,
        workers=1,
        elastic=True,
    )
    first = [next(job.plan(rank).batches()).rows.tolist() for rank in range(4)]
    assert len({tuple(rows) for rows in first}) == 4
    assert first[1] == next(job.plan(1).batches()).rows.tolist()


@pytest.mark.parametrize("kind", [AirfoilScratch, AirfoilConcise])
def test_a_push_weighs_its_samples(target: str, model: str, kind: type[AirfoilScratch | AirfoilConcise]) -> None:
    # 13 examples, batches of 10 for each of 2 workers: parts of 7 and 6.
    random = np.random.default_rng(1)
    examples = Examples(
        features=random.standard_normal((13, 5)).astype(np.float32),
        labels=random.standard_normal(13).astype(np.float32),
    )
    recipe = kind(train=examples, seed=5)
    options = join(target, model, deltaserve.Sync(min_workers=2))
    with deltaserve.connect(target, timeout_seconds=60.0) as client, ThreadPoolExecutor(1) as threads:
        work = jobs(recipe, options, 2)
        with work[0].recipe.learner(options) as first, work[1].recipe.learner(options) as second:
            events = client.model(model).watch()
            next(events)
            for ours, theirs in zip(work[0].plan(0).batches(), work[1].plan(1).batches(), strict=True):
                waiting = threads.submit(second.step, theirs)
                assert first.step(ours)
                assert waiting.result()
                assert sorted(push.weight for push in next(events).contributions) == [6.0, 7.0]
            del events
    # One worker with batches twice as large takes the same 13 at a step.
    alone = replace(recipe, batch_size=20)
    train_together(jobs(alone, join(target, f"{model}-alone", deltaserve.Sync()), 1))
    for one, other in zip(final_weights(target, model)[1], final_weights(target, f"{model}-alone")[1], strict=True):
        np.testing.assert_allclose(one, other, atol=WEIGHTS_TOLERANCE)


@pytest.mark.parametrize("kind", [AirfoilScratch, AirfoilConcise])
def test_a_late_worker_goes_on_with_the_batch_of_the_open_round(
    target: str, model: str, examples: Examples, kind: type[AirfoilScratch | AirfoilConcise]
) -> None:
    work = jobs(kind(train=examples), join(target, model, deltaserve.Sync(min_workers=1, quorum=1)), 2)
    with work[0].recipe.learner(work[0].join) as quick, work[1].recipe.learner(work[1].join) as slow:
        late = Trainer(work[1], slow)
        batches = list(work[1].plan(1).batches())
        for batch in list(work[0].plan(0).batches())[:3]:
            assert quick.step(batch)
        late.take(1, batches[0])
        assert (late.pushes, late.late, slow.version) == (1, 1, 3)
        late.take(2, batches[1])
        late.take(3, batches[2])
        assert (late.pushes, late.skipped) == (1, 2)
        late.take(4, batches[3])
        assert (late.pushes, late.late, late.skipped, late.samples, slow.version) == (2, 1, 2, 10, 4)
        # Under another policy versions no longer count rounds.
        quick.model.update(policy=deltaserve.Async())
        for batch in list(work[0].plan(0).batches())[3:6]:
            quick.step(batch)
        late.take(5, batches[4])
        late.take(6, batches[5])
        assert (late.pushes, late.late, late.skipped, late.samples) == (4, 1, 2, 30)


def test_a_stale_gradient_is_counted_as_late(target: str, model: str, examples: Examples) -> None:
    work = jobs(AirfoilScratch(train=examples), join(target, model, deltaserve.Async(max_staleness=0)), 2)
    with work[0].recipe.learner(work[0].join) as quick, work[1].recipe.learner(work[1].join) as slow:
        late = Trainer(work[1], slow)
        batches = list(work[1].plan(1).batches())
        assert quick.step(batches[0])
        late.take(1, batches[0])
        late.take(2, batches[1])
    assert (late.pushes, late.late, late.skipped, late.samples) == (2, 1, 0, 10)


def test_a_failed_round_is_retried_until_the_timeout(target: str, model: str, examples: Examples) -> None:
    policy = deltaserve.Sync(min_workers=2, round_timeout_seconds=0.1)
    options = join(target, model, policy)
    work = jobs(AirfoilScratch(train=examples), options, 2)
    with work[0].recipe.learner(options) as one, ThreadPoolExecutor(1) as threads:
        batch = next(work[0].plan(0).batches())
        hasty = replace(work[0], join=replace(options, timeout_seconds=0.2))
        with pytest.raises(deltaserve.UnavailableError, match="the round's time was up with 1 of the 2 pushes"):
            Trainer(hasty, one).take(1, batch)
        with work[1].recipe.learner(options) as other:
            waiting = threads.submit(Trainer(work[0], one).take, 1, batch)
            Trainer(work[1], other).take(1, batch)
            waiting.result()
            assert (one.version, other.version) == (1, 1)
