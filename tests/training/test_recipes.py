"""The recipes against a real server, workers in this process: the numbers of a local run, the losses of the book."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deltaserve
from deltaserve_server.training import linear
from deltaserve_server.training.batches import Plan, Share
from deltaserve_server.training.data import Examples, load_airfoil
from deltaserve_server.training.recipes import AirfoilConcise, AirfoilScratch, Policy, Recipe, Seat
from deltaserve_server.training.worker import Done, Job, Message, Progress, train

Doubles = NDArray[np.float64]


@pytest.fixture(scope="module")
def made_up(made_up_file: Path) -> Examples:
    return load_airfoil(made_up_file)


def seat(target: str, model: str, policy: Policy) -> Seat:
    return Seat(target=target, model=model, policy=policy, timeout_seconds=30.0)


def jobs(recipe: Recipe, where: Seat, workers: int) -> list[Job]:
    return [
        Job(recipe=recipe, seat=where, worker=worker, workers=workers, elastic=False, skip_empty=False)
        for worker in range(workers)
    ]


def train_together(work: Sequence[Job]) -> None:
    """Does the jobs' steps in threads, the sessions opened one after the other: the first one makes the weights."""
    with ExitStack() as stack, ThreadPoolExecutor(len(work)) as threads:
        learners = [stack.enter_context(job.recipe.learner(job.seat)) for job in work]

        def steps(number: int) -> None:
            for share in work[number].plan(learners[number].rank).shares():
                learners[number].step(share)

        assert list(threads.map(steps, range(len(work)))) == [None] * len(work)


def final_weights(target: str, model: str) -> tuple[int, list[NDArray[np.float32]]]:
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        state = client.model(model).pull_state(optimizer_state=False)
    return state.version, list(state.weights.values())


def local_adadelta(
    weights: dict[str, Doubles],
    shares: Iterator[Share],
    gradients: Callable[[dict[str, Doubles], Share], dict[str, Doubles]],
    eps: float,
) -> dict[str, Doubles]:
    """The book's update (equations 1 to 4, rho 0.9), in float64, one worker."""
    s = {name: np.zeros_like(value) for name, value in weights.items()}
    delta = {name: np.zeros_like(value) for name, value in weights.items()}
    for share in shares:
        for name, g in gradients(weights, share).items():
            s[name] = 0.9 * s[name] + 0.1 * g**2
            step = np.sqrt(delta[name] + eps) / np.sqrt(s[name] + eps) * g
            weights[name] = weights[name] - step
            delta[name] = 0.9 * delta[name] + 0.1 * step**2
    return weights


def whole_batches(recipe: Recipe, workers: int) -> Iterator[Share]:
    """The batches that so many workers make together, as one worker would take them."""
    return Plan(
        examples=len(recipe.train),
        batch_size=recipe.batch_size * workers,
        epochs=recipe.epochs,
        seed=(recipe.seed,),
    ).shares()


