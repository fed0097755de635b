"""`deltaserve watch`: a model's updates, as they happen."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.policy import format_policy

if TYPE_CHECKING:
    import deltaserve

PATIENCE_SECONDS = 10.0
"""How long a server that is gone may take to come back."""

NAMES_WIDTH = 30
COLUMNS = "{:>9}  {:>6}  {:>8}  {:>12}  {:>5}  {}"
HEADER = COLUMNS.format("VERSION", "LR", "UPDATE", "GRADIENTS", "STALE", "WORKERS")
Count = Annotated[
    int | None,
    typer.Option("--count", "-n", min=1, metavar="N", help="End after so many updates.", show_default="never"),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="A JSON object a line. The first tells where the model stands; it is no update."),
]


def watch(model: ModelArgument, count: Count = None, as_json: Json = False, target: Target = DEFAULT_TARGET) -> None:
    """Show a model's updates as they happen, a line each, until Ctrl+C.

    LR is after damping; UPDATE is the norm of the change of the weights.
    GRADIENTS are the norms of the pushed gradients, least and largest.
    STALE is how many versions old the oldest of them was.
    """
    with connected(target, PATIENCE_SECONDS) as client:
        watched = client.model(model)
        left = count
        for number, event in enumerate(watched.watch()):
            if as_json:
                typer.echo(json.dumps(asdict(event)))
            else:
                typer.echo(_lines(event) if number else _head(event, watched))
            if left is not None and event.update_norm is not None:
                left -= 1
                if not left:
                    break


def _head(event: "deltaserve.ModelEvent", model: "deltaserve.Model") -> str:
    return f"{model.name} is at version {event.version}, {format_policy(model.policy)}\n{HEADER}"


def _lines(event: "deltaserve.ModelEvent") -> str:
    """Returns what to show of an event: a line, and one before it where others were missed."""
    missed = f"{'...':>9}  {event.missed} missed, too fast to be told\n" if event.missed else ""
    return missed + _line(event)


def _line(event: "deltaserve.ModelEvent") -> str:
    if event.update_norm is None:
        return f"{event.version:>9}  no update: a state was put in place, or late workers were let in"
    pushes = event.contributions
    return COLUMNS.format(
        event.version,
        _range(group.lr for group in event.hyperparameters),
        f"{event.update_norm:.3g}",
        _range(push.gradient_norm for push in pushes),
        max(push.staleness for push in pushes),
        _names([push.worker for push in pushes]),
    )


def _range(values: Iterable[float]) -> str:
    """Returns the least and the largest of some numbers, once where they look the same."""
    ordered = sorted(values)
    return "..".join(dict.fromkeys(f"{value:.3g}" for value in (ordered[0], ordered[-1])))


def _names(workers: Sequence[str]) -> str:
    """Returns as many names as there is room for, at least one, and how many there are besides."""
    texts = [", ".join(workers)]
    texts += [
        f"{', '.join(workers[:shown])} and {len(workers) - shown} more" for shown in range(len(workers) - 1, 0, -1)
    ]
    return next((text for text in texts if len(text) <= NAMES_WIDTH), texts[-1])
