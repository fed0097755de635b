"""`deltaserve train`: trains a recipe with worker processes."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve_server.cli.errors import UsageError
from deltaserve_server.cli.options import POLICY_HELP, parse_address
from deltaserve_server.cli.settings import (
    Parsed,
    format_optimizer,
    format_policy,
    parse_optimizer,
    parse_policy,
)

if TYPE_CHECKING:
    from deltaserve import Optimizer
    from deltaserve_server.recipes.recipe import Policy, Recipe
    from deltaserve_server.recipes.training import RunResult

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

application = typer.Typer(rich_markup_mode="rich")


@application.callback(invoke_without_command=True)
def train(context: typer.Context) -> None:
    """Train a small model on real data with several workers, in seconds."""
    if context.invoked_subcommand is None:
        raise UsageError("nothing to train: choose deltaserve train digits or deltaserve train airfoil")


class AirfoilRecipe(StrEnum):
    """The two implementations of the regression in the book."""

    SCRATCH = "scratch"
    CONCISE = "concise"


Workers = Annotated[
    int, typer.Option("--workers", "-w", min=1, max=64, metavar="N", help="Number of worker processes.")
]
PolicyOption = Annotated[
    Parsed[Any],
    typer.Option(
        "--policy",
        metavar="POLICY",
        parser=parse_policy,
        help=f"{POLICY_HELP} sync waits for all workers unless min_workers or quorum is set.",
    ),
]
OptimizerOption = Annotated[
    str,
    typer.Option(
        "--optimizer",
        metavar="OPTIMIZER",
        help="adadelta, sgd, momentum, adagrad, rmsprop, adam or adamw, with settings if those of the recipe do not "
        "suit: sgd:lr=0.05,momentum=0.9.",
    ),
]
TrainTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="HOST:PORT",
        parser=parse_address,
        help="Address of the server, or unix:PATH. A single worker joins other runs of the same model.",
        show_default="a server inside this command",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Name of the model.", show_default="the name of the recipe"),
]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", help="Seed of the initial weights and the order of the examples.")
]
Timeout = Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Timeout of the server and of other workers.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        envvar="DELTASERVE_DATA",
        help="The file airfoil_self_noise.dat, or its directory.",
        show_default="a download, which is cached",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Plot the loss to this .png, .svg or .pdf file.", show_default=False),
]


@application.command()
def digits(
    workers: Workers = 2,
    optimizer: OptimizerOption = "adadelta",
    policy: PolicyOption = "sync",  # type: ignore[assignment]  # typer parses defaults too
    target: TrainTarget = None,
    model: ModelName = None,
    seed: Seed = 0,
    timeout: Timeout = 60.0,
) -> None:
    """Train a small network on 1437 handwritten digits, and test it on 360."""
    from deltaserve_server.recipes.data import load_digits
    from deltaserve_server.recipes.digits import Digits

    # First: wrong usage shows before data is loaded.
    chosen, served = _policy(policy, workers, alone=target is None), _optimizer(optimizer, Digits)
    train, test = load_digits()
    recipe = Digits(train=train, test=test, optimizer=served, seed=seed)
    _train(recipe, workers, chosen, target, model, timeout)


@application.command()
def airfoil(
    workers: Workers = 1,
    optimizer: OptimizerOption = "adadelta",
    policy: PolicyOption = "sync",  # type: ignore[assignment]  # typer parses defaults too
    recipe: Annotated[
        AirfoilRecipe, typer.Option("--recipe", help="scratch: numpy, 2 epochs. concise: torch, 4 epochs.")
    ] = AirfoilRecipe.SCRATCH,
    data: Data = None,
    plot: Plot = None,
    target: TrainTarget = None,
    model: ModelName = None,
    seed: Seed = 0,
    timeout: Timeout = 60.0,
) -> None:
    """Train the linear regression of the optimization chapter in "Dive into Deep Learning".

    Every optimizer has the settings of its section in the book, except adamw, which is not in the book.
    """
    from deltaserve_server.recipes import loss_figure
    from deltaserve_server.recipes.airfoil import AirfoilConcise, AirfoilScratch
    from deltaserve_server.recipes.data import find_airfoil, load_airfoil
    from deltaserve_server.recipes.errors import MissingPackageError

    kind = AirfoilConcise if recipe is AirfoilRecipe.CONCISE else AirfoilScratch
    chosen, served = _policy(policy, workers, alone=target is None), _optimizer(optimizer, kind)
    if plot is not None:
        loss_figure.check(plot)  # what would prevent the figure shows before the training, not after it
    if recipe is AirfoilRecipe.CONCISE and find_spec("torch") is None:  # each worker's import would fail instead
        raise MissingPackageError("torch", "torch")
    examples = load_airfoil(find_airfoil(data, cache_folder()))
    made = kind(train=examples, optimizer=served, seed=seed)
    result = _train(made, workers, chosen, target, model, timeout)
    if plot is not None:
        loss_figure.draw(result.curve, kind.epochs, plot)
        typer.echo(f"figure: {plot}")


def cache_folder() -> Path:
    """Returns this platform's directory for downloads that can be repeated."""
    if sys.platform == "darwin":  # elsewhere the XDG base directory specification
        return Path.home() / "Library" / "Caches" / "deltaserve"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaserve"


