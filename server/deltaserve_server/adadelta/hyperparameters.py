"""Adadelta's hyperparameters, and what the float32 implementations make of them."""

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
        """Says what is out of range, if anything is.

        Returns:
            The name of the first field that is out of range and the values it may have, or None where all are fine.
            Ranges hold for the value as given and as rounded to float32, in which the update is computed.
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
    """Hyperparameters as the float32 implementations take them; every number is a float32's value.

    Attributes:
        minus_lr: Minus the factor of the update.
        rho: Decay of both leaky averages.
        one_minus_rho: Weight of the new square, subtracted in double and then rounded, as torch does.
        eps: Added to both averages before their square root.
        weight_decay: L2 penalty.
        sign: -1 to maximize, else 1.
    """

    minus_lr: float
    rho: float
    one_minus_rho: float
    eps: float
    weight_decay: float
    sign: float


@functools.lru_cache(maxsize=1024)
def scalars(hyperparameters: Hyperparameters) -> Scalars:
    """Rounds hyperparameters to float32, once and for all implementations alike.

    Args:
        hyperparameters: Without a `problem`.
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
    """Rounds to the nearest float32; what is too large for one becomes infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