# Server and local run do the same updates, in float32 and in float64. An update's rounding error is about 1e-7 of the
# weights (which are below 1); the optimum draws both runs to itself, so that errors do not add up over 300 updates.
WEIGHTS_TOLERANCE = 2e-6
LOSS_TOLERANCE = 1e-6


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_scratch_with_n_workers_is_the_local_run_with_n_times_the_batch(
    target: str, model: str, made_up: Examples, workers: int
) -> None:
    recipe = AirfoilScratch(train=made_up, seed=5)
    x, y = made_up.features.astype(np.float64), made_up.labels.astype(np.float64)

    def gradients(v: dict[str, Doubles], share: Share) -> dict[str, Doubles]:
        off = (x[share.rows] @ v["w"] + v["b"]).ravel() - y[share.rows]
        return {"w": (x[share.rows].T @ off).reshape(5, 1) / len(off), "b": off.mean(keepdims=True)}

    train_together(jobs(recipe, seat(target, model, deltaserve.Sync(min_workers=workers)), workers))
    first = {name: value.astype(np.float64) for name, value in recipe.initial_weights().items()}
    expected = local_adadelta(first, whole_batches(recipe, workers), gradients, eps=1e-5)
    version, (w, b) = final_weights(target, model)
    assert version == 2 * -(-1500 // (10 * workers))
    np.testing.assert_allclose(w, expected["w"], atol=WEIGHTS_TOLERANCE)
    np.testing.assert_allclose(b, expected["b"], atol=WEIGHTS_TOLERANCE)
    local_loss = np.square((x @ expected["w"] + expected["b"]).ravel() - y).mean() / 2
    assert recipe.loss({"w": w, "b": b}) == pytest.approx(local_loss, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_concise_with_n_workers_is_torch_with_n_times_the_batch(
    target: str, model: str, made_up: Examples, workers: int
) -> None:
    recipe = AirfoilConcise(train=made_up, seed=5)
    torch.manual_seed(recipe.seed)
    net = torch.nn.Linear(5, 1)
    torch.nn.init.normal_(net.weight, std=0.01)
    optimizer, criterion = torch.optim.Adadelta(net.parameters(), rho=0.9), torch.nn.MSELoss()
    x, y = torch.from_numpy(made_up.features), torch.from_numpy(made_up.labels).reshape(-1, 1)
    for share in whole_batches(recipe, workers):
        optimizer.zero_grad()
        criterion(net(x[share.rows]), y[share.rows]).backward()
        optimizer.step()

    train_together(jobs(recipe, seat(target, model, deltaserve.Sync(min_workers=workers)), workers))
    version, (weight, bias) = final_weights(target, model)
    assert version == 4 * -(-1500 // (10 * workers))
    np.testing.assert_allclose(weight, net.weight.detach().numpy(), atol=WEIGHTS_TOLERANCE)
    np.testing.assert_allclose(bias, net.bias.detach().numpy(), atol=WEIGHTS_TOLERANCE)
    with torch.no_grad():
        local_loss = criterion(net(x), y).item() / 2
    assert recipe.loss({"weight": weight, "bias": bias}) == pytest.approx(local_loss, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(("kind", "low", "high"), [(AirfoilScratch, 0.2417, 0.2520), (AirfoilConcise, 0.2417, 0.2440)])
def test_ten_seeds_land_where_the_book_does(
    target: str, model: str, real_file: Path, kind: type[AirfoilScratch | AirfoilConcise], low: float, high: float
) -> None:
    examples = load_airfoil(real_file)
    losses = []
    for seed in range(10):
        recipe = kind(train=examples, seed=seed)
        told: list[Message] = []
        train(jobs(recipe, seat(target, f"{model}-{seed}", deltaserve.Async()), 1)[0], told.append)
        done = told[-1]
        assert isinstance(done, Done)
        losses.append(done.curve[-1][1])
    assert low <= min(losses)
    assert max(losses) <= high


def test_a_worker_tells_of_its_progress_and_of_the_books_curve(target: str, model: str, made_up: Examples) -> None:
    told: list[Message] = []
    recipe = AirfoilScratch(train=made_up)
    train(jobs(recipe, seat(target, model, deltaserve.Async()), 1)[0], told.append)
    *progress, done = told
    assert isinstance(done, Done)
    assert done.samples == 3000
    assert 0 < done.training_seconds <= done.ended - done.started
    # Every 200 examples over 2 epochs of 1500, as the book's train_ch11 does.
    assert [round(1500 * epoch) for epoch, _ in done.curve] == list(range(200, 3001, 200))
    steps = [one.step for one in progress if isinstance(one, Progress)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 300)
    _, (w, b) = final_weights(target, model)
    assert done.curve[-1][1] == pytest.approx(linear.loss(w, b, made_up.features, made_up.labels))


def test_a_later_run_goes_on_from_the_models_weights(target: str, model: str, made_up: Examples) -> None:
    recipe = AirfoilScratch(train=made_up)
    for run in (1, 2):
        told: list[Message] = []
        train(jobs(recipe, seat(target, model, deltaserve.Async()), 1)[0], told.append)
        assert final_weights(target, model)[0] == 300 * run
    assert isinstance(told[-1], Done)
    assert told[-1].curve[0][1] < 0.3


def test_elastic_workers_take_their_examples_in_orders_of_their_own(made_up: Examples) -> None:
    job = Job(
        recipe=AirfoilScratch(train=made_up),
        seat=seat("localhost:1", "m", deltaserve.Sync()),
        worker=0,
        workers=1,
        elastic=True,
        skip_empty=False,
    )
    first = [next(job.plan(rank).shares()).rows.tolist() for rank in range(4)]
    assert len({tuple(rows) for rows in first}) == 4
    assert first[1] == next(job.plan(1).shares()).rows.tolist()
