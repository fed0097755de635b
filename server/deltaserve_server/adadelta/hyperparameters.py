"""Adadelta's hyperparameters, and their rounding for the float32 implementations."""

import functools
import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
"""The largest finite float32."""

MAGNITUDE_MAX = (2.0 - 2.0**-23) * 2.0**63
"""The largest float32 whose square is finite in float32: the next one is 2**64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """One parameter group's hyperparameters, named and defaulted as in `torch.optim.Adadelta`.

    Attributes:
        lr: Factor of the update.
        rho: Decay of both leaky averages.
        eps: Added to both averages before their square root.
        weight_decay: L2 penalty: this times the weights is added to the gradient.
        maximize: Ascend instead of descend.
    """

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    maximize: bool = False

    def problem(self) -> tuple[str, str] | None:
        """Checks that all fields are in range, both as given and as rounded to float32 for the update.

        Returns:
            The name of the first field that is out of range and its allowed values, or None if all are in range.
        """
        for field, in_range, allowed in (
            ("lr", self.lr >= 0, ">= 0 and finite in float32"),
            ("rho", 0 <= self.rho <= 1, "in [0, 1]"),
            ("eps", _rounded(self.eps) > 0, "> 0 and finite in float32, and not rounded to 0 there"),
            ("weight_decay", self.weight_decay >= 0, ">= 0 and finite in float32"),
        ):
            if not in_range or not math.isfinite(_rounded(getattr(self, field))):
                return field, allowed
        return None


class Scalars(NamedTuple):
    """Hyperparameters rounded for the float32 implementations.

    Attributes:
        minus_lr: The negated factor of the update.
        rho: Decay of both leaky averages.
        one_minus_rho: Weight of the new square, 1 - rho computed in float64 and then rounded, as in torch.
        eps: Added to both averages before their square root.
        weight_decay: L2 penalty.
        sign: -1 if `maximize`, else 1.
    """

    minus_lr: float
    rho: float
    one_minus_rho: float
    eps: float
    weight_decay: float
    sign: float


# Every portion of every update asks for one of a few sets.
@functools.lru_cache(maxsize=1024)
def scalars(hyperparameters: Hyperparameters) -> Scalars:
    """Rounds hyperparameters to float32, the same way for every implementation.

    Args:
        hyperparameters: Hyperparameters in range, whose `problem()` is None.
    """
    return Scalars(
        minus_lr=-_rounded(hyperparameters.lr),
        rho=_rounded(hyperparameters.rho),
        one_minus_rho=_rounded(1.0 - hyperparameters.rho),
        eps=_rounded(hyperparameters.eps),
        weight_decay=_rounded(hyperparameters.weight_decay),
        sign=-1.0 if hyperparameters.maximize else 1.0,
    )


def _rounded(value: float) -> float:
    """Rounds to the nearest float32; a value beyond its range becomes infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:  # struct raises where rounding to nearest gives infinity
        return math.copysign(math.inf, value)
