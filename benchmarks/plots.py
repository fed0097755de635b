"""Draws the plots of docs/performance.md from the results of a run."""

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from benchmarks import workers
from benchmarks.baselines import THERE_AND_BACK
from benchmarks.kernel import KERNEL
from benchmarks.local import DEFAULT
from benchmarks.models import SHAPES_B, SIZE_A, elements
from benchmarks.peers.suite import PEERS
from benchmarks.results import Figures, Results, Timings, figures

# The colours of Okabe and Ito, which colour-blind people can distinguish; lines differ in dash and marker too.
_BASELINES = {
    THERE_AND_BACK: {"color": "#000000", "linestyle": ":", "marker": ""},
    DEFAULT: {"color": "#000000", "linestyle": "--", "marker": ""},
    KERNEL: {"color": "#000000", "linestyle": "-.", "marker": ""},
}
_OURS = ("#D55E00", "#E69F00", "#CC79A7", "#F0E442")
_THEIRS = {
    "torch_rpc": ("#0072B2", "v"),
    "ray_actor": ("#56B4E9", "^"),
    "tensorflow_ps": ("#009E73", "P"),
    "grpc_naive": ("#999999", "X"),
}
"""Colour and marker by adapter; variants that do not use TCP are dashed."""

_MARKERS = "osD*"

_LINE = 3
"""The least number of sizes for which points are joined by a line."""

_Curves = dict[str, dict[int, tuple[float, float, float]]]
"""Median, fastest and slowest step in seconds, by system and number of parameters."""


def draw(results: Results, folder: Path) -> None:
    """Writes the plots whose results are there into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = _curves(results)
    if curves:
        _save(_step(curves), folder / "step.png")
    many = figures(results, "workers-count")
    if many:
        _save(_workers(many), folder / "workers.png")


def _save(figure: Figure, file: Path) -> None:
    """Writes a figure with a colour palette, which reduces the file to a third."""
    drawn = BytesIO()
    figure.savefig(drawn)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(file, optimize=True)


def _curves(results: Results) -> _Curves:
    """Returns the step times of every system, sorted by number of parameters."""
    named = {"a": SIZE_A, "b": elements(SHAPES_B)}
    found: _Curves = {}
    for key, result in results.items():
        kind, _, size = key.partition("-")
        if kind not in ("step", "peers") or not isinstance(result, Timings) or not (size in named or size.isdecimal()):
            continue
        count = named[size] if size in named else int(size)
        for row, timing in result.rows.items():
            if kind == "step" or row in _PEER_ROWS:
                found.setdefault(row, {})[count] = (timing.median, *timing.spread)
    return {row: dict(sorted(points.items())) for row, points in found.items() if len(points) > 1}


_PEER_ROWS = tuple(system.row for system in PEERS)


def _step(curves: _Curves) -> Figure:
    """Plots step time against model size."""
    figure = Figure(figsize=(8.5, 6.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for row, style in _styles(curves).items():
        points = curves[row]
        sizes = [4 * count for count in points]
        milliseconds = [1e3 * median for median, _, _ in points.values()]
        if len(points) < _LINE:
            style["linestyle"] = ""
        axes.plot(sizes, milliseconds, label=row, markersize=4.5, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("size of the model, float32; the same number of bytes travels each way")
    axes.set_ylabel("step, ms (median)")
    _plain(axes)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _styles(curves: _Curves) -> dict[str, dict[str, Any]]:
    """Returns the line style of each system: deltaserve solid and thick, peers thin, baselines black."""
    ours = [row for row in curves if row not in _BASELINES and row not in _PEER_ROWS and row.startswith("deltaserve,")]
    styles: dict[str, dict[str, Any]] = {}
    for place, row in enumerate(ours):
        styles[row] = {"color": _OURS[place % len(_OURS)], "marker": _MARKERS[place % len(_MARKERS)], "linewidth": 2.2}
    for system in PEERS:
        if system.row in curves:
            colour, marker = _THEIRS[system.module]
            dash = "-" if system.over_tcp else "--"
            styles[system.row] = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.1}
    for row, style in _BASELINES.items():
        if row in curves:
            styles[row] = {**style, "linewidth": 1.3}
    return styles


def _workers(many: Figures) -> Figure:
    """Plots throughput and fairness against the number of workers."""
    figure = Figure(figsize=(8.5, 3.3), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [int(row.split()[0]) for row in many.rows]
    rates, lowest, highest = (list(many.column(name).values()) for name in (workers.STEPS, "lowest", "highest"))
    spread = [
        [rate - low for rate, low in zip(rates, lowest, strict=True)],
        [high - rate for rate, high in zip(rates, highest, strict=True)],
    ]
    left.errorbar(counts, rates, spread, color=_OURS[0], marker="o", markersize=5, capsize=3, linewidth=2)
    left.set_ylabel("steps per second, all workers together")
    right.plot(
        counts, list(many.column(workers.SHARE).values()), color="#0072B2", marker="s", markersize=5, linewidth=2
    )
    right.axhline(0.5, color="#000000", linestyle=":", linewidth=1)
    right.annotate("target: no worker below half", (counts[0], 0.5), (0, 4), textcoords="offset points", fontsize=8)
    right.set_ylabel("slowest worker, of an equal share")
    for axes, top in ((left, 1.15 * max(highest)), (right, 1.1)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, top)
        axes.set_xlabel("workers, 1 M parameters, over TCP")
        _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _bytes(value: float) -> str:
    """Formats a size with a decimal unit: 400 MB."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:g} {unit}"
        value /= 1000
    return f"{value:g} GB"
