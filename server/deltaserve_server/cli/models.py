"""`deltaserve models`, `status` and `delete`: what a server holds."""

from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import facts, format_bytes, format_seconds, table
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.options import DEFAULT_TARGET, ModelArgument, Target
from deltaserve_server.cli.policy import format_policy

if TYPE_CHECKING:
    import deltaserve

OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="One model in detail.", show_default=False)]


def models(target: Target = DEFAULT_TARGET) -> None:
    """List the models that a server holds."""
    with connected(target) as client:
        summaries = client.models()
    if summaries:
        typer.echo(_model_table(summaries))
    else:
        typer.echo(f"no models yet; try: deltaserve train digits --workers 2 --target {target}")


def status(model: OptionalModel = None, target: Target = DEFAULT_TARGET) -> None:
    """Show how a server is, or one of its models with its workers."""
    with connected(target) as client:
        typer.echo(_server_status(client, target) if model is None else _model_status(client.model(model)))


def delete(
    model: ModelArgument,
    target: Target = DEFAULT_TARGET,
    force: Annotated[bool, typer.Option("--force", help="Also while workers have sessions with it.")] = False,
) -> None:
    """Forget a model and its sessions."""
    with connected(target) as client:
        info = client.model(model).info()
        if info.sessions and not force:
            raise CommandError(f"{model} has {len(info.sessions)} live sessions: stop the workers, or add --force")
        client.delete_model(model)
    typer.echo(f"deleted {model}, which was at version {info.version}")


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
            ("keeps", KEEPS.get(info.durability, info.durability)),
            ("models", f"{len(summaries)} of {limits.models}"),
            ("sessions", f"{sessions} of {limits.sessions}"),
        ]
    )
    return f"{lines}\n\n{_model_table(summaries)}" if summaries else lines


KEEPS = {
    "none": "nothing: models are gone when the server's process ends",
    "snapshot": "each model as of its last snapshot",
    "journal": "every acknowledged push",
    "fsync": "every acknowledged push, also where the power goes",
}
"""What survives, by a server's durability."""


def device(info: "deltaserve.ServerInfo") -> str:
    """Returns a server's device in words."""
    threads = f", {info.threads} thread{'s' * (info.threads != 1)}" if info.device_kind == "cpu" else ""
    return f"{info.device_kind}: {info.device_name}{threads}"


def _durable(version: int | None) -> int | str:
    return "none" if version is None else version


def _model_table(summaries: "list[deltaserve.ModelSummary]") -> str:
    header = ("MODEL", "ELEMENTS", "TENSORS", "SESSIONS", "VERSION", "DURABLE", "POLICY")
    rows = [
        (
            one.name,
            one.element_count,
            one.tensor_count,
            one.session_count,
            one.version,
            _durable(one.durable_version),
            format_policy(one.policy),
        )
        for one in summaries
    ]
    return table(header, rows)


def _model_status(model: "deltaserve.Model") -> str:
    info = model.info()
    elements = sum(_size(tensor.shape) for tensor in model.tensors)
    head = facts(
        [
            ("model", model.name),
            ("version", f"{info.version}, durable: {_durable(info.durable_version)}"),
            ("policy", format_policy(model.policy)),
            ("weights", f"{elements} float32 elements, {format_bytes(4 * elements)}"),
        ]
    )
    parts = [head, group_table(model), _tensor_table(model), _session_table(info)]
    return "\n\n".join(part for part in parts if part)


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def group_table(model: "deltaserve.Model") -> str:
    """Returns the hyperparameters, a line a parameter group."""
    rows = [
        (index, group.lr, group.rho, group.eps, group.weight_decay, "yes" if group.maximize else "no")
        for index, group in enumerate(model.groups)
    ]
    return table(("GROUP", "LR", "RHO", "EPS", "WEIGHT_DECAY", "MAXIMIZE"), rows)


def _tensor_table(model: "deltaserve.Model") -> str:
    rows = [(tensor.name, " x ".join(map(str, tensor.shape)) or "scalar", tensor.group) for tensor in model.tensors]
    return table(("TENSOR", "SHAPE", "GROUP"), rows)


def _session_table(info: "deltaserve.ModelInfo") -> str:
    rows = [
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
    return table(("WORKER", "RANK", "EPOCH", "PUSHES", "LEASE LEFT", "WAITING"), rows) if rows else "no sessions"
