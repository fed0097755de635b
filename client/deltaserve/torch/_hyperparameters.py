"""The hyperparameters of a torch parameter group, checked and converted."""

from typing import Any

from torch import Tensor

from deltaserve._types import Hyperparameters

UNUSED_DEFAULTS: dict[str, Any] = {"foreach": None, "capturable": False, "differentiable": False}
"""Group options of `torch.optim.Adadelta` that have no effect here; kept so that state dicts fit both optimizers."""


def check_group(group: dict[str, Any]) -> None:
    """Checks a parameter group; out-of-range hyperparameters raise the errors of `torch.optim.Adadelta`.

    Raises:
        ValueError: A hyperparameter is out of range.
        TypeError: A parameter is not a real floating-point tensor.
    """
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    # Written so that NaN fails every check.
    for key, name, valid in (
        ("lr", "learning rate", group["lr"] >= 0),
        ("rho", "rho value", 0 <= group["rho"] <= 1),
        ("eps", "epsilon value", group["eps"] > 0),
        ("weight_decay", "weight_decay value", group["weight_decay"] >= 0),
    ):
        if not valid:
            raise ValueError(f"Invalid {name}: {group[key]}")
    for param in group["params"]:
        if not param.dtype.is_floating_point:
            raise TypeError(f"RemoteAdadelta requires real floating-point parameters, got {param.dtype}")


def hyperparameters_of(group: dict[str, Any]) -> Hyperparameters:
    """Returns the present hyperparameters of a parameter group; a tensor `lr` becomes a number."""
    return Hyperparameters(
        lr=float(group["lr"]),
        rho=float(group["rho"]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
    )
