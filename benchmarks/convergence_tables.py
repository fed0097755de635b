"""Formats the tables of docs/convergence.md: medians over the seeds, and ranges."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.convergence_experiments import TASKS, Task
from benchmarks.convergence_runs import Run


def tables(runs: Sequence[Run]) -> str:
    """Returns all tables as Markdown."""
    parts = []
    for task in TASKS:
        of_task = [run for run in runs if run.task == task.name]
        parts += [_policies(task, of_task), _straggler(task, of_task), _local(task, of_task), _eps(task, of_task)]
    return "\n\n".join(parts) + "\n"


def chosen(runs: Iterable[Run], experiment: str, **fields: object) -> list[Run]:
    """Returns the runs of an experiment whose fields have the given values."""
    return [
        run
        for run in runs
        if run.experiment == experiment and all(getattr(run, name) == value for name, value in fields.items())
    ]


def labels(runs: Iterable[Run]) -> list[str]:
    """Returns the names of the policies, in the order of the runs."""
    return list(dict.fromkeys(run.label for run in runs))


def _policies(task: Task, runs: Sequence[Run]) -> str:
    mine = chosen(runs, "policies")
    counts = sorted({run.workers for run in mine})
    cells: dict[str, Callable[[Sequence[Run]], str]] = {
        "final loss, median (range)": lambda group: _range([run.end.loss for run in group], 3),
        f"samples to a loss of {task.target}": lambda group: _reached(group, task.target, "samples"),
        f"seconds to a loss of {task.target}": lambda group: _reached(group, task.target, "seconds"),
        "seconds in all": lambda group: f"{_median(run.end.seconds for run in group):.1f}",
        "mean staleness": lambda group: f"{_median(run.staleness for run in group):.1f}",
        "refused pushes": lambda group: f"{_median(run.refused / run.pushes for run in group):.0%}",
    }
    parts = [f"### {task.name}: policies and workers"]
    for title, cell in cells.items():
        rows = [
            [
                label,
                *(cell(group) if (group := chosen(mine, "policies", label=label, workers=n)) else "" for n in counts),
            ]
            for label in labels(mine)
        ]
        parts.append(markdown([title, *(f"{n} workers" if n > 1 else "1 worker" for n in counts)], rows))
    return "\n\n".join(parts)


def _straggler(task: Task, runs: Sequence[Run]) -> str:
    mine = chosen(runs, "straggler")
    head = [
        "policy",
        "final loss",
        f"seconds to {task.target}",
        "seconds in all",
        "steps of the slow worker",
        "refused pushes",
        "mean staleness",
    ]
    rows = []
    for label in labels(mine):
        group = chosen(mine, "straggler", label=label)
        rows.append(
            [
                label,
                _range([run.end.loss for run in group], 3),
                _reached(group, task.target, "seconds"),
                f"{_median(run.end.seconds for run in group):.1f}",
                _counts(run.steps_by_worker[-1] for run in group),
                _counts(run.refused for run in group),
                f"{_median(run.staleness for run in group):.1f}",
            ]
        )
    return f"### {task.name}: one of 4 workers 5 times slower\n\n" + markdown(head, rows)


def _local(task: Task, runs: Sequence[Run]) -> str:
    mine = chosen(runs, "local")
    head = ["policy", "local steps", "final loss", f"samples to {task.target}", "pushes", "MB sent", "mean staleness"]
    rows = []
    for label in labels(mine):
        for count in sorted({run.local_steps for run in mine}):
            group = chosen(mine, "local", label=label, local_steps=count)
            rows.append(
                [
                    label,
                    str(count),
                    _range([run.end.loss for run in group], 3),
                    _reached(group, task.target, "samples"),
                    _counts(run.pushes for run in group),
                    f"{_median(run.megabytes for run in group):.3g}",
                    f"{_median(run.staleness for run in group):.1f}",
                ]
            )
    return f"### {task.name}: local steps\n\n" + markdown(head, rows)


def _eps(task: Task, runs: Sequence[Run]) -> str:
    names = {"eps": "sync, 16 workers", "local eps": "sync, 4 workers, 16 local steps"}
    mine = [run for run in runs if run.experiment in names]
    values = sorted({dict(run.hyperparameters)["eps"] for run in mine})
    rows = []
    for experiment, name in names.items():
        groups = [
            [run for run in chosen(mine, experiment) if dict(run.hyperparameters)["eps"] == eps] for eps in values
        ]
        rows.append([name, *(_range([run.end.loss for run in group], 3) for group in groups)])
    return f"### {task.name}: final loss by eps\n\n" + markdown(["", *(f"eps {eps:g}" for eps in values)], rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table as Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _range(values: Sequence[float], digits: int) -> str:
    return f"{_median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _counts(values: Iterable[int]) -> str:
    listed = list(values)
    low, high = min(listed), max(listed)
    return str(low) if low == high else f"{_median(listed):.0f} ({low} to {high})"


def _reached(group: Sequence[Run], loss: float, what: str) -> str:
    """Formats the median; runs that never reach the loss count as the latest. "-" means that most never do."""
    reached = sorted(value for run in group if (value := run.reached(loss, what)) is not None)
    late = len(group) - len(reached)
    if len(reached) <= late:
        return "-"
    median = statistics.median_low([*reached, *[float("inf")] * late])
    text = f"{median:.1f}" if what == "seconds" else f"{round(median, -1):.0f}"
    return text if not late else f"{text} ({len(reached)} of {len(group)} runs)"