def _train(
    recipe: "Recipe", workers: int, policy: "Policy", target: str | None, model: str | None, timeout: float
) -> "RunResult":
    """Trains, shows progress and prints the result."""
    from deltaserve_server.cli.progress import shown
    from deltaserve_server.recipes.training import run

    # The workers share the cores of the machine. Set before any library starts threads; the workers inherit it.
    os.environ.update(ONE_THREAD)
    with _exit_on_sigterm(), _server(target, timeout) as address:
        kind = f"{workers} worker{'s' * (workers > 1)}, {format_policy(policy)}, batches of {recipe.batch_size} each"
        typer.echo(f"{recipe.name}: {len(recipe.train)} examples, {recipe.epochs} epochs, {kind}")
        typer.echo(f"optimizer: {format_optimizer(recipe.optimizer)}")
        with shown(workers) as observer:
            result = run(
                recipe,
                target=address,
                model=model,
                workers=workers,
                policy=policy,
                elastic=target is not None and workers == 1,  # nobody else can join a server inside this command
                timeout_seconds=timeout,
                observer=observer,
            )
    if result.accuracy is not None:
        typer.echo(f"test accuracy: {result.accuracy:.3f}")
    typer.echo(f"loss: {result.loss:.3f}, {result.epoch_seconds:.3f} sec/epoch")  # as the book prints it
    typer.echo(f"updates applied: {result.updates} (the model is at version {result.version})")
    if result.late or result.skipped:
        skipped = f"; {result.skipped} batches were skipped to catch up" if result.skipped else ""
        typer.echo(f"late gradients: {result.late} of {result.pushes}{skipped}")
    typer.echo(f"samples/s: {result.samples_per_second:.0f}")
    if target is not None:  # a server inside this command is gone now, with its model
        name = model or recipe.name
        typer.echo(f"get the weights: deltaserve pull {name} --target {target} -o {name}.safetensors")
    return result


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, which stops workers and server; process 1 of a container would ignore it."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # as shells report a signal

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _server(target: str | None, timeout: float) -> "Iterator[str]":
    """Yields the given address, or that of a server that runs until the end of the block."""
    import deltaserve

    if target is not None:
        with deltaserve.connect(target, timeout_seconds=timeout) as client:  # waits for the server, as workers do
            version = client.server_info().version
        typer.echo(f"server: {target}, deltaserve {version}")
        yield target
        return
    from deltaserve_server import LocalServer

    with LocalServer() as server:
        typer.echo(f"server: {server.target}, in this process")
        yield server.target


def _optimizer(text: str, recipe: "type[Recipe]") -> "Optimizer":
    """Returns the optimizer that the text describes; the recipe has its name, and the settings that it leaves out.

    Raises:
        UsageError: The text is not an optimizer of the recipe.
    """
    try:
        return parse_optimizer(text, recipe.optimizers)
    except typer.BadParameter as error:
        raise UsageError(f"--optimizer: {error.message}") from error


def _policy(parsed: "Parsed[Policy]", workers: int, alone: bool) -> "Policy":
    """Returns the policy; the default of sync's `min_workers` is the quorum, or the number of workers without one.

    Raises:
        UsageError: A round would never close, because `alone` says that no workers of other runs can join.
    """
    import deltaserve

    if parsed.kind is not deltaserve.Sync:
        return parsed.make()
    policy = parsed.make(min_workers=parsed.settings.get("quorum", workers))
    assert isinstance(policy, deltaserve.Sync)
    if alone and policy.min_workers > workers:
        needed = policy.min_workers
        raise UsageError(f"a round of {needed} workers never closes with {workers}: add --workers {needed}")
    return policy
