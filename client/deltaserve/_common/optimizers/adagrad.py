"""Adagrad."""

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
    hyper,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi et al., 2011, JMLR 12), with the names and defaults of `torch.optim.Adagrad`.

    With g as the gradient, s as the sum, x as the weights and t as the number of updates, this one included:

        s = s + g^2                                              sum
        x = x - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)  weights

    The sum never decays: one huge gradient stops an element for good.

    Attributes:
        lr: Learning rate, >= 0.
        lr_decay: Decay of the learning rate with the number of updates, >= 0.
        weight_decay: L2 penalty, >= 0: this times the weights is added to the gradient.
        initial_accumulator_value: The sum before the first update, >= 0. It counts when a model is created or extended.
        eps: Added to the root, > 0 and less than 2**64.
        maximize: Ascend instead of descend.
    """

    kind: str = field(default="adagrad", init=False, repr=False)
    lr: float = hyper(1e-2, minimum=0)
    lr_decay: float = hyper(0.0, minimum=0)
    weight_decay: float = hyper(0.0, minimum=0)
    initial_accumulator_value: float = hyper(0.0, minimum=0)
    eps: float = hyper(1e-10, above=0, maximum=MAGNITUDE_MAX)
    maximize: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The sum of squared gradients."""
        return (Slot("sum", minimum=0, initial=self.initial_accumulator_value),)

    def relevant_count(self, count: int) -> int:
        """Returns the number of updates, if lr decays with it."""
        return count if self.lr_decay else 1

    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns eps, and the negated learning rate after its decay."""
        return {"eps": self.eps, "minus_lr": -(self.lr / (1 + (count - 1) * self.lr_decay))}

    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element."""
        s = at_most(op, op.fma(g, g, slots[0]), FLOAT32_MAX)
        return w + (h.minus_lr * g) / (op.sqrt(s) + h.eps), (s,)
