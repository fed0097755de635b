"""`deltaserve snapshots`: lists the snapshots of a model, and takes one."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes, table
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target

if TYPE_CHECKING:
    import deltaserve

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
    typer.echo(table(("SNAPSHOT", "VERSION", "SIZE", "TAKEN AT"), [_row(snapshot) for snapshot in listed]))


def _row(snapshot: "deltaserve.SnapshotInfo") -> tuple[int, int, str, str]:
    taken = datetime.fromtimestamp(snapshot.taken_at, UTC)
    return snapshot.number, snapshot.version, format_bytes(snapshot.bytes), f"{taken:%Y-%m-%d %H:%M:%S} UTC"
