"""`deltaserve pull`: a model's weights as a safetensors file."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target

if TYPE_CHECKING:
    import deltaserve

TIMEOUT_SECONDS = 600.0
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write, as weights.safetensors.", show_default=False),
]
WithState = Annotated[
    bool,
    typer.Option("--state", help="Also square_avg and acc_delta, named as square_avg/TENSOR and acc_delta/TENSOR."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


def pull(
    model: ModelArgument,
    output: Output,
    target: Target = DEFAULT_TARGET,
    state: WithState = False,
    force: Force = False,
) -> None:
    """Write a model's weights, all of one version, to a safetensors file."""
    _check(output, force)
    with connected(target, TIMEOUT_SECONDS) as client:
        pulled = client.model(model).pull_state(optimizer_state=state)
    content = encode(model, pulled, state)
    write_whole(output, content)
    typer.echo(f"{output}: {model} at version {pulled.version}, {format_bytes(len(content))}")


def _check(output: Path, force: bool) -> None:
    """Says before the transfer what would stop the writing after it."""
    if output.is_dir():
        raise CommandError(f"{output} is a folder: name a file")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"there is no folder {output.parent}: make it first")
    if output.exists() and not force:
        raise CommandError(f"{output} exists: name another file, or add --force")


def encode(model: str, pulled: "deltaserve.ModelState", optimizer_state: bool) -> bytes:
    """Returns a safetensors file: tensors by name; model, version and update counts as its metadata.

    Raises:
        CommandError: a tensor of the model has the name that a part of the state would get.
    """
    from safetensors.numpy import save

    tensors = dict(pulled.weights)
    metadata = {"model": model, "version": str(pulled.version)}
    if optimizer_state:
        for name in ("square_avg", "acc_delta"):
            vectors = getattr(pulled, name) or {}
            tensors |= {f"{name}/{tensor}": vector for tensor, vector in vectors.items()}
        if len(tensors) != 3 * len(pulled.weights):
            raise CommandError(f"tensors of {model} are named like parts of the state: pull it without --state")
        metadata |= {f"update_count/{name}": str(count) for name, count in pulled.update_counts.items()}
    return save(tensors, metadata=metadata)


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all: temporary file in the same folder, fsync, rename."""
    descriptor, name = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp's files are for their owner alone; weights are as readable as any file of this user.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
