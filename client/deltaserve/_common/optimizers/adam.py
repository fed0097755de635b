"""Adam and AdamW."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deltaserve._common.optimizers.definition import (
    FLOAT32_MAX,
    MAGNITUDE_MAX,
    Operations,
    Optimizer,
    Slot,
    hyper,
    lerp,
    option,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2014, arXiv:1412.6980), with the names and defaults of `torch.optim.Adam`.

    With g as the gradient, m and v as the moments, x as the weights and t as the number of updates, this one included:

        m = beta1 m + (1 - beta1) g                exp_avg
        v = beta2 v + (1 - beta2) g^2              exp_avg_sq
        u = v, or max(u, v) with amsgrad           max_exp_avg_sq (Reddi et al., 2018, arXiv:1904.09237)
        x = x - lr (m / (1 - beta1^t)) / (sqrt(u / (1 - beta2^t)) + eps)

    The epsilon of Keras and TensorFlow is another one: there it is added before the correction by 1 - beta2^t.

    Attributes:
        lr: Learning rate, >= 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root, > 0 and less than 2**64.
        weight_decay: L2 penalty, >= 0: this times the weights is added to the gradient.
        amsgrad: Use the largest second moment so far. Fixed when a model is created.
        maximize: Ascend instead of descend.
    """

    kind: str = field(default="adam", init=False, repr=False)
    lr: float = hyper(1e-3, minimum=0)
    beta1: float = hyper(0.9, minimum=0, below=1)
    beta2: float = hyper(0.999, minimum=0, below=1)
    eps: float = hyper(1e-8, above=0, maximum=MAGNITUDE_MAX)
    weight_decay: float = hyper(0.0, minimum=0)
    amsgrad: bool = option()
    maximize: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The moments, and with amsgrad the largest second moment."""
        largest = (Slot("max_exp_avg_sq", minimum=0),) if self.amsgrad else ()
        return (Slot("exp_avg"), Slot("exp_avg_sq", minimum=0), *largest)

    def relevant_count(self, count: int) -> int:
        """Returns the number of updates, which the corrections depend on."""
        return count

    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns the decays, eps, and the corrected step size."""
        # From the count, as in torch: a running product of float32 would drift.
        correction1, correction2 = 1 - self.beta1**count, 1 - self.beta2**count
        return {
            "one_minus_beta1": 1 - self.beta1,
            "beta2": self.beta2,
            "one_minus_beta2": 1 - self.beta2,
            "root_correction2": correction2**0.5,
            "eps": self.eps,
            # A finite lr divided by the correction may be too large for float32, and infinity times 0 is NaN.
            "minus_step_size": -min(self.lr / correction1, FLOAT32_MAX),
        }

    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element."""
        m, v, *largest = slots
        m = lerp(op, m, g, h.one_minus_beta1)
        u = v = op.fma(h.one_minus_beta2 * g, g, v * h.beta2)
        if largest:
            u = op.where(v > largest[0], v, largest[0])
            largest = [u]
        root = op.sqrt(u) / h.root_correction2 + h.eps
        return w + (h.minus_step_size * m) / root, (m, v, *largest)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), with the names and defaults of `torch.optim.AdamW`.

    Adam with decoupled weight decay: before the update of Adam, x = x (1 - lr weight_decay).

    Attributes:
        lr: Learning rate, >= 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root, > 0 and less than 2**64.
        weight_decay: Weight decay, >= 0.
        amsgrad: Use the largest second moment so far. Fixed when a model is created.
        maximize: Ascend instead of descend.
    """

    decoupled: ClassVar[bool] = True

    kind: str = field(default="adamw", init=False, repr=False)
    weight_decay: float = hyper(1e-2, minimum=0)
