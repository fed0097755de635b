"""Hyperparameters of every optimizer: defaults, ranges, and the rounding to float32."""

import inspect
import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.support.optimizer_cases import IN_TORCH, STRUCTURES, over, torchs

from deltaserve._common.optimizers import OPTIMIZERS, SGD, Adagrad, Adam, Optimizer, RMSprop
from deltaserve._common.optimizers.definition import (
    FLOAT32_MAX,
    MAGNITUDE_MAX,
    hyperparameters,
    rounded_to_float32,
)

# The midpoint between the largest float32 and 2**128: values from here on round to infinity.
TOO_LARGE = FLOAT32_MAX + 2.0**103
# Half the smallest float32 above 0: values up to here round to 0.
TOO_SMALL = 2.0**-150
BELOW_1 = math.nextafter(1.0, 0.0)
ABOVE_1 = math.nextafter(1.0, 2.0)

# What is allowed and what is not, near each end.
RANGES: dict[str, tuple[list[float], list[float]]] = {
    ">= 0 and finite, also in float32": (
        [0.0, 1e-45, TOO_SMALL, FLOAT32_MAX, math.nextafter(TOO_LARGE, 0)],
        [-1e-9, math.nan, math.inf, -math.inf, TOO_LARGE],
    ),
    "> 0 and finite, also in float32": (
        [math.nextafter(TOO_SMALL, 1), FLOAT32_MAX],
        [0.0, -1e-6, TOO_SMALL, math.nan, math.inf, TOO_LARGE],
    ),
    f"in [0, {2.0**38:g}]": ([0.0, 1e-45, 2.0**38], [-1e-9, math.nextafter(2.0**38, math.inf), math.nan, math.inf]),
    f"in [{2.0**-126:g}, {2.0**64:g}]": (
        [2.0**-126, 1e-6, 2.0**64],
        [0.0, -1e-6, math.nextafter(2.0**-126, 0), math.nextafter(2.0**64, math.inf), math.nan, math.inf],
    ),
    "in [0, 1]": ([0.0, 0.5, 1.0], [-5e-324, ABOVE_1, math.nan, math.inf]),
    "in [0, 1)": ([0.0, 0.5, BELOW_1], [-5e-324, 1.0, ABOVE_1, math.nan, math.inf]),
    f"in (0, {MAGNITUDE_MAX:g}], also in float32": (
        [math.nextafter(TOO_SMALL, 1), MAGNITUDE_MAX],
        [0.0, TOO_SMALL, 2.0**64, math.nan, math.inf],
    ),
}
BOUNDED = [
    (kind, field.name, str(field.metadata["bounds"]))
    for kind, optimizer in OPTIMIZERS.items()
    for field in fields(optimizer)
    if "bounds" in field.metadata
]


@pytest.mark.parametrize("kind", {optimizer.kind: None for optimizer in IN_TORCH})
def test_names_and_defaults_are_torchs(kind: str) -> None:
    optimizer = OPTIMIZERS[kind]()
    torchs_ = dict(inspect.signature(getattr(torch.optim, type(optimizer).__name__)).parameters)
    expected = {name: parameter.default for name, parameter in torchs_.items()}
    if "betas" in expected:
        expected["beta1"], expected["beta2"] = expected.pop("betas")
    for name in hyperparameters(optimizer):
        assert getattr(optimizer, name) == expected.pop(name)
    assert set(expected) == {"params", "foreach", "differentiable"} | set(expected) & {
        "capturable",
        "fused",
        "decoupled_weight_decay",
    }


@over(optimizer for optimizer in STRUCTURES if optimizer in IN_TORCH)
def test_slots_are_torchs_state(optimizer: Optimizer) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    stepping = torchs(optimizer, [parameter])
    stepping.step()
    assert {slot.name for slot in optimizer.slots} == set(stepping.state[parameter]) - {"step"}


def test_every_numeric_hyperparameter_has_bounds() -> None:
    bounded = {(kind, name) for kind, name, _ in BOUNDED}
    for kind, optimizer in OPTIMIZERS.items():
        for name in hyperparameters(optimizer):
            assert ((kind, name) in bounded) == (type(getattr(optimizer(), name)) is float)


@pytest.mark.parametrize(("kind", "name", "bounds"), BOUNDED)
def test_the_limits_of_each_range(kind: str, name: str, bounds: str) -> None:
    good, bad = RANGES[bounds]
    for value in good:
        assert OPTIMIZERS[kind](**{name: value}).problem() is None
    for value in bad:
        assert OPTIMIZERS[kind](**{name: value}).problem() == (name, bounds)


def test_the_first_value_out_of_range_is_reported() -> None:
    problem = Adam(lr=-1, beta1=2, eps=0).problem()
    assert problem is not None
    assert problem[0] == "lr"


@pytest.mark.parametrize(
    ("optimizer", "is_allowed"),
    [
        (SGD(momentum=0.9, nesterov=True), True),
        (SGD(nesterov=True), False),
        (SGD(momentum=0.9, dampening=0.1, nesterov=True), False),
    ],
)
def test_nesterov_needs_momentum_without_dampening(optimizer: SGD, is_allowed: bool) -> None:
    problem = optimizer.problem()
    assert (problem is None) == is_allowed
    assert is_allowed or (problem is not None and problem[0] == "nesterov")


def test_magnitude_max_is_the_largest_with_a_finite_square() -> None:
    largest = torch.tensor(MAGNITUDE_MAX, dtype=torch.float32)
    assert torch.isfinite(largest * largest)
    above = torch.nextafter(largest, torch.tensor(math.inf))
    assert torch.isinf(above * above)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 1 / 3, 1e-45, TOO_SMALL, 1e-50, FLOAT32_MAX, TOO_LARGE, -1e300])
def test_rounding_to_float32_is_torchs(value: float) -> None:
    expected = torch.tensor(value, dtype=torch.float64).float().item()
    assert (rounded_to_float32(value), math.copysign(1, rounded_to_float32(value))) == (
        expected,
        math.copysign(1, expected),
    )


def test_structures_tell_options_and_slots_but_no_numbers() -> None:
    assert len({optimizer.structure for optimizer in STRUCTURES}) == len(STRUCTURES)
    for optimizer in STRUCTURES:
        same: Any = replace(optimizer, lr=0.123, weight_decay=0.5, maximize=True)
        assert same.structure == optimizer.structure
    assert SGD(momentum=0.1).structure == SGD(momentum=0.9).structure != SGD().structure


def test_what_depends_on_the_count() -> None:
    """Tensors with equal relevant counts share a call of the kernel, so few may differ."""
    counts = (1, 2, 3, 1000)
    relevant = {
        optimizer: tuple(optimizer.relevant_count(count) for count in counts)
        for optimizer in (Adam(), Adagrad(), Adagrad(lr_decay=0.1), SGD(), SGD(momentum=0.9), RMSprop())
    }
    assert relevant[Adam()] == relevant[Adagrad(lr_decay=0.1)] == counts
    assert relevant[SGD(momentum=0.9)] == (1, 2, 2, 2)
    assert len(set(relevant[SGD()])) == len(set(relevant[RMSprop()])) == len(set(relevant[Adagrad()])) == 1


@over(STRUCTURES)
def test_scalars_depend_on_the_relevant_count_alone(optimizer: Optimizer) -> None:
    for one, other in itertools.combinations((1, 2, 3, 100, 10**6), 2):
        if optimizer.relevant_count(one) == optimizer.relevant_count(other):
            assert optimizer.scalars(optimizer.relevant_count(one)) == optimizer.scalars(
                optimizer.relevant_count(other)
            )
