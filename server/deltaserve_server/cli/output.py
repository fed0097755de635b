"""The output file of a command. It is written whole or not at all."""

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
"""The limit of a call that transfers a whole model."""

Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="File to write, as NAME.safetensors.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")]


def check(output: Path, force: bool) -> None:
    """Checks before the transfer that the file can be written after it.

    Raises:
        CommandError: The file cannot be written, or it exists and `force` is not set.
    """
    if output.is_dir():
        raise CommandError(f"{output} is a directory: name a file")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"the directory {output.parent} does not exist: create it first")
    if output.exists() and not force:
        raise CommandError(f"{output} exists: name another file, or overwrite it with --force")


def encode(tensors: "Mapping[str, Array]", metadata: Mapping[str, str]) -> bytes:
    """Returns the content of a safetensors file.

    Raises:
        CommandError: A tensor is named `__metadata__`, which the format uses itself.
    """
    from safetensors.numpy import save

    if "__metadata__" in tensors:
        raise CommandError("a tensor is named __metadata__, which a safetensors file cannot hold: rename it")
    return save(dict(tensors), metadata=dict(metadata))


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary file in the same directory, fsync, rename."""
    # A rename works only within a file system. The dot hides the file from patterns such as *.safetensors.
    descriptor, name = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(
                stream.fileno()
            )  # before the rename: after a power failure the name must not lead to an empty file
        # mkstemp creates files that only their owner can read; this one gets the usual permissions.
        umask = os.umask(0)  # it can only be read by setting it
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(file)
    except BaseException:  # Ctrl+C leaves nothing behind either
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
