"""`deltaserve watch`: shows the updates of a model as they happen."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.settings import format_policy

if TYPE_CHECKING:
    import deltaserve

PATIENCE_SECONDS = 10.0
"""How long the command waits for a server that is gone to come back."""

NAMES_WIDTH = 30
COLUMNS = "{:>9}  {:>6}  {:>8}  {:>12}  {:>5}  {}"
HEADER = COLUMNS.format("VERSION", "LR", "UPDATE", "GRADIENTS", "STALE", "WORKERS")
Count = Annotated[
    int | None,
    typer.Option("--count", "-n", min=1, metavar="N", help="Exit after N updates.", show_default="never"),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON lines; the first one is the current version, not an update."),
]


def watch(model: ModelArgument, count: Count = None, as_json: Json = False, target: Target = DEFAULT_TARGET) -> None:
    """Show the updates of a model as they happen, until Ctrl+C.

    LR is the learning rate after damping.
    UPDATE is the norm of the change of the weights.
    GRADIENTS are the smallest and the largest norm of the pushed gradients.
    STALE is the largest staleness of these gradients, in versions.
    """
    with connected(target, PATIENCE_SECONDS) as client:
        watched = client.model(model)
        left = count
        for number, event in enumerate(watched.watch()):
            if as_json:
                typer.echo(json.dumps(asdict(event)))
            else:
                settings = f"{watched.groups[0].kind}, {format_policy(watched.policy)}"
                first = f"{model} is at version {event.version}, {settings}\n{HEADER}"
                typer.echo(_lines(event) if number else first)  # the first event is the present version, not an update
            # A version without an update does not count: it is not what the user waits for.
            if left is not None and event.update_norm is not None:
                left -= 1
                if not left:
                    break


def _lines(event: "deltaserve.ModelEvent") -> str:
    """Formats an event as a line, after a line about the events that were missed before it."""
    missed = f"{'...':>9}  {event.missed} events missed: they came too fast\n" if event.missed else ""
    if event.update_norm is None:
        return f"{missed}{event.version:>9}  no update: a state was imported, or late workers joined"
    pushes = event.contributions
    return missed + COLUMNS.format(
        event.version,
        _range(group.lr for group in event.hyperparameters),
        f"{event.update_norm:.3g}",
        _range(push.gradient_norm for push in pushes),
        max(push.staleness for push in pushes),
        _names([push.worker for push in pushes]),
    )


def _range(values: Iterable[float]) -> str:
    """Formats the range of some numbers, or one number if both ends look the same."""
    ordered = sorted(values)
    # The keys of a dict: duplicates fall out, the order stays.
    return "..".join(dict.fromkeys(f"{value:.3g}" for value in (ordered[0], ordered[-1])))


def _names(workers: Sequence[str]) -> str:
    """Formats as many names as fit, at least one, and the number of the others."""
    texts = [", ".join(workers)]
    texts += [
        f"{', '.join(workers[:shown])} and {len(workers) - shown} more" for shown in range(len(workers) - 1, 0, -1)
    ]
    return next((text for text in texts if len(text) <= NAMES_WIDTH), texts[-1])
