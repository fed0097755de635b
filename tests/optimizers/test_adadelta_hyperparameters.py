"""Hyperparameters: defaults, ranges, and the rounding to float32."""

import dataclasses
import inspect
import math

import pytest
import torch
from deltaserve_server.optimizers.hyperparameters import FLOAT32_MAX, MAGNITUDE_MAX, scalars
from hypothesis import given
from hypothesis import strategies as st

from deltaserve_server.optimizers import Hyperparameters

# The midpoint between the largest float32 and 2**128: values from here on round to infinity.
TOO_LARGE = FLOAT32_MAX + 2.0**103
# Half the smallest float32 above 0: values up to here round to 0.
TOO_SMALL = 2.0**-150


def test_defaults_are_torchs() -> None:
    torchs = inspect.signature(torch.optim.Adadelta).parameters
    for field in dataclasses.fields(Hyperparameters):
        assert field.default == torchs[field.name].default


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"lr": 0.0},
        {"lr": FLOAT32_MAX},
        {"lr": math.nextafter(TOO_LARGE, 0)},
        {"rho": 0.0},
        {"rho": 1.0},
        {"eps": math.nextafter(TOO_SMALL, 1)},
        {"eps": FLOAT32_MAX},
        {"weight_decay": 0.0},
        {"weight_decay": FLOAT32_MAX},
        {"weight_decay": TOO_SMALL},
    ],
)
def test_the_limits_of_each_range_are_valid(good: dict[str, float]) -> None:
    assert Hyperparameters(**good).problem() is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("lr", value) for value in (-1e-9, math.nan, math.inf, -math.inf, TOO_LARGE)),
        *(("rho", value) for value in (-5e-324, math.nextafter(1.0, 2.0), math.nan, math.inf)),
        *(("eps", value) for value in (0.0, -1e-6, TOO_SMALL, math.nan, math.inf, TOO_LARGE)),
        *(("weight_decay", value) for value in (-1e-9, math.nan, math.inf, TOO_LARGE)),
    ],
)
def test_a_value_out_of_range_is_reported(field: str, bad: float) -> None:
    problem = Hyperparameters(**{field: bad}).problem()  # type: ignore[arg-type]
    assert problem is not None
    assert problem[0] == field
    assert problem[1]


def test_magnitude_max_is_the_largest_with_a_finite_square() -> None:
    largest = torch.tensor(MAGNITUDE_MAX, dtype=torch.float32)
    assert torch.isfinite(largest * largest)
    above = torch.nextafter(largest, torch.tensor(math.inf))
    assert torch.isinf(above * above)


@given(rho=st.floats(0, 1), value=st.floats(2.0**-149, 1e30))
def test_scalars_are_rounded_to_float32_once(rho: float, value: float) -> None:
    made = scalars(Hyperparameters(lr=value, rho=rho, eps=value, weight_decay=value))
    assert -made.minus_lr == made.eps == made.weight_decay == torch.tensor(value, dtype=torch.float32).item()
    assert made.rho == torch.tensor(rho, dtype=torch.float32).item()
    assert made.one_minus_rho == torch.tensor(1 - rho, dtype=torch.float64).float().item()


def test_sign() -> None:
    assert scalars(Hyperparameters()).sign == 1
    assert scalars(Hyperparameters(maximize=True)).sign == -1
