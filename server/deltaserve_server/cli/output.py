"""The file that a command writes: how it is named, and that it comes whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.errors import CommandError

if TYPE_CHECKING:
    from deltaserve._common.element_types import Array

TRANSFER_SECONDS = 600.0
"""How long a call may take that moves a whole model."""

Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write, as NAME.safetensors.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


def check(output: Path, force: bool) -> None:
    """Says before the transfer what would stop the writing after it.

    Raises:
        CommandError: The file cannot be written, or exists and is not to be replaced.
    """
    if output.is_dir():
        raise CommandError(f"{output} is a folder: name a file")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"there is no folder {output.parent}: make it first")
    if output.exists() and not force:
        raise CommandError(f"{output} exists: name another file, or add --force")


def encode(tensors: "Mapping[str, Array]", metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file.

    Raises:
        CommandError: A tensor has the name under which such a file has its metadata.
    """
    from safetensors.numpy import save

    if "__metadata__" in tensors:
        raise CommandError("a tensor is named __metadata__, which no safetensors file can hold")
    return save(dict(tensors), metadata=dict(metadata))


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
