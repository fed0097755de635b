"""Optimizers to test with: every kind and every option, and the optimizer of torch that each stands for."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop
from deltaserve._common.optimizers.definition import hyperparameters

STRUCTURES: tuple[Optimizer, ...] = (
    Adadelta(),
    SGD(),
    SGD(momentum=0.9),
    SGD(momentum=0.9, nesterov=True),
    Adagrad(),
    RMSprop(),
    RMSprop(centered=True),
    RMSprop(momentum=0.9),
    RMSprop(momentum=0.9, centered=True),
    Adam(),
    Adam(amsgrad=True),
    AdamW(),
    AdamW(amsgrad=True),
    Lion(),
)
"""One optimizer of each structure, with torch's defaults elsewhere."""

CASES: tuple[Optimizer, ...] = (
    *STRUCTURES,
    *(replace(optimizer, lr=0.3, weight_decay=0.1) for optimizer in STRUCTURES),
    Adadelta(lr=0.1, rho=0.95, eps=1e-5, maximize=True),
    Adadelta(rho=0.0),
    Adadelta(lr=3.0, rho=1.0),
    SGD(lr=0.1, maximize=True),
    SGD(lr=0.1, momentum=0.5, dampening=0.25, weight_decay=0.01, maximize=True),
    Adagrad(lr=0.1, lr_decay=0.1, eps=1e-5, weight_decay=0.01, maximize=True),
    Adagrad(initial_accumulator_value=0.5),
    RMSprop(lr=0.1, alpha=0.3, eps=1e-5, weight_decay=0.01, maximize=True),
    RMSprop(lr=0.1, alpha=0.3, momentum=0.5, centered=True, maximize=True),
    Adam(lr=0.1, beta1=0.3, beta2=0.4, eps=1e-5, weight_decay=0.01, maximize=True),
    Adam(lr=0.1, beta1=0.0, beta2=0.0, amsgrad=True),
    AdamW(lr=0.1, beta1=0.3, beta2=0.99, eps=1e-5, weight_decay=0.5, maximize=True),
    AdamW(weight_decay=0.0),
    Lion(lr=0.1, beta1=0.3, beta2=0.4, weight_decay=0.01, maximize=True),
    Lion(beta1=0.0, beta2=1.0),
    Lion(beta1=1.0, beta2=0.0),
)
"""The structures with torch's defaults, with weight decay, and with other hyperparameters."""

IN_TORCH = tuple(optimizer for optimizer in CASES if not isinstance(optimizer, Lion))
"""The cases whose optimizer torch has too."""


def identifier(optimizer: Optimizer) -> str:
    """Returns the kind and what differs from its defaults, as the name of a test's case."""
    default = type(optimizer)()
    names = (name for name in hyperparameters(optimizer) if getattr(optimizer, name) != getattr(default, name))
    return ",".join([optimizer.kind, *(f"{name}={getattr(optimizer, name)}" for name in names)])


def over(optimizers: Iterable[Optimizer] = CASES) -> pytest.MarkDecorator:
    """Returns the mark that runs a test with each optimizer, as its argument `optimizer`."""
    return pytest.mark.parametrize("optimizer", [pytest.param(case, id=identifier(case)) for case in optimizers])


def torchs(optimizer: Optimizer, parameters: Any, **options: Any) -> Any:
    """Returns the optimizer of torch with the same hyperparameters; it must be one of `IN_TORCH`.

    Args:
        optimizer: One of ours.
        parameters: What torch's optimizer updates.
        options: More arguments for torch's class.
    """
    import torch

    values = {name: getattr(optimizer, name) for name in hyperparameters(optimizer)}
    if "beta1" in values:
        values["betas"] = values.pop("beta1"), values.pop("beta2")
    return getattr(torch.optim, type(optimizer).__name__)(parameters, **values, **options)
