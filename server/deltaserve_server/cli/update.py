"""`deltaserve update`: another policy or other hyperparameters, while the workers train."""

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
        help=f"{POLICY_HELP} What is left out gets its default.",
        show_default=False,
    ),
]
Lr = Annotated[float | None, typer.Option("--lr", metavar="X", help="Factor of the update.", show_default=False)]
Rho = Annotated[
    float | None, typer.Option("--rho", metavar="X", help="Decay of both leaky averages.", show_default=False)
]
Eps = Annotated[
    float | None,
    typer.Option("--eps", metavar="X", help="Added to both averages before their square root.", show_default=False),
]
WeightDecay = Annotated[
    float | None, typer.Option("--weight-decay", metavar="X", help="L2 penalty.", show_default=False)
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group", min=0, metavar="INDEX", help="The parameter group whose hyperparameters change.", show_default="all"
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
    """Change a model's policy or hyperparameters, for all its workers.

    Workers that push hyperparameters of their own, as RemoteAdadelta does, go on using those.
    """
    given = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    changes = {name: value for name, value in given.items() if value is not None}
    if group is not None and not changes:
        raise UsageError("--group says whose hyperparameters change: give --lr, --rho, --eps or --weight-decay too")
    if policy is None and not changes:
        raise UsageError("say what to change: --policy, --lr, --rho, --eps or --weight-decay")
    with connected(target) as client:
        changed = client.model(model)
        version = changed.update(
            groups=_changed(changed, group, changes) if changes else None,
            policy=None if policy is None else policy.policy(),
        )
    head = facts([("model", model), ("from", f"version {version} on"), ("policy", format_policy(changed.policy))])
    typer.echo(f"{head}\n\n{group_table(changed)}")


def _changed(
    model: "deltaserve.Model", group: int | None, changes: dict[str, float]
) -> "list[deltaserve.Hyperparameters]":
    """Returns the model's hyperparameters by group, with what is to change in one of them or in all."""
    count = len(model.groups)
    if group is not None and group >= count:
        raise UsageError(f"--group: expected {'0' if count == 1 else f'0 to {count - 1}'}, got {group}")
    return [
        replace(held, **changes) if group in (None, index) else held  # type: ignore[arg-type]
        for index, held in enumerate(model.groups)
    ]
