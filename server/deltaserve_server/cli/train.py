"""`deltaserve train`: the recipes, with worker processes of their own."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.errors import UsageError
from deltaserve_server.cli.options import POLICY_HELP, parse_address
from deltaserve_server.cli.policy import PolicyText, format_policy, parse_policy

if TYPE_CHECKING:
    from deltaserve_server.recipes.recipe import Policy, Recipe
    from deltaserve_server.recipes.training import RunResult

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

application = typer.Typer(rich_markup_mode="rich")


@application.callback(invoke_without_command=True)
def train(context: typer.Context) -> None:
    """Train a recipe: real data, real workers, in seconds."""
    if context.invoked_subcommand is None:
        raise UsageError("say what to train: deltaserve train digits, or deltaserve train airfoil")


class AirfoilRecipe(StrEnum):
    """The book's two ways to the same regression."""

    SCRATCH = "scratch"
    CONCISE = "concise"


Workers = Annotated[int, typer.Option("--workers", "-w", min=1, max=64, metavar="N", help="Worker processes.")]
PolicyOption = Annotated[
    PolicyText,
    typer.Option(
        "--policy",
        metavar="POLICY",
        parser=parse_policy,
        help=f"{POLICY_HELP} sync waits for all workers, unless min_workers or quorum is less.",
    ),
]
TrainTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="HOST:PORT",
        parser=parse_address,
        help="The server. One worker alone joins whoever else trains the model there.",
        show_default="a server of its own, stopped at the end",
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model's name.", show_default="the recipe's")
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="For the first weights and the order of the examples.")]
Timeout = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="How long to wait for the server or other workers.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        envvar="DELTASERVE_DATA",
        help="airfoil_self_noise.dat, or the folder that holds it.",
        show_default="the cache, else a download",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw loss against epoch, as .png, .svg or .pdf.", show_default=False),
]


@application.command()
def digits(
    workers: Workers = 2,
    policy: PolicyOption = "sync",  # type: ignore[assignment]  # typer parses defaults too
    target: TrainTarget = None,
    model: ModelName = None,
    seed: Seed = 0,
    timeout: Timeout = 60.0,
) -> None:
    """Handwritten digits: a small network in numpy, 1437 images to learn from, 360 to test."""
    from deltaserve_server.recipes.data import load_digits
    from deltaserve_server.recipes.digits import Digits

    train, test = load_digits()
    _train(Digits(train=train, test=test, seed=seed), workers, policy, target, model, timeout)


@application.command()
def airfoil(
    workers: Workers = 1,
    policy: PolicyOption = "sync",  # type: ignore[assignment]  # typer parses defaults too
    recipe: Annotated[
        AirfoilRecipe, typer.Option("--recipe", help="scratch: in numpy, 2 epochs. concise: in torch, 4 epochs.")
    ] = AirfoilRecipe.SCRATCH,
    data: Data = None,
    plot: Plot = None,
    target: TrainTarget = None,
    model: ModelName = None,
    seed: Seed = 0,
    timeout: Timeout = 60.0,
) -> None:
    """Airfoil noise: the linear regression of Dive into Deep Learning's section on Adadelta."""
    from deltaserve_server.recipes import loss_figure
    from deltaserve_server.recipes.airfoil import AirfoilConcise, AirfoilScratch
    from deltaserve_server.recipes.data import find_airfoil, load_airfoil

    if plot is not None:
        loss_figure.check(plot)
    if recipe is AirfoilRecipe.CONCISE:
        _check_torch()
    examples = load_airfoil(find_airfoil(data, cache_folder()))
    kind = AirfoilConcise if recipe is AirfoilRecipe.CONCISE else AirfoilScratch
    outcome = _train(kind(train=examples, seed=seed), workers, policy, target, model, timeout)
    if plot is not None:
        loss_figure.draw(outcome.curve, kind.epochs, plot)
        typer.echo(f"figure: {plot}")


def cache_folder() -> Path:
    """Returns where this platform keeps what can be downloaded again."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "deltaserve"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaserve"


def _check_torch() -> None:
    from importlib.util import find_spec

    from deltaserve_server.recipes.errors import MissingPackageError

    if find_spec("torch") is None:
        raise MissingPackageError("torch", "torch")


def _train(
    recipe: "Recipe", workers: int, policy: PolicyText, target: str | None, model: str | None, timeout: float
) -> "RunResult":
    """Trains, shows how it goes, prints what came out."""
    from deltaserve_server.cli.progress import shown
    from deltaserve_server.recipes.training import run

    chosen = _policy(policy, workers, alone=target is None)
    # The workers share the machine's cores. They inherit this, and it is set before there are threads that read it.
    os.environ.update(ONE_THREAD)
    with _leaving_on_sigterm(), _server(target, timeout) as address:
        kind = f"{workers} worker{'s' * (workers > 1)}, {format_policy(chosen)}, batches of {recipe.batch_size} each"
        typer.echo(f"{recipe.name}: {len(recipe.train)} examples, {recipe.epochs} epochs, {kind}")
        with shown(workers) as observer:
            outcome = run(
                recipe,
                target=address,
                model=model,
                workers=workers,
                policy=chosen,
                elastic=target is not None and workers == 1,
                timeout_seconds=timeout,
                observer=observer,
            )
    _print(outcome)
    if target is not None:
        name = model or recipe.name
        typer.echo(f"the weights: deltaserve pull {name} --target {target} -o {name}.safetensors")
    return outcome


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM unwind, so that workers and server are stopped; in a container it would do nothing otherwise."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _server(target: str | None, timeout: float) -> "Iterator[str]":
    """Yields a server's address: the one that was asked for, or that of one which lives as long as this block."""
    import deltaserve

    if target is not None:
        with deltaserve.connect(target, timeout_seconds=timeout) as client:  # which waits for it as workers do
            version = client.server_info().version
        typer.echo(f"server: {target}, deltaserve {version}")
        yield target
        return
    from deltaserve_server import LocalServer

    with LocalServer() as server:
        typer.echo(f"server: {server.target}, in this process")
        yield server.target


def _policy(written: PolicyText, workers: int, alone: bool) -> "Policy":
    """Returns the policy: a round of `sync` is of all workers of the run, or of a quorum, unless it says otherwise.

    Args:
        written: What was asked for.
        workers: Of this run.
        alone: Whether no others can join them.

    Raises:
        UsageError: No round would ever close.
    """
    import deltaserve

    if written.kind is not deltaserve.Sync:
        return written.policy()
    policy = written.policy(min_workers=written.settings.get("quorum", workers))
    assert isinstance(policy, deltaserve.Sync)
    if alone and policy.min_workers > workers:
        raise UsageError(f"a round of {policy.min_workers} workers never closes with {workers}: give --workers too")
    return policy


def _print(outcome: "RunResult") -> None:
    if outcome.accuracy is not None:
        typer.echo(f"test accuracy: {outcome.accuracy:.3f}")
    typer.echo(f"loss: {outcome.loss:.3f}, {outcome.epoch_seconds:.3f} sec/epoch")
    typer.echo(f"updates applied: {outcome.updates} (the model is at version {outcome.version})")
    if outcome.late or outcome.skipped:
        passed = f"; {outcome.skipped} parts of batches were skipped to keep up" if outcome.skipped else ""
        typer.echo(f"came too late: {outcome.late} of {outcome.pushes} gradients{passed}")
    typer.echo(f"samples/s: {outcome.samples_per_second:.0f}")
