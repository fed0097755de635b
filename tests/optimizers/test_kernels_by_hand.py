"""Updates worked by hand, in the reference and in the CPU kernel."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from tests.support import kernel_runs

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop


@dataclass(frozen=True)
class Worked:
    """The weight starts at 1.

    Attributes:
        gradients: The sum of the gradients in each update.
        weights: The weight after each update.
        slots: Each slot after each update; left out where another case has them.
        divisor: What the sums are divided by.
    """

    optimizer: Optimizer
    gradients: tuple[float, ...]
    weights: tuple[float, ...]
    slots: tuple[tuple[float, ...], ...] = field(default=())
    divisor: float = 1.0


# rho = 5/8 and eps = 1/16 make every square root of Adadelta rational:
#
#   step 1, g = 2:    s  = 5/8 * 0 + 3/8 * 4         = 1.5          sqrt(s  + 1/16) = sqrt(1.5625) = 1.25
#                     g' = sqrt(0 + 1/16) / 1.25 * 2 = 0.25 / 1.25 * 2 = 0.4
#                     dx = 5/8 * 0 + 3/8 * 0.16      = 0.06         sqrt(dx + 1/16) = sqrt(0.1225) = 0.35
#   step 2, g = -8:   s  = 5/8 * 1.5 + 3/8 * 64      = 24.9375      sqrt(s  + 1/16) = sqrt(25) = 5
#                     g' = 0.35 / 5 * -8             = -0.56
#                     dx = 5/8 * 0.06 + 3/8 * 0.3136 = 0.1551
#   step 3, g = 0:    s  = 5/8 * 24.9375             = 15.5859375
#                     g' = 0
#                     dx = 5/8 * 0.1551              = 0.0969375
#
# The weights go from 1 by -g' with lr = 1: 0.6, 1.16, 1.16; with lr = 1/2: 0.8, 1.08, 1.08.
ADADELTA = (1.5, 24.9375, 15.5859375), (0.06, 0.1551, 0.0969375)
BY_HAND = {
    "adadelta": Worked(Adadelta(rho=0.625, eps=0.0625), (2, -8, 0), (0.6, 1.16, 1.16), ADADELTA),
    # The same g' at half the rate.
    "adadelta, lr": Worked(Adadelta(rho=0.625, eps=0.0625, lr=0.5), (2, -8, 0), (0.8, 1.08, 1.08), ADADELTA),
    # 6 / 3 = 2, -24 / 3 = -8.
    "adadelta, divisor": Worked(
        Adadelta(rho=0.625, eps=0.0625), (6, -24, 0), (0.6, 1.16, 1.16), ADADELTA, divisor=3
    ),
    # Ascending with -g is descending with g.
    "adadelta, maximize": Worked(
        Adadelta(rho=0.625, eps=0.0625, maximize=True), (-2, 8, 0), (0.6, 1.16, 1.16), ADADELTA
    ),
    # Half the weight is added: 1.5 + 0.5 * 1 = 2, -8.3 + 0.5 * 0.6 = -8, -0.58 + 0.5 * 1.16 = 0.
    "adadelta, weight_decay": Worked(
        Adadelta(rho=0.625, eps=0.0625, weight_decay=0.5), (1.5, -8.3, -0.58), (0.6, 1.16, 1.16), ADADELTA
    ),
    # Negated first, decayed after: -(-1.5) + 0.5 * 1 = 2. The other way round it would be -(-1.5 + 0.5) = 1.
    "adadelta, maximize and weight_decay": Worked(
        Adadelta(rho=0.625, eps=0.0625, weight_decay=0.5, maximize=True),
        (-1.5, 8.3, 0.58), (0.6, 1.16, 1.16), ADADELTA,
    ),
    # 3 / 2 + 0.5 * 1 = 2, -16.8 / 2 + 0.5 * 0.8 = -8, -1.08 / 2 + 0.5 * 1.08 = 0.
    "adadelta, everything": Worked(
        Adadelta(rho=0.625, eps=0.0625, lr=0.5, weight_decay=0.5, maximize=True),
        (-3, 16.8, 1.08), (0.8, 1.08, 1.08), ADADELTA, divisor=2,
    ),
    # 1 - 2 / 2 = 0, 0 + 4 / 2 = 2.
    "sgd": Worked(SGD(lr=0.5), (2, -4), (0, 2)),
    # g = 1.5 + 1 / 2 = 2, then -4 + 0 / 2.
    "sgd, weight_decay": Worked(SGD(lr=0.5, weight_decay=0.5), (1.5, -4), (0, 2)),
    "sgd, maximize and weight_decay": Worked(SGD(lr=0.5, weight_decay=0.5, maximize=True), (-1.5, 4), (0, 2)),
    # b = 2; 2 / 2 + 4 = 5; 5 / 2. The weight moves by half of b.
    "sgd, momentum": Worked(SGD(lr=0.5, momentum=0.5), (2, 4, 0), (0, -2.5, -3.75), ((2, 5, 2.5),)),
    # The first b is the whole gradient; then 2 / 2 + 4 / 4 = 2, 2 / 2 + 0.
    "sgd, dampening": Worked(SGD(lr=0.5, momentum=0.5, dampening=0.75), (2, 4, 0), (0, -1, -1.5), ((2, 2, 1),)),
    # g + b / 2 = 2 + 1; 4 + 5 / 2; 0 + 2.5 / 2.
    "sgd, nesterov": Worked(
        SGD(lr=0.5, momentum=0.5, nesterov=True), (2, 4, 0), (-0.5, -3.75, -4.375), ((2, 5, 2.5),)
    ),
    # 3 / (3 + 1), 4 / (5 + 1).
    "adagrad": Worked(Adagrad(lr=1, eps=1), (3, 4), (1 / 4, 1 / 4 - 4 / 6), ((9, 25),)),
    # The second step has half the rate.
    "adagrad, lr_decay": Worked(Adagrad(lr=1, eps=1, lr_decay=1), (3, 4), (1 / 4, 1 / 4 - 2 / 6), ((9, 25),)),
    # 3 / (sqrt(16 + 9) + 1).
    "adagrad, initial value": Worked(
        Adagrad(lr=1, eps=1, initial_accumulator_value=16), (3, 12), (1 / 2, 1 / 2 - 12 / 14), ((25, 169),)
    ),
    # s = 16 / 4 = 4, 3 + 4 / 4 = 4: 4 / (2 + 1), -2 / (2 + 1).
    "rmsprop": Worked(RMSprop(lr=1, alpha=0.75, eps=1), (4, -2), (-1 / 3, 1 / 3), ((4, 4),)),
    # b = 4/3; 4/3 / 2 - 2/3 = 0.
    "rmsprop, momentum": Worked(
        RMSprop(lr=1, alpha=0.75, eps=1, momentum=0.5), (4, -2), (-1 / 3, -1 / 3), ((4, 4), (4 / 3, 0))
    ),
    # s = 8, a = 2, v = 8 - 4 = 4: 4 / (2 + 1); s = 4 + 4.5, a = 1 + 1.5, v = 8.5 - 6.25 = 2.25: 3 / (1.5 + 1).
    "rmsprop, centered": Worked(
        RMSprop(lr=1, alpha=0.5, eps=1, centered=True), (4, 3), (-1 / 3, -1 / 3 - 1.2), ((8, 8.5), (2, 2.5))
    ),
    # b = 4/3; 4/3 / 2 + 1.2.
    "rmsprop, centered and momentum": Worked(
        RMSprop(lr=1, alpha=0.5, eps=1, centered=True, momentum=0.5), (4, 3), (-1 / 3, -1 / 3 - 2 / 3 - 1.2),
        ((8, 8.5), (2, 2.5), (4 / 3, 2 / 3 + 1.2)),
    ),
    # m = 2, v = 4, corrected 2 / (1/2) = 4 and 4 / (1/4) = 16: 4 / (4 + 1); m = 1 + 2, v = 3 + 4, corrected
    # 3 / (3/4) = 4 and 7 / (7/16) = 16.
    "adam": Worked(Adam(lr=1, beta1=0.5, beta2=0.75, eps=1), (4, 4), (0.2, -0.6), ((2, 3), (4, 7))),
    "adam, weight_decay": Worked(
        Adam(lr=1, beta1=0.5, beta2=0.75, eps=1, weight_decay=0.5), (3.5, 3.9), (0.2, -0.6), ((2, 3), (4, 7))
    ),
    # v falls to 3 but u stays at 4, and is corrected with the second step's 7/16: 8 / sqrt(7).
    "adam, amsgrad": Worked(
        Adam(lr=1, beta1=0.5, beta2=0.75, eps=1, amsgrad=True), (4, 0),
        (0.2, 0.2 - (4 / 3) / (8 / math.sqrt(7) + 1)), ((2, 1), (4, 3), (4, 4)),
    ),
    # 1 (1 - 1/4) - 0.8 / 2; the moments do not see the decay.
    "adamw": Worked(
        AdamW(lr=0.5, beta1=0.5, beta2=0.75, eps=1, weight_decay=0.5), (4, 4), (0.35, 0.35 * 0.75 - 0.4),
        ((2, 3), (4, 7)),
    ),
    # c = 1 and m = 1/2; c = 1/4 - 0.2 and m = 3/8 - 0.1; c = 0.1375 - 1: each step is a quarter.
    "lion": Worked(
        Lion(lr=0.25, beta1=0.5, beta2=0.75), (2, -0.4, -2), (0.75, 0.5, 0.75), ((0.5, 0.275, -0.29375),)
    ),
    # 1 (1 - 1/8) - 1/4, then 0.625 (1 - 1/8) + 1/4.
    "lion, weight_decay": Worked(
        Lion(lr=0.25, beta1=0.5, beta2=0.75, weight_decay=0.5), (2, -2), (0.625, 0.796875), ((0.5, -0.125),)
    ),
    "lion, no direction": Worked(Lion(), (0,), (1,), ((0,),)),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_numbers_worked_by_hand(implementation: str, case: str) -> None:
    worked = BY_HAND[case]
    precision, step = (np.float64, kernel_runs.in_reference) if implementation == "reference" else (
        np.float32, kernel_runs.on_cpu,
    )  # fmt: skip
    tolerance = 1e-12 if implementation == "reference" else 1e-6
    state = kernel_runs.start(worked.optimizer, np.ones(1, precision))
    for number, (gradient, weight) in enumerate(zip(worked.gradients, worked.weights, strict=True)):
        state = step(worked.optimizer, np.array([gradient], precision), state, number + 1, worked.divisor)
        np.testing.assert_allclose(state.weights, [weight], rtol=tolerance, atol=tolerance)
        for slot, expected in zip(state.slots, worked.slots, strict=bool(worked.slots)):
            np.testing.assert_allclose(slot, [expected[number]], rtol=tolerance, atol=tolerance)
