"""A study of convergence: loss against samples and wall time, by policy, number of workers and local steps.

With `--optimizers` the final test accuracy and loss of several optimizers instead.
"""

import json
import multiprocessing
import os
import platform
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import convergence_optimizers as optimizers
from benchmarks.convergence_experiments import QUICK, Scale, settings
from benchmarks.convergence_figures import draw
from benchmarks.convergence_runs import Point, Run, train_all
from benchmarks.convergence_tables import tables
from deltaserve_server import Server, ServerConfig
from deltaserve_server.recipes.airfoil import AirfoilScratch
from deltaserve_server.recipes.data import find_airfoil, load_airfoil, load_digits
from deltaserve_server.recipes.digits import Digits
from deltaserve_server.recipes.numpy_learner import NumpyRecipe


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of `python -m benchmarks convergence`."""
    data = os.environ.get("DELTASERVE_DATA")
    parser.add_argument("--quick", action="store_true", help="one seed, an eighth of the samples, fewer workers")
    parser.add_argument("--optimizers", action="store_true", help="compare optimizers instead; prints tables only")
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="with --optimizers: leave out seeds that would end later (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/convergence"), metavar="FOLDER", help="folder of the plots"
    )
    parser.add_argument("--data", type=Path, default=data, metavar="FILE", help="the airfoil data, or its folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every curve to FILE")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="draw the curves of an earlier --json instead of training"
    )


def main(arguments: Namespace) -> None:
    """Trains, prints the tables and draws the plots."""
    print(f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}\n", flush=True)
    if arguments.optimizers:
        runs = measure_optimizers(optimizers.QUICK if arguments.quick else optimizers.Scale(), arguments.minutes)
    elif arguments.draw:
        runs = [_run(fields) for fields in json.loads(arguments.draw.read_text())]
    else:
        runs = measure(QUICK if arguments.quick else Scale(), arguments.data)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs]))
    if arguments.optimizers:
        print(optimizers.tables(runs))
        return
    print(tables(runs))
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(runs, arguments.out)


def measure(scale: Scale, data: Path | None) -> list[Run]:
    """Trains every setting and returns the runs.

    Args:
        scale: How large the study is.
        data: The airfoil data; None means the cache or a download.
    """
    torch.set_num_threads(1)
    started = time.monotonic()
    train, test = load_digits()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaserve"
    recipes: dict[str, NumpyRecipe] = {
        "digits": Digits(train=train, test=test),
        "airfoil": AirfoilScratch(train=load_airfoil(find_airfoil(data, cache))),
    }
    runs: list[Run] = []
    with server() as target:
        chosen = settings(scale)
        for experiment in dict.fromkeys(setting.experiment for setting in chosen):
            part = [setting for setting in chosen if setting.experiment == experiment]
            tell = partial(print, f"{experiment}:", flush=True)
            runs += train_all(part, recipes, target, range(scale.seeds), scale.slots, tell)
    print(f"\n{len(runs)} runs in {time.monotonic() - started:.0f} s\n", flush=True)
    return runs


def measure_optimizers(scale: optimizers.Scale, minutes: float) -> list[Run]:
    """Trains digits with every optimizer and returns the runs; see `convergence_optimizers.measure`."""
    train, test = load_digits()
    with server() as target:
        return optimizers.measure(scale, Digits(train=train, test=test), target, minutes, partial(print, flush=True))


@contextmanager
def server() -> Iterator[str]:
    """Yields the address of a server in another process, which does not share an interpreter with the workers."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.terminate()
        process.join()


def _serve(connection: Connection) -> None:
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu")) as serving:
        connection.send(serving.target)
        connection.recv()


def _run(fields: dict[str, Any]) -> Run:
    points = tuple(Point(**point) for point in fields.pop("points"))
    hyperparameters = tuple((name, value) for name, value in fields.pop("hyperparameters"))
    steps = tuple(fields.pop("steps_by_worker"))
    return Run(**fields, points=points, hyperparameters=hyperparameters, steps_by_worker=steps)
