"""Shows the progress of workers: a bar for each on a terminal, plain lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaserve_server.recipes.worker import Progress

Observer = Callable[["Progress"], None]
LINES_PER_WORKER = 4


@contextlib.contextmanager
def shown(workers: int) -> Iterator[Observer]:
    """Yields an observer, which shows progress on standard error: standard output is for the result."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = [
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=None),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[notes]}"),
    ]
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        # The first report tells the number of steps; without a total the bar only says that something goes on.
        tasks = [bars.add_task(f"worker {worker}", total=None, notes="starting") for worker in range(workers)]

        def show(progress: "Progress") -> None:
            notes = ", ".join(_notes(progress))
            bars.update(tasks[progress.worker], total=progress.steps, completed=progress.step, notes=notes)

        yield show


def _lines() -> Observer:
    """Returns an observer that prints a line for each quarter of a worker's steps."""
    printed: dict[int, int] = {}

    def show(progress: "Progress") -> None:
        part = progress.step * LINES_PER_WORKER // progress.steps
        if printed.get(progress.worker) != part:
            printed[progress.worker] = part
            text = ", ".join([f"step {progress.step} of {progress.steps}", *_notes(progress)])
            print(f"worker {progress.worker}: {text}", file=sys.stderr, flush=True)  # at once, in a log file too

    return show


def _notes(progress: "Progress") -> list[str]:
    loss = [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
    return [*loss, *([f"{progress.late} late"] if progress.late else [])]
