"""Stochastic gradient descent, with momentum or without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaserve._common.optimizers.definition import (
    FLOAT32_MAX,
    Operations,
    Optimizer,
    Slot,
    bounded,
    hyper,
    option,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with the names and defaults of `torch.optim.SGD`.

    Momentum is that of Sutskever et al. (2013, "On the importance of initialization and momentum in deep learning"),
    with lr outside the buffer, as in torch. With g as the gradient, b as the buffer and x as the weights:

        b = momentum b + (1 - dampening) g         momentum_buffer; b = g in the first update
        x = x - lr b                               weights; with nesterov, x - lr (g + momentum b)

    Without momentum there is no buffer, and x = x - lr g.

    Attributes:
        lr: Learning rate, >= 0.
        momentum: Decay of the buffer, >= 0. Whether it is 0 is fixed when a model is created.
        dampening: The gradient enters the buffer with the factor 1 - dampening, in [0, 1].
        weight_decay: L2 penalty, >= 0: this times the weights is added to the gradient.
        nesterov: Use Nesterov momentum, which needs momentum > 0 and dampening = 0. Fixed when a model is created.
        maximize: Ascend instead of descend.
    """

    kind: str = field(default="sgd", init=False, repr=False)
    lr: float = hyper(1e-3, minimum=0)
    momentum: float = hyper(0.0, minimum=0)
    dampening: float = hyper(0.0, minimum=0, maximum=1)
    weight_decay: float = hyper(0.0, minimum=0)
    nesterov: bool = option()
    maximize: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The momentum buffer, if there is momentum."""
        return (Slot("momentum_buffer"),) if self.momentum else ()

    def relevant_count(self, count: int) -> int:
        """Returns 1 for the first update with momentum, else 2."""
        return min(count, 2) if self.momentum else 2

    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns the hyperparameters, 1 - dampening, and -lr."""
        # In the first update the buffer becomes the gradient, as in torch: it neither decays nor is it dampened. The
        # buffer is 0 then, and adding -0 keeps the sign of a zero gradient.
        first = count == 1
        return {
            "momentum": self.momentum,
            "decay": -0.0 if first else self.momentum,
            "one_minus_dampening": 1.0 if first else 1 - self.dampening,
            "minus_lr": -self.lr,
        }

    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element."""
        if not slots:
            return op.fma(h.minus_lr, g, w), ()
        b = bounded(op, op.fma(h.one_minus_dampening, g, slots[0] * h.decay), FLOAT32_MAX)
        step = bounded(op, op.fma(h.momentum, b, g), FLOAT32_MAX) if self.nesterov else b
        return op.fma(h.minus_lr, step, w), (b,)

    def problem(self) -> tuple[str, str] | None:
        """Checks that all hyperparameters are in range and fit together."""
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            return "nesterov", "false, unless momentum > 0 and dampening = 0"
        return Optimizer.problem(self)
