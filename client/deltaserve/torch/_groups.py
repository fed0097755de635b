"""The parameter groups of torch optimizers, as optimizers of the service."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache, lru_cache
from inspect import signature
from typing import Any

import torch

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from deltaserve._common.optimizers.definition import described, hyperparameters

DEFINITIONS: dict[type[torch.optim.Optimizer], type[Optimizer]] = {
    torch.optim.Adadelta: Adadelta,
    torch.optim.SGD: SGD,
    torch.optim.Adagrad: Adagrad,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}
"""The torch classes that are served, and their definitions."""

_REFUSED = {
    "capturable": "a CUDA graph cannot wait for a server",
    "differentiable": "autograd cannot pass through a server",
}
"""Options of torch that cannot be had here. `foreach` and `fused` choose between implementations of the same update."""


def torch_class_of(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Returns the torch class of an optimizer that is served.

    Raises:
        TypeError: It is not served. A subclass is not, because its step may be another one.
    """
    if type(optimizer) not in DEFINITIONS:
        served = ", ".join(torch_class.__name__ for torch_class in DEFINITIONS)
        raise TypeError(
            f"{type(optimizer).__name__} is not served: expected an optimizer of torch.optim that is elementwise, "
            f"exactly one of {served}. A subclass may make another step, and Muon and LBFGS are not elementwise"
        )
    return type(optimizer)


def optimizers_of(
    torch_class: type[torch.optim.Optimizer], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[Optimizer]:
    """Returns the present hyperparameters of parameter groups, unchecked; tensors become numbers.

    Args:
        torch_class: The class of the torch optimizer.
        groups: Its parameter groups.
        defaults: Its `defaults`.
    """
    # torch fills the sums of all groups with the constructor's value, whatever a group's own is.
    name = "initial_accumulator_value"
    common = {name: defaults[name]} if name in defaults else {}
    return [_optimizer_of(torch_class, {**group, **common}) for group in groups]


def _optimizer_of(torch_class: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> Optimizer:
    values = [
        convert(group[key] if position is None else group[key][position])
        for key, position, convert in _readers(DEFINITIONS[torch_class])
    ]
    return _cached_optimizer(DEFINITIONS[torch_class], *values)


@cache
def _readers(definition: type[Optimizer]) -> list[tuple[str, int | None, type[float]]]:
    """Returns, for each hyperparameter, its key in a group, its position in the value there, and its type."""
    keys: dict[str, tuple[str, int | None]] = {"beta1": ("betas", 0), "beta2": ("betas", 1)}
    types: dict[str, Any] = {field.name: type(field.default) for field in fields(definition)}
    return [(*keys.get(name, (name, None)), types[name]) for name in hyperparameters(definition)]


@lru_cache(maxsize=1024)  # most steps use the hyperparameters of the step before
def _cached_optimizer(definition: type[Optimizer], *values: float) -> Optimizer:
    return definition(**dict(zip(hyperparameters(definition), values, strict=True)))


def arguments_of(torch_class: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a group, or of `defaults`, that the constructor of the torch class takes."""
    return {name: group[name] for name in signature(torch_class).parameters if name in group and name != "params"}


def torch_defaults(torch_class: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `defaults` of a torch optimizer that is made with these arguments.

    Raises:
        ValueError: torch refuses an argument.
    """
    return _dummy(torch_class, arguments).defaults


def complete_groups(torch_class: type[torch.optim.Optimizer], groups: list[dict[str, Any]]) -> None:
    """Adds what the groups of a state dict of an older version of torch lack, as torch does."""
    _dummy(torch_class, {}).__setstate__({"state": {}, "param_groups": groups})


def _dummy(torch_class: Any, arguments: Mapping[str, Any]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = torch_class([torch.zeros(1, device="cpu")], **arguments)
    return optimizer


def check_group(
    torch_class: type[torch.optim.Optimizer], group: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Optimizer:
    """Checks a parameter group and returns its hyperparameters.

    Raises:
        ValueError: A hyperparameter is missing or out of range, in torch's words where torch refuses it, too; or an
            option of torch cannot be had.
        TypeError: A parameter is not a real floating-point tensor.
    """
    missing = [key for key, *_ in _readers(DEFINITIONS[torch_class]) if key not in group]
    if missing:
        raise ValueError(f"a parameter group lacks {missing[0]}; is it one of another optimizer?")
    _check_torch_options(torch_class, group)
    arguments = arguments_of(torch_class, group)
    if "betas" in arguments:  # in a group, torch does not mind integers and lists
        arguments["betas"] = tuple(float(beta) for beta in arguments["betas"])
    torch_defaults(torch_class, arguments)
    (optimizer,) = optimizers_of(torch_class, [group], defaults)
    if problem := optimizer.problem():
        name, allowed = problem
        raise ValueError(f"{name}: expected {allowed}, got {getattr(optimizer, name)}")
    for param in group["params"]:
        if not param.dtype.is_floating_point:
            raise TypeError(f"Remote{torch_class.__name__} requires real floating-point parameters, got {param.dtype}")
    return optimizer


def _check_torch_options(torch_class: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> None:
    for option, reason in _REFUSED.items():
        if group.get(option):
            raise ValueError(f"{option}: expected False, got {group[option]}: {reason}")
    is_decoupled = DEFINITIONS[torch_class].decoupled
    if bool(group.get("decoupled_weight_decay", is_decoupled)) != is_decoupled:
        other = "Adam" if is_decoupled else "AdamW"
        raise ValueError(f"decoupled_weight_decay: expected {is_decoupled}; use {other} or Remote{other} instead")


def check_structure(expected: Optimizer, optimizers: Sequence[Optimizer]) -> None:
    """Checks that optimizers have the structure that a model has.

    Raises:
        ValueError: One of them differs; the message says in what.
    """
    for optimizer in optimizers:
        if optimizer.structure != expected.structure:
            raise ValueError(
                f"expected {described(expected)}, got {described(optimizer)}: all parameter groups of a model have "
                "the same, which is fixed when the model is created"
            )
