"""Adadelta."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaserve._common.optimizers.definition import (
    FLOAT32_MAX,
    MAGNITUDE_MAX,
    Operations,
    Optimizer,
    Slot,
    at_most,
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
        lr: Factor of the update, >= 0. It is torch's addition and is 1 in the paper.
        rho: Decay of both leaky averages, in [0, 1].
        eps: Added to both averages before their square root, > 0.
        weight_decay: L2 penalty, >= 0: this times the weights is added to the gradient.
        maximize: Ascend instead of descend.
    """

    kind: str = field(default="adadelta", init=False, repr=False)
    lr: float = hyper(1.0, minimum=0)
    rho: float = hyper(0.9, minimum=0, maximum=1)
    eps: float = hyper(1e-6, above=0)
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
        # 1 - rho add up to more than 1. The other two keep an eps near either end from making a root infinite.
        s = op.fma(h.one_minus_rho * g, g, s * h.rho)
        rate = op.sqrt(dx + h.eps) / op.sqrt(at_most(op, s + h.eps, FLOAT32_MAX))
        step = bounded(op, at_most(op, rate, FLOAT32_MAX) * g, MAGNITUDE_MAX)
        dx = op.fma(h.one_minus_rho * step, step, dx * h.rho)
        return op.fma(h.minus_lr, step, w), (s, dx)
