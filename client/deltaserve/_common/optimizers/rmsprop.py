"""RMSprop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaserve._common.optimizers.definition import (
    FLOAT32_MAX,
    MAGNITUDE_MAX,
    Operations,
    Optimizer,
    Slot,
    bounded,
    hyper,
    lerp,
    option,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton, 2012), with the names and defaults of `torch.optim.RMSprop`.

    With g as the gradient, s and a as the leaky averages, b as the buffer and x as the weights:

        s = alpha s + (1 - alpha) g^2              square_avg
        a = alpha a + (1 - alpha) g                grad_avg, only if centered
        v = s, or max(s - a^2, 0) if centered      the variance (Graves, 2013, arXiv:1308.0850)
        b = momentum b + g / (sqrt(v) + eps)       momentum_buffer, only with momentum
        x = x - lr b                               weights; without momentum, x - lr g / (sqrt(v) + eps)

    torch lacks the max(): rounding makes its variance negative now and then, and the weight NaN.

    Attributes:
        lr: Learning rate, >= 0.
        alpha: Decay of the leaky averages, in [0, 1].
        eps: Added to the root, > 0 and less than 2**64.
        weight_decay: L2 penalty, >= 0: this times the weights is added to the gradient.
        momentum: Decay of the buffer, >= 0. Whether it is 0 is fixed when a model is created.
        centered: Divide by the standard deviation of the gradient. Fixed when a model is created.
        maximize: Ascend instead of descend.
    """

    kind: str = field(default="rmsprop", init=False, repr=False)
    lr: float = hyper(1e-2, minimum=0)
    alpha: float = hyper(0.99, minimum=0, maximum=1)
    eps: float = hyper(1e-8, above=0, maximum=MAGNITUDE_MAX)
    weight_decay: float = hyper(0.0, minimum=0)
    momentum: float = hyper(0.0, minimum=0)
    centered: bool = option()
    maximize: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The leaky averages and the momentum buffer, as far as they are used."""
        grad_avg = (Slot("grad_avg"),) if self.centered else ()
        momentum_buffer = (Slot("momentum_buffer"),) if self.momentum else ()
        return (Slot("square_avg", minimum=0), *grad_avg, *momentum_buffer)

    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns the hyperparameters, 1 - alpha, and -lr."""
        return {
            "alpha": self.alpha,
            "one_minus_alpha": 1 - self.alpha,
            "eps": self.eps,
            "momentum": self.momentum,
            "minus_lr": -self.lr,
        }

    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element."""
        s, *others = slots
        v = s = op.fma(h.one_minus_alpha * g, g, s * h.alpha)
        new = [s]
        if self.centered:
            a = lerp(op, others.pop(0), g, h.one_minus_alpha)
            v = op.fma(a * -1.0, a, s)
            v = op.where(v > 0.0, v, 0.0)
            new.append(a)
        root = op.sqrt(v) + h.eps
        if not others:
            return w + (h.minus_lr * g) / root, new
        # Bounded twice: an infinite step and an infinite buffer of opposite signs would add up to NaN.
        step = bounded(op, g / root, FLOAT32_MAX)
        b = bounded(op, others[0] * h.momentum + step, FLOAT32_MAX)
        return op.fma(h.minus_lr, b, w), [*new, b]
