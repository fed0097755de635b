"""`deltaserve snapshots`: lists the snapshots of a model, and takes one."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes, table
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target

Save = Annotated[bool, typer.Option("--save", help="Take a snapshot first.")]
Timeout = Annotated[
    float,
    typer.Option(min=0.1, metavar="SECONDS", help="Timeout. A server whose disk is full waits for space."),
]


def snapshots(
    model: ModelArgument, target: Target = DEFAULT_TARGET, save: Save = False, timeout: Timeout = 60.0
) -> None:
    """List the snapshots of a model, oldest first, or take one."""
    with connected(target, timeout) as client:
        chosen = client.model(model)
        if save:
            chosen.save_snapshot()
        listed = chosen.snapshots()
    # UTC, because the server may run in another time zone.
    taken = [f"{datetime.fromtimestamp(snapshot.taken_at, UTC):%Y-%m-%d %H:%M:%S} UTC" for snapshot in listed]
    rows = [(one.number, one.version, format_bytes(one.bytes), when) for one, when in zip(listed, taken, strict=True)]
    typer.echo(table(("SNAPSHOT", "VERSION", "SIZE", "TAKEN AT"), rows))
