"""Draws the plots of docs/convergence.md: medians over the seeds, with the range as a band or error bars."""

from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from benchmarks.convergence_experiments import TASKS
from benchmarks.convergence_runs import Run
from benchmarks.convergence_tables import chosen, labels

# The colours of Okabe and Ito, which colour-blind people can distinguish; lines differ in dash or marker too.
_STYLES: dict[str, tuple[str, str, str]] = {
    "sync": ("#0072B2", "-", "o"),
    "sync, quorum 3": ("#56B4E9", "--", "v"),
    "async": ("#D55E00", "-", "s"),
    "async, damping": ("#E69F00", "--", "^"),
    "async, max_staleness 4": ("#CC79A7", ":", "D"),
    "bounded, slack 4": ("#009E73", "-.", "P"),
}
_LEVELS = (("#000000", "-"), ("#0072B2", "--"), ("#009E73", "-."), ("#D55E00", "-"))
_SAMPLES, _SECONDS, _PUSHES = "samples seen (thousands)", "wall time (s)", "pushes, all workers together"

Value = Callable[[Run], Sequence[float]]


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Writes all plots into a folder."""
    for name, make in (
        ("workers", _workers),
        ("curves", _curves),
        ("straggler", _straggler),
        ("local", _local),
        ("eps", _eps),
    ):
        _save(make(runs), folder / f"{name}.png")


def _save(figure: Figure, file: Path) -> None:
    """Writes a figure with a colour palette, which reduces the file to a third."""
    drawn = BytesIO()
    figure.savefig(drawn)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(file, optimize=True)


def _curves(runs: Sequence[Run]) -> Figure:
    """Plots loss against samples and against time, by policy and number of workers."""
    figure, grid = _figure(len(TASKS), 2)
    counts = sorted({run.workers for run in chosen(runs, "policies")} & {1, 4, 16})
    lines = [("sync", count) for count in counts] + [("async", count) for count in counts if count > 1]
    for (row, task), (column, (label, value)) in product(
        enumerate(TASKS), enumerate(((_SAMPLES, _samples), (_SECONDS, _seconds)))
    ):
        axes = grid[row][column]
        for policy, workers in lines:
            group = chosen(runs, "policies", task=task.name, label=policy, workers=workers)
            colour = "#000000" if workers == 1 else _STYLES[policy][0]
            name = "1 worker" if workers == 1 else f"{policy}, {workers} workers"
            _curve(axes, group, value, name, color=colour, linestyle="--" if workers == 4 else "-")
        _loss_axis(axes, task.name, label)
        if value is _seconds:
            axes.set_xscale("log")
            axes.set_xlim(left=0.05)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(figure, grid)
    return figure


def _workers(runs: Sequence[Run]) -> Figure:
    """Plots the final loss against the number of workers."""
    figure, grid = _figure(1, len(TASKS))
    mine = chosen(runs, "policies")
    for axes, task in zip(grid[0], TASKS, strict=True):
        drawn = [label for label in labels(mine) if label in _STYLES]
        for place, label in enumerate(drawn):
            group = chosen(mine, "policies", task=task.name, label=label)
            counts = sorted({run.workers for run in group})
            losses = [[run.end.loss for run in group if run.workers == count] for count in counts]
            shift = 1.05 ** (place - len(drawn) / 2)  # keeps bars from hiding each other
            _bars(axes, [count * shift for count in counts], losses, label)
        _loss_axis(axes, task.name, "workers")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel("final training loss")
    _legend(figure, grid)
    return figure


def _straggler(runs: Sequence[Run]) -> Figure:
    """Plots loss against time with one slow worker of four."""
    figure, grid = _figure(1, len(TASKS))
    for axes, task in zip(grid[0], TASKS, strict=True):
        mine = chosen(runs, "straggler", task=task.name)
        for label in labels(mine):
            colour, dash, _ = _STYLES[label]
            _curve(axes, chosen(mine, "straggler", label=label), _seconds, label, color=colour, linestyle=dash)
        _loss_axis(axes, task.name, _SECONDS)
    _legend(figure, grid)
    return figure


def _local(runs: Sequence[Run]) -> Figure:
    """Plots loss against samples and against pushes, by local steps."""
    figure, grid = _figure(len(TASKS), 2)
    for (row, task), (column, (label, value)) in product(
        enumerate(TASKS), enumerate(((_SAMPLES, _samples), (_PUSHES, _pushes)))
    ):
        mine, axes = chosen(runs, "local", task=task.name, label="sync"), grid[row][column]
        for count, (colour, dash) in zip(sorted({run.local_steps for run in mine}), _LEVELS, strict=False):
            group = chosen(mine, "local", local_steps=count)
            name = f"{count} local step{'s' if count > 1 else ''}"
            _curve(axes, group, value, name, color=colour, linestyle=dash)
        _loss_axis(axes, task.name, label)
        if value is _pushes:
            axes.set_xscale("log")
            axes.set_xlim(left=4)
    _legend(figure, grid)
    return figure


def _eps(runs: Sequence[Run]) -> Figure:
    """Plots the final loss against eps."""
    figure, grid = _figure(1, len(TASKS))
    for axes, task in zip(grid[0], TASKS, strict=True):
        for experiment, name, style in (
            ("eps", "16 workers, every gradient pushed", "sync"),
            ("local eps", "4 workers, 16 local steps a push", "async"),
        ):
            group = chosen(runs, experiment, task=task.name)
            values = sorted({dict(run.hyperparameters)["eps"] for run in group})
            losses = [[run.end.loss for run in group if dict(run.hyperparameters)["eps"] == eps] for eps in values]
            _bars(axes, values, losses, name, style)
        _loss_axis(axes, task.name, "eps of the server's Adadelta")
        axes.set_xscale("log")
        axes.set_ylabel("final training loss")
    _legend(figure, grid)
    return figure


def _figure(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.5, 3.1 * rows), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure, grid: Any) -> None:
    """Adds one legend above the plots, which all have the same lines."""
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=min(len(names), 5), frameon=False, fontsize=9)


def _curve(axes: Axes, group: Sequence[Run], value: Value, name: str, **style: Any) -> None:
    """Draws the median curve of the runs, and their range as a band."""
    if not group:
        return
    begin, end = max(value(run)[0] for run in group), min(value(run)[-1] for run in group)
    x = np.unique(np.concatenate([np.linspace(begin, end, 200), np.geomspace(1e-3 * end, end, 100)]))
    losses = [np.interp(x, value(run), [point.loss for point in run.points]) for run in group]
    axes.fill_between(x, np.min(losses, 0), np.max(losses, 0), color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(x, np.median(losses, 0), label=name, linewidth=1.5, **style)


def _bars(axes: Axes, x: Sequence[float], losses: Sequence[Sequence[float]], name: str, style: str = "") -> None:
    """Draws medians with the range as error bars."""
    colour, dash, marker = _STYLES[style or name]
    middle = np.median(losses, 1)
    ends = [middle - np.min(losses, 1), np.max(losses, 1) - middle]
    axes.errorbar(
        x, middle, ends, label=name, color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.3, capsize=2
    )


def _loss_axis(axes: Axes, task: str, label: str) -> None:
    axes.set_title(task, loc="left", fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    subs = (1, 1.5, 2, 3, 5) if task == "digits" else (2.5, 3, 3.5, 4, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(1,)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _samples(run: Run) -> Sequence[float]:
    return [point.samples / 1000 for point in run.points]


def _seconds(run: Run) -> Sequence[float]:
    return [point.seconds for point in run.points]


def _pushes(run: Run) -> Sequence[float]:
    return [point.pushes for point in run.points]
