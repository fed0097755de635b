"""`deltaserve snapshots`: the snapshots of a model that a server keeps."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes, table
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.output import TRANSFER_SECONDS

if TYPE_CHECKING:
    import deltaserve

Save = Annotated[bool, typer.Option("--save", help="Take one first, of the model as it is now.")]


def snapshots(model: ModelArgument, target: Target = DEFAULT_TARGET, save: Save = False) -> None:
    """List a model's snapshots, oldest first, or take one."""
    with connected(target, TRANSFER_SECONDS) as client:
        held = client.model(model)
        if save:
            held.save_snapshot()
        kept = held.snapshots()
    typer.echo(table(("SNAPSHOT", "VERSION", "SIZE", "TAKEN AT"), [_row(one) for one in kept]))


def _row(one: "deltaserve.SnapshotInfo") -> tuple[int, int, str, str]:
    taken = datetime.fromtimestamp(one.taken_at, UTC)
    return one.number, one.version, format_bytes(one.bytes), f"{taken:%Y-%m-%d %H:%M:%S} UTC"
