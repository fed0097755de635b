"""The updates of the chapter on optimization in "Dive into Deep Learning", in numpy, and the losses that they reach.

Names and places of eps are the book's.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deltaserve_server.recipes.airfoil import AirfoilScratch
from deltaserve_server.recipes.batches import BatchPlan
from deltaserve_server.recipes.data import Examples

Doubles = NDArray[np.float64]
Update = Callable[[Doubles, Doubles, Doubles, Doubles, int], Doubles]
"""Returns the new parameters from parameters, gradient, two states that it changes, and the number of updates."""


def sgd(p: Doubles, g: Doubles, v: Doubles, s: Doubles, t: int) -> Doubles:
    """The section on minibatch SGD."""
    return p - 0.05 * g


def momentum(p: Doubles, g: Doubles, v: Doubles, s: Doubles, t: int) -> Doubles:
    """The section on momentum."""
    v[:] = 0.9 * v + g
    return p - 0.005 * v


def adagrad(p: Doubles, g: Doubles, v: Doubles, s: Doubles, t: int) -> Doubles:
    """The section on Adagrad."""
    s += np.square(g)
    return p - 0.1 * g / np.sqrt(s + 1e-6)


def rmsprop(p: Doubles, g: Doubles, v: Doubles, s: Doubles, t: int) -> Doubles:
    """The section on RMSProp."""
    s[:] = 0.9 * s + 0.1 * np.square(g)
    return p - 0.01 * g / np.sqrt(s + 1e-6)


def adadelta(p: Doubles, g: Doubles, delta: Doubles, s: Doubles, t: int) -> Doubles:
    """The section on Adadelta."""
    s[:] = 0.9 * s + 0.1 * np.square(g)
    step = np.sqrt(delta + 1e-5) / np.sqrt(s + 1e-5) * g
    delta[:] = 0.9 * delta + 0.1 * np.square(step)
    return p - step


def adam(p: Doubles, g: Doubles, v: Doubles, s: Doubles, t: int) -> Doubles:
    """The section on Adam."""
    v[:] = 0.9 * v + 0.1 * g
    s[:] = 0.999 * s + 0.001 * np.square(g)
    return p - 0.01 * (v / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-6)


UPDATES: dict[str, Update] = {
    "adadelta": adadelta,
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
}


def losses(update: Update, examples: Examples, seeds: int = 10) -> list[float]:
    """Returns the final losses of local runs, with the initial weights and batches of the recipe for these seeds."""
    return [_loss(update, examples, seed) for seed in range(seeds)]


def _loss(update: Update, examples: Examples, seed: int) -> float:
    recipe = AirfoilScratch(train=examples, seed=seed)
    x = np.column_stack([examples.features, np.ones(len(examples))]).astype(np.float64)
    y = examples.labels.astype(np.float64)
    p = np.concatenate([value.ravel() for value in recipe.initial_weights().values()]).astype(np.float64)
    v, s = np.zeros_like(p), np.zeros_like(p)
    plan = BatchPlan(examples=len(x), batch_size=recipe.batch_size, epochs=recipe.epochs, seed=(seed,))
    for t, batch in enumerate(plan.batches(), start=1):
        rows = batch.rows
        p = update(p, x[rows].T @ (x[rows] @ p - y[rows]) / len(rows), v, s, t)
    return float(np.square(x @ p - y).mean() / 2)
