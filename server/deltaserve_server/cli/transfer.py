"""`deltaserve export` and `import`: a whole model to a file, and back to any server."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import format_bytes
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.output import TRANSFER_SECONDS, Force, Output, check, write_whole

if TYPE_CHECKING:
    import deltaserve
    from deltaserve_server.cli.saved import SavedModel

File = Annotated[Path, typer.Argument(metavar="FILE", help="File that deltaserve export wrote.", show_default=False)]
Name = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Name of the model.", show_default="as in the file")
]
Replace = Annotated[bool, typer.Option("--replace", help="Replace the state of an existing model.")]


def export(model: ModelArgument, output: Output, target: Target = DEFAULT_TARGET, force: Force = False) -> None:
    """Write a whole model to a safetensors file, for deltaserve import.

    The file holds weights, optimizer state, update counts, optimizer and policy.
    """
    from deltaserve_server.cli import saved

    check(output, force)  # first, because the transfer may take minutes
    with connected(target, TRANSFER_SECONDS) as client:
        exported = client.model(model)
        state = exported.pull_state()
        content = saved.encode(exported.info(), state)
    write_whole(output, content)
    typer.echo(f"{output}: {model} at version {state.version}, {format_bytes(len(content))}")


def import_(file: File, model: Name = None, target: Target = DEFAULT_TARGET, replace: Replace = False) -> None:
    """Create a model from a file, which continues where the exported one was.

    Its versions start again from the beginning.
    With --replace, an existing model keeps its own optimizer and policy.
    """
    from deltaserve_server.cli import saved

    content = saved.read(file)
    name = model or content.name
    with connected(target, TRANSFER_SECONDS) as client:
        if replace and any(summary.name == name for summary in client.models()):
            _replace(client.model(name), content)
        else:
            _create(client, name, content)
    typer.echo(f"imported {name} from {file}, exported at version {content.state.version}")


# Two steps, because no RPC creates a model with a state.
def _create(client: "deltaserve.Client", name: str, content: "SavedModel") -> None:
    import deltaserve

    exists = CommandError(f"{name} exists: choose another name with --model, or replace its state with --replace")
    try:
        new = client.create_model(
            name,
            content.state.weights,
            groups=content.groups,
            group_of={spec.name: spec.group for spec in content.tensors},
            policy=content.policy,
        )
    except deltaserve.ConflictError as error:
        raise exists from error
    if not new.created:  # it equals the file's model in all but its state, which `put_state` would overwrite
        raise exists
    try:
        new.put_state(content.state)
    except BaseException:  # Ctrl+C too: a model without its state would train on as if it were complete
        with contextlib.suppress(deltaserve.Error):
            new.delete()
        raise


def _replace(model: "deltaserve.Model", content: "SavedModel") -> None:
    from deltaserve._common.optimizers.definition import described

    difference = _difference(model.tensors, content.tensors)
    if difference:
        raise CommandError(
            f"the layout of {model.name} differs from the file's: {difference}; import it as another model with --model"
        )
    ours, theirs = model.groups[0], content.groups[0]
    if ours.structure != theirs.structure:
        raise CommandError(
            f"{model.name} has the optimizer {described(ours)}, the file {described(theirs)}; "
            "import it as another model with --model"
        )
    model.put_state(content.state)
    if (model.groups, model.policy) != (content.groups, content.policy):
        typer.echo(f"{model.name} keeps its optimizer and policy, which differ from the file's")


def _difference(model: "Sequence[deltaserve.TensorSpec]", file: "Sequence[deltaserve.TensorSpec]") -> str | None:
    """Describes the first difference between the layouts of a model and a file; None if there is none."""
    for index, (ours, theirs) in enumerate(zip(model, file, strict=False)):
        if ours != theirs:
            return f"tensor {index} is {_describe(ours)}, not {_describe(theirs)}"
    return None if len(model) == len(file) else f"it has {len(model)} tensors, not {len(file)}"


def _describe(spec: "deltaserve.TensorSpec") -> str:
    return f"{spec.name} {list(spec.shape)} in group {spec.group}"
