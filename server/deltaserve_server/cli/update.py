"""`deltaserve update`: changes the policy or hyperparameters of a model while workers train it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.connection import connected
from deltaserve_server.cli.display import facts
from deltaserve_server.cli.errors import UsageError
from deltaserve_server.cli.models import group_table
from deltaserve_server.cli.options import DEFAULT_TARGET, POLICY_HELP, ModelArgument, Target
from deltaserve_server.cli.policy import PolicyText, format_policy, parse_policy

if TYPE_CHECKING:
    import deltaserve

Policy = Annotated[
    PolicyText | None,
    typer.Option(
        "--policy",
        metavar="POLICY",
        parser=parse_policy,
        help=f"{POLICY_HELP} Settings that are not given get their defaults.",
        show_default=False,
    ),
]
Lr = Annotated[
    float | None,
    typer.Option("--lr", metavar="X", help="Learning rate, the factor of each update.", show_default=False),
]
Rho = Annotated[
    float | None, typer.Option("--rho", metavar="X", help="Decay of the two running averages.", show_default=False)
]
Eps = Annotated[
    float | None,
    typer.Option("--eps", metavar="X", help="Added to both averages for stability.", show_default=False),
]
WeightDecay = Annotated[
    float | None, typer.Option("--weight-decay", metavar="X", help="L2 penalty.", show_default=False)
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
    lr: Lr = None,
    rho: Rho = None,
    eps: Eps = None,
    weight_decay: WeightDecay = None,
    group: Group = None,
    target: Target = DEFAULT_TARGET,
) -> None:
    """Change the policy or the hyperparameters of a model.

    Workers that push their own hyperparameters, as RemoteAdadelta does, keep them.
    """
    given = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    changes = {name: value for name, value in given.items() if value is not None}
    # Checked before a call, so that a slip of the fingers gets its answer without a server.
    if group is not None and not changes:
        raise UsageError("--group needs a hyperparameter to change: add --lr, --rho, --eps or --weight-decay")
    if policy is None and not changes:
        raise UsageError("nothing to change: give --policy, --lr, --rho, --eps or --weight-decay")
    with connected(target) as client:
        changed = client.model(model)
        # One call for both: no update may use the new policy with the old hyperparameters.
        version = changed.update(
            groups=_changed(changed, group, changes) if changes else None,
            policy=None if policy is None else policy.policy(),
        )
    head = facts([("model", model), ("from", f"version {version} on"), ("policy", format_policy(changed.policy))])
    typer.echo(f"{head}\n\n{group_table(changed)}")


def _changed(
    model: "deltaserve.Model", group: int | None, changes: dict[str, float]
) -> "list[deltaserve.Hyperparameters]":
    """Returns the hyperparameters of all groups, changed in one group or in all."""
    count = len(model.groups)
    if group is not None and group >= count:
        raise UsageError(f"--group: expected {'0' if count == 1 else f'0 to {count - 1}'}, got {group}")
    return [
        replace(current, **changes) if group in (None, index) else current  # type: ignore[arg-type]
        for index, current in enumerate(model.groups)
    ]
