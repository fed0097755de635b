"""`deltaserve pull`: writes the weights of a model to a safetensors file."""

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.output import TRANSFER_SECONDS, Force, Output, check, encode, write_whole


def pull(model: ModelArgument, output: Output, target: Target = DEFAULT_TARGET, force: Force = False) -> None:
    """Write the weights of a model to a safetensors file.

    deltaserve export writes the optimizer state too.
    """
    check(output, force)  # first, because the transfer may take minutes
    with connected(target, TRANSFER_SECONDS) as client:
        pulled = client.model(model).pull_state(optimizer_state=False)
    content = encode(pulled.weights, {"model": model, "version": str(pulled.version)})
    write_whole(output, content)
    typer.echo(f"{output}: {model} at version {pulled.version}, {format_bytes(len(content))}")
