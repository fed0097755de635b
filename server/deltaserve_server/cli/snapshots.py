"""`deltaserve snapshots`: the snapshots of a model that a server keeps."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes, table
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target

if TYPE_CHECKING:
    import deltaserve

Save = Annotated[bool, typer.Option("--save", help="Take one first, of the model as it is now.")]
Timeout = Annotated[
    float,
    typer.Option(min=0.1, metavar="SECONDS", help="How long it may take, the wait for a disk without room included."),
]


def snapshots(
    model: ModelArgument, target: Target = DEFAULT_TARGET, save: Save = False, timeout: Timeout = 60.0
) -> None:
    """List a model's snapshots, oldest first, or take one."""
    with connected(target, timeout) as client:
        held = client.model(model)
        if save:
            held.save_snapshot()
        kept = held.snapshots()
    typer.echo(table(("SNAPSHOT", "VERSION", "SIZE", "TAKEN AT"), [_row(one) for one in kept]))


def _row(one: "deltaserve.SnapshotInfo") -> tuple[int, int, str, str]:
    taken = datetime.fromtimestamp(one.taken_at, UTC)
    return one.number, one.version, format_bytes(one.bytes), f"{taken:%Y-%m-%d %H:%M:%S} UTC"
