"""`deltaserve pull`: a model's weights as a safetensors file."""

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.output import TRANSFER_SECONDS, Force, Output, check, encode, write_whole


def pull(model: ModelArgument, output: Output, target: Target = DEFAULT_TARGET, force: Force = False) -> None:
    """Write a model's weights, all of one version, to a safetensors file.

    For all that a model is, its optimizer state too: deltaserve export.
    """
    check(output, force)
    with connected(target, TRANSFER_SECONDS) as client:
        pulled = client.model(model).pull_state(optimizer_state=False)
    content = encode(pulled.weights, {"model": model, "version": str(pulled.version)})
    write_whole(output, content)
    typer.echo(f"{output}: {model} at version {pulled.version}, {format_bytes(len(content))}")
