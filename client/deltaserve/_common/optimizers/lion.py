"""Lion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deltaserve._common.optimizers.definition import Operations, Optimizer, Slot, hyper, lerp


@dataclass(frozen=True, kw_only=True, slots=True)
class Lion(Optimizer):
    """Lion (Chen et al., 2023, arXiv:2302.06675), which torch does not have.

    Every update moves a weight by lr, up or down. With g as the gradient, m as the momentum and x as the weights:

        x = x (1 - lr weight_decay)
        x = x - lr sign(beta1 m + (1 - beta1) g)   weights
        m = beta2 m + (1 - beta2) g                exp_avg

    Attributes:
        lr: Learning rate, >= 0. The authors recommend a third to a tenth of AdamW's.
        beta1: Weight of the momentum in the direction, in [0, 1].
        beta2: Decay of the momentum, in [0, 1].
        weight_decay: Weight decay, >= 0. The authors recommend 3 to 10 times AdamW's.
        maximize: Ascend instead of descend.
    """

    decoupled: ClassVar[bool] = True

    kind: str = field(default="lion", init=False, repr=False)
    lr: float = hyper(1e-4, minimum=0)
    beta1: float = hyper(0.9, minimum=0, maximum=1)
    beta2: float = hyper(0.99, minimum=0, maximum=1)
    weight_decay: float = hyper(0.0, minimum=0)
    maximize: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The momentum."""
        return (Slot("exp_avg"),)

    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns the weights of the gradient, and lr with both signs."""
        return {
            "one_minus_beta1": 1 - self.beta1,
            "one_minus_beta2": 1 - self.beta2,
            "lr": self.lr,
            "minus_lr": -self.lr,
        }

    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element."""
        (m,) = slots
        direction = lerp(op, m, g, h.one_minus_beta1)
        step = op.where(direction > 0.0, h.minus_lr, op.where(direction < 0.0, h.lr, 0.0))
        return w + step, (lerp(op, m, g, h.one_minus_beta2),)
