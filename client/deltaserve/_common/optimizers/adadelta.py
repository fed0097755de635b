"""Adadelta."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deltaserve._common.optimizers.definition import (
    MAGNITUDE_MAX,
    Operations,
    Optimizer,
    Slot,
    bounded,
    hyper,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adadelta(Optimizer):
    """Adadelta (Zeiler, 2012, arXiv:1212.5701), with the names and defaults of `torch.optim.Adadelta`.

    With g as the gradient, s and dx as the leaky averages and x as the weights:

        s  = rho s + (1 - rho) g^2                 square_avg
        g' = sqrt(dx + eps) / sqrt(s + eps) g      the step
        dx = rho dx + (1 - rho) g'^2               acc_delta
        x  = x - lr g'                             weights

    Attributes:
        lr: Factor of the update, in [0, 2**38]. It is torch's addition and is 1 in the paper.
        rho: Decay of both leaky averages, in [0, 1].
        eps: Added to both averages before their square root, in [2**-126, 2**64].
        weight_decay: L2 penalty, >= 0: this times the weights is added to the gradient.
        maximize: Ascend instead of descend.
    """

    # A step is at most MAGNITUDE_MAX. 2**38 times that is less than half of the last place of the largest float32, so
    # adding it to a weight never gives more than that.
    clips_weight: ClassVar[bool] = False

    kind: str = field(default="adadelta", init=False, repr=False)
    lr: float = hyper(1.0, minimum=0, maximum=2.0**38)
    rho: float = hyper(0.9, minimum=0, maximum=1)
    eps: float = hyper(1e-6, minimum=2.0**-126, maximum=2.0**64)
    weight_decay: float = hyper(0.0, minimum=0)
    maximize: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The leaky averages of squared gradients and of squared steps."""
        return Slot("square_avg", minimum=0), Slot("acc_delta", minimum=0)

    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns the hyperparameters, 1 - rho, and -lr."""
        return {"rho": self.rho, "one_minus_rho": 1 - self.rho, "eps": self.eps, "minus_lr": -self.lr}

    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element."""
        s, dx = slots
        # With the limits on g and on the step no average exceeds the largest float32, even where the rounded rho and
        # 1 - rho add up to more than 1. The limits on eps keep the roots within [2**-63, 2**64], and the rate finite.
        s = op.fma(h.one_minus_rho * g, g, s * h.rho)
        rate = op.sqrt(dx + h.eps) / op.sqrt(s + h.eps)
        step = bounded(op, rate * g, MAGNITUDE_MAX)
        dx = op.fma(h.one_minus_rho * step, step, dx * h.rho)
        return op.fma(h.minus_lr, step, w), (s, dx)
