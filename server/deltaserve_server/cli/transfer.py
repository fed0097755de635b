"""`deltaserve export` and `import`: a whole model as a file, and back, on this server or on another."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli import saved
from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.output import TRANSFER_SECONDS, Force, Output, check, write_whole
from deltaserve_server.cli.saved import SavedModel

if TYPE_CHECKING:
    import deltaserve

File = Annotated[Path, typer.Argument(metavar="FILE", help="What deltaserve export wrote.", show_default=False)]
Name = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model's name.", show_default="as in the file")
]
Replace = Annotated[
    bool,
    typer.Option("--replace", help="Put the state in place of that of a model which exists, for all its workers."),
]


def export(model: ModelArgument, output: Output, target: Target = DEFAULT_TARGET, force: Force = False) -> None:
    """Write all that a model is, of one version, to a safetensors file.

    That is its weights, optimizer state, update counts, hyperparameters and policy. deltaserve import takes it.
    """
    check(output, force)
    with connected(target, TRANSFER_SECONDS) as client:
        held = client.model(model)
        state = held.pull_state()
        content = saved.encode(held.info(), state)
    write_whole(output, content)
    typer.echo(f"{output}: {model} at version {state.version}, {format_bytes(len(content))}")


def import_(file: File, model: Name = None, target: Target = DEFAULT_TARGET, replace: Replace = False) -> None:
    """Make a model of a file, which goes on where the exported one was.

    Its version counts anew. With --replace, a model that exists keeps its own hyperparameters and policy.
    """
    content = saved.read(file)
    name = model or content.name
    with connected(target, TRANSFER_SECONDS) as client:
        if replace and any(held.name == name for held in client.models()):
            _replace(client.model(name), content)
        else:
            _create(client, name, content)
    typer.echo(f"{name}: {file}, which was exported at version {content.state.version}")


def _create(client: "deltaserve.Client", name: str, content: SavedModel) -> None:
    import deltaserve

    exists = CommandError(f"{name} exists: choose another name with --model, or add --replace")
    try:
        made = client.create_model(
            name,
            content.state.weights,
            groups=content.groups,
            group_of={spec.name: spec.group for spec in content.tensors},
            policy=content.policy,
        )
    except deltaserve.ConflictError as error:
        raise exists from error
    if not made.created:
        raise exists
    try:
        made.put_state(content.state)
    except BaseException:  # an interrupt too: what is left without its state would train on as if it were whole
        with contextlib.suppress(deltaserve.Error):
            made.delete()
        raise


def _replace(model: "deltaserve.Model", content: SavedModel) -> None:
    difference = _difference(model.tensors, content.tensors)
    if difference:
        raise CommandError(f"{model.name} has another layout than the file: {difference}")
    model.put_state(content.state)
    if (model.groups, model.policy) != (content.groups, content.policy):
        typer.echo(f"{model.name} keeps its hyperparameters and policy, which differ from the file's")


def _difference(ours: "Sequence[deltaserve.TensorSpec]", theirs: "Sequence[deltaserve.TensorSpec]") -> str | None:
    """Says in what a model's layout differs from a file's; None where it does not."""
    for index, (held, came) in enumerate(zip(ours, theirs, strict=False)):
        if held != came:
            return f"tensor {index} is {_describe(held)}, not {_describe(came)}"
    return None if len(ours) == len(theirs) else f"it has {len(ours)} tensors, not {len(theirs)}"


def _describe(spec: "deltaserve.TensorSpec") -> str:
    return f"{spec.name} {list(spec.shape)} in group {spec.group}"
