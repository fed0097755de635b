"""`deltaserve models`, `status` and `delete`: the models of a server."""

import math
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import facts, format_bytes, format_seconds, table
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.settings import format_policy

if TYPE_CHECKING:
    import deltaserve

OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Show this model instead of the server.", show_default=False)
]


def models(target: Target = DEFAULT_TARGET) -> None:
    """List the models of a server."""
    with connected(target) as client:
        summaries = client.models()
    if summaries:
        typer.echo(_model_table(summaries))
    else:
        typer.echo(f"no models; try: deltaserve train digits --workers 2 --target {target}")


def status(model: OptionalModel = None, target: Target = DEFAULT_TARGET) -> None:
    """Show the status of a server, or of a model and its workers."""
    with connected(target) as client:
        typer.echo(_server_status(client, target) if model is None else _model_status(client.model(model)))


def delete(
    model: ModelArgument,
    target: Target = DEFAULT_TARGET,
    force: Annotated[bool, typer.Option("--force", help="Delete it even if workers have sessions.")] = False,
) -> None:
    """Delete a model and its sessions."""
    with connected(target) as client:
        info = client.model(model).info()
        if info.sessions and not force:  # the next call of each would fail
            raise CommandError(
                f"{model} has {len(info.sessions)} live sessions: stop its workers, or delete it with --force"
            )
        client.delete_model(model)
    typer.echo(f"deleted {model} at version {info.version}")


def _server_status(client: "deltaserve.Client", target: str) -> str:
    info, summaries = client.server_info(), client.models()
    sessions = sum(summary.session_count for summary in summaries)
    limits = info.limits
    free, whole = format_bytes(limits.memory_available_bytes), format_bytes(limits.memory_bytes)
    lines = facts(
        [
            ("server", f"{target}, deltaserve {info.version}, up {format_seconds(info.uptime_seconds)}"),
            ("device", device(info)),
            ("memory", f"{free} of {whole} free"),
            ("durable", DURABILITY.get(info.durability, info.durability)),  # a newer server may have others
            ("models", f"{len(summaries)} of {limits.models}"),
            ("sessions", f"{sessions} of {limits.sessions}"),
        ]
    )
    return f"{lines}\n\n{_model_table(summaries)}" if summaries else lines


DURABILITY = {
    "none": "nothing: models end with the server process",
    "snapshot": "the last snapshot of each model",
    "journal": "every acknowledged push",
    "fsync": "every acknowledged push, even if the power fails",
}
"""What survives when the server dies, by the server's durability."""


def device(info: "deltaserve.ServerInfo") -> str:
    """Describes the device of a server."""
    # On a GPU the number of threads is 0.
    threads = f", {info.threads} thread{'s' * (info.threads != 1)}" if info.device_kind == "cpu" else ""
    return f"{info.device_kind}: {info.device_name}{threads}"


def _model_table(summaries: "list[deltaserve.ModelSummary]") -> str:
    header = ("MODEL", "ELEMENTS", "TENSORS", "SESSIONS", "VERSION", "DURABLE", "OPTIMIZER", "POLICY")
    rows = [
        (
            model.name,
            model.element_count,
            model.tensor_count,
            model.session_count,
            model.version,
            "none" if model.durable_version is None else model.durable_version,
            model.optimizer,
            format_policy(model.policy),
        )
        for model in summaries
    ]
    return table(header, rows)


def _model_status(model: "deltaserve.Model") -> str:
    info = model.info()
    elements = sum(math.prod(tensor.shape) for tensor in model.tensors)
    durable = "none" if info.durable_version is None else info.durable_version  # version 0 may be durable
    head = facts(
        [
            ("model", model.name),
            ("version", f"{info.version}, durable: {durable}"),
            ("optimizer", model.groups[0].kind),
            ("policy", format_policy(model.policy)),
            ("weights", f"{elements} float32 elements, {format_bytes(4 * elements)}"),
        ]
    )
    tensors = [
        (tensor.name, " x ".join(map(str, tensor.shape)) or "scalar", tensor.group)  # a scalar has an empty shape
        for tensor in model.tensors
    ]
    sessions = [
        (
            session.worker,
            session.rank,
            session.epoch,
            session.last_sequence,
            f"{session.lease_left_seconds:.0f} s",
            "for its round" if session.waiting else "no",
        )
        for session in info.sessions
    ]
    header = ("WORKER", "RANK", "EPOCH", "PUSHES", "LEASE LEFT", "WAITING")
    workers = table(header, sessions) if sessions else "no sessions"
    return "\n\n".join([head, group_table(model), table(("TENSOR", "SHAPE", "GROUP"), tensors), workers])


def group_table(model: "deltaserve.Model") -> str:
    """Formats the hyperparameters, one line per parameter group."""
    from deltaserve._common.optimizers.definition import hyperparameters

    names = hyperparameters(model.groups[0])  # all groups of a model have the same optimizer
    rows = [(index, *(_shown(getattr(group, name)) for name in names)) for index, group in enumerate(model.groups)]
    return table(("GROUP", *map(str.upper, names)), rows)


def _shown(value: float) -> object:
    return value if not isinstance(value, bool) else "yes" if value else "no"
