"""`deltaserve update`: changes the policy or hyperparameters of a model while workers train it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import facts
from deltaserve_server.cli.errors import UsageError
from deltaserve_server.cli.models import group_table
from deltaserve_server.cli.options import DEFAULT_TARGET, POLICY_HELP, ModelArgument, Target
from deltaserve_server.cli.settings import Parsed, format_policy, parse_policy, parse_settings

if TYPE_CHECKING:
    import deltaserve

Policy = Annotated[
    Parsed[Any] | None,
    typer.Option(
        "--policy",
        metavar="POLICY",
        parser=parse_policy,
        help=f"{POLICY_HELP} Settings that are not given get their defaults.",
        show_default=False,
    ),
]
Set = Annotated[
    str | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE[,...]",
        help="Hyperparameters to change: lr=0.5,weight_decay=0.01. Those that are not given stay as they are.",
        show_default=False,
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group", min=0, metavar="INDEX", help="Change this parameter group only.", show_default="all groups"
    ),
]


def update(
    model: ModelArgument,
    policy: Policy = None,
    settings: Set = None,
    group: Group = None,
    target: Target = DEFAULT_TARGET,
) -> None:
    """Change the policy or the hyperparameters of a model.

    Workers that push their own hyperparameters, as the optimizers of deltaserve.torch do, keep them.
    """
    # Checked before a call, so that a slip of the fingers gets its answer without a server.
    if group is not None and settings is None:
        raise UsageError("--group needs a hyperparameter to change: add --set NAME=VALUE")
    if policy is None and settings is None:
        raise UsageError("nothing to change: give --policy or --set NAME=VALUE")
    with connected(target) as client:
        changed = client.model(model)
        # One call for both: no update may use the new policy with the old hyperparameters.
        version = changed.update(
            groups=None if settings is None else _changed(changed, group, settings),
            policy=None if policy is None else policy.make(),
        )
    head = facts(
        [
            ("model", model),
            ("from", f"version {version} on"),
            ("optimizer", changed.groups[0].kind),
            ("policy", format_policy(changed.policy)),
        ]
    )
    typer.echo(f"{head}\n\n{group_table(changed)}")


def _changed(model: "deltaserve.Model", group: int | None, settings: str) -> "list[deltaserve.Optimizer]":
    """Returns the hyperparameters of all groups, changed in one group or in all."""
    optimizer, count = model.groups[0], len(model.groups)
    if group is not None and group >= count:
        raise UsageError(f"--group: expected {'0' if count == 1 else f'0 to {count - 1}'}, got {group}")
    try:
        changes = parse_settings(optimizer.kind, type(optimizer), settings)
    except typer.BadParameter as error:
        raise UsageError(f"--set: {error.message}") from error
    return [
        replace(current, **changes) if group in (None, index) else current for index, current in enumerate(model.groups)
    ]
