"""The CPU kernel's accuracy, beside torch's own optimizers; and where naive implementations go wrong."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import kernel_runs
from tests.support.kernel_runs import State, Step, Vector
from tests.support.optimizer_cases import CASES, IN_TORCH, over, torchs

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from deltaserve._common.optimizers.definition import MAGNITUDE_MAX

UNIT = 2.0**-24
"""The largest relative error of one rounding: errors are counted in it."""


def errors(step: Step, optimizer: Optimizer, seed: int, updates: int) -> list[NDArray[np.float64]]:
    """Returns each element's error: of slots relative to the terms they are made of, of weights to |w| + |change|."""
    gradient, state = kernel_runs.usual(optimizer, seed, 50_000)
    exact = kernel_runs.in_reference(optimizer, gradient.astype(np.float64), state, updates)
    made = step(optimizer, gradient, state, updates, 1.0)
    scales = [np.abs(slot) for slot in exact.slots]
    scales.append(np.abs(state.weights) + np.abs(exact.weights - state.weights))
    pairs = zip((*made.slots, made.weights), (*exact.slots, exact.weights), scales, strict=True)
    return [
        np.divide(np.abs(vector - right), scale, out=np.zeros_like(right), where=scale > 0) / UNIT
        for vector, right, scale in pairs
    ]


@over(IN_TORCH)
def test_no_further_from_float64_than_torch(optimizer: Optimizer) -> None:
    """The operations are torch's, and each of ours is correctly rounded, while torch's roots are not everywhere.

    For one element either may be luckier, so this is compared: the mean, and the 99.9 % quantile.
    """
    updates = 3
    ours, torchs_ = (errors(step, optimizer, 1, updates) for step in (kernel_runs.on_cpu, kernel_runs.in_torch))
    for our, its in zip(ours, torchs_, strict=True):
        assert our.mean() <= its.mean() * 1.002 + 1e-9
        assert np.quantile(our, 0.999) <= np.quantile(its, 0.999) * 1.02 + 1e-9


# Against torch over 100 steps. Both make the errors of a step; the averages forget them, the weights add them up. They
# are random and mostly cancel. The largest difference found was a third of this, relative to the largest value that an
# element had on its way.
TOLERANCE = 1e-5


@over(IN_TORCH)
def test_stays_with_torch_over_100_steps(optimizer: Optimizer) -> None:
    rng = np.random.default_rng(7)
    weights = rng.standard_normal(513, dtype=np.float32)
    state = kernel_runs.start(optimizer, weights)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    stepping = torchs(optimizer, [parameter], foreach=False)
    largest = [np.abs(vector) for vector in (*state.slots, state.weights)]
    for updates in range(1, 101):
        gradient = rng.standard_normal(513, dtype=np.float32)
        state = kernel_runs.on_cpu(optimizer, gradient, state, updates)
        largest = list(map(np.maximum, largest, map(np.abs, (*state.slots, state.weights))))
        parameter.grad = torch.from_numpy(gradient)
        stepping.step()
    its = [stepping.state[parameter][slot.name].numpy() for slot in optimizer.slots]
    for our, torchs_, most in zip(
        (*state.slots, state.weights), (*its, parameter.detach().numpy()), largest, strict=True
    ):
        assert (np.abs(our - torchs_) <= TOLERANCE * most).all()
    assert not np.allclose(state.weights, weights, rtol=0.01)


# Without a square root on the way, each operation is rounded alike on both sides.
WITHOUT_ROOTS = [optimizer for optimizer in CASES if isinstance(optimizer, SGD)]


@over(WITHOUT_ROOTS)
@pytest.mark.parametrize("updates", [1, 2])
def test_sgd_has_the_bits_of_torch(optimizer: Optimizer, updates: int) -> None:
    gradient, state = kernel_runs.usual(optimizer, 5, 10_000)
    gradient[::7], state.weights[::5] = np.float32(-0.0), np.float32(-0.0)
    if updates == 1:
        state = kernel_runs.start(optimizer, state.weights)
    ours, its = (step(optimizer, gradient, state, updates) for step in (kernel_runs.on_cpu, kernel_runs.in_torch))
    assert ours.bits() == its.bits()


@pytest.mark.parametrize("beta1", [0.0, 0.1, 0.49, 0.5, float(np.float32(0.5)) + 1e-9, 0.51, 0.9, 0.999])
def test_the_first_moment_has_the_bits_of_torchs_lerp(beta1: float) -> None:
    """`torch.lerp` starts from the nearer end: it changes its formula where 1 - beta1 reaches 0.5."""
    rng = np.random.default_rng(3)
    moment, gradient, weights = (rng.standard_normal(10_000, dtype=np.float32) for _ in range(3))
    state = State((moment, np.ones_like(moment)), weights)
    made = kernel_runs.on_cpu(Adam(beta1=beta1), gradient, state, 2)
    expected = torch.from_numpy(moment).lerp(torch.from_numpy(gradient), 1 - beta1).numpy()
    assert made.slots[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("alpha", [0.3, 0.99])
def test_the_mean_of_centered_rmsprop_has_the_bits_of_torchs_lerp(alpha: float) -> None:
    rng = np.random.default_rng(4)
    mean, gradient, weights = (rng.standard_normal(10_000, dtype=np.float32) for _ in range(3))
    state = State((np.full_like(mean, 100), mean), weights)
    made = kernel_runs.on_cpu(RMSprop(alpha=alpha, centered=True), gradient, state, 2)
    expected = torch.from_numpy(mean).lerp(torch.from_numpy(gradient), 1 - alpha).numpy()
    assert made.slots[1].tobytes() == expected.tobytes()


def ones(size: int = 1) -> Vector:
    return np.ones(size, np.float32)


def test_the_corrections_of_adam_are_computed_in_double_precision() -> None:
    """At the first step every Adam moves by lr, whatever its betas; float32 would be off by 1e-4 with these."""
    for beta2 in (0.999, 0.9999, 0.99999):
        optimizer = Adam(lr=0.5, beta1=0.9999, beta2=beta2)
        made = kernel_runs.on_cpu(optimizer, 3 * ones(), kernel_runs.start(optimizer, np.zeros(1, np.float32)), 1)
        np.testing.assert_allclose(made.weights, [-0.5], rtol=3e-7)


def test_the_corrections_of_adam_end() -> None:
    optimizer = Adam(lr=0.5)
    state = State((ones(), ones()), np.zeros(1, np.float32))
    for updates in (10**6, 2**40):
        made = kernel_runs.on_cpu(optimizer, ones(), state, updates)
        np.testing.assert_allclose(made.weights, [-0.5], rtol=3e-7)


def test_tensors_have_their_own_counts() -> None:
    optimizer = Adam(lr=0.5)
    early, late = (
        kernel_runs.on_cpu(optimizer, ones(), kernel_runs.start(optimizer, ones()), updates) for updates in (1, 50)
    )
    np.testing.assert_allclose(early.weights, [0.5], rtol=1e-6)
    # m = 0.1 and v = 0.001 in both, but corrected by their own counts.
    correction1, correction2 = 1 - 0.9**50, 1 - 0.999**50
    np.testing.assert_allclose(late.weights, [1 - 0.5 * 0.1 / correction1 / math.sqrt(0.001 / correction2)], rtol=1e-6)


def test_epsilon_is_added_after_the_correction() -> None:
    """At step 1 the corrected root is |g|: with eps = |g| the step is half of lr. Keras would have moved much less."""
    optimizer = Adam(lr=0.5, eps=0.01)
    made = kernel_runs.on_cpu(optimizer, np.full(1, 0.01, np.float32), kernel_runs.start(optimizer, ones()), 1)
    np.testing.assert_allclose(made.weights, [0.75], rtol=1e-6)


def test_amsgrad_takes_the_maximum_before_the_correction() -> None:
    optimizer = Adam(amsgrad=True)
    state = kernel_runs.start(optimizer, ones())
    for updates, gradient in enumerate((1.0, 0.0, 0.0), 1):
        state = kernel_runs.on_cpu(optimizer, gradient * ones(), state, updates)
    # The largest v is the first, 0.001; corrected first, it would be 1.
    np.testing.assert_allclose(state.slots[2], [0.001], rtol=1e-6)


def test_adamw_decays_the_weight_before_the_step_and_leaves_the_moments_alone() -> None:
    plain, decayed = AdamW(lr=0.5, weight_decay=0), AdamW(lr=0.5, weight_decay=0.5)
    gradient, state = kernel_runs.usual(plain, 1, 1000)
    smaller = State(state.slots, state.weights * np.float32(0.75))
    made, expected = (
        kernel_runs.on_cpu(decayed, gradient, state, 1),
        kernel_runs.on_cpu(plain, gradient, smaller, 1),
    )
    assert made.bits() == expected.bits()


def test_centered_rmsprop_is_never_nan() -> None:
    """torch's is: with equal gradients the square of the mean exceeds the mean of the squares by rounding."""
    optimizer = RMSprop(lr=1e-3, centered=True)
    rng = np.random.default_rng(0)
    gradient, weights = (rng.standard_normal(1000, dtype=np.float32) for _ in range(2))
    state = kernel_runs.start(optimizer, weights)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    parameter.grad = torch.from_numpy(gradient)
    stepping = torchs(optimizer, [parameter], foreach=False)
    for updates in range(1, 2001):
        state = kernel_runs.on_cpu(optimizer, gradient, state, updates)
        stepping.step()
    assert np.isfinite(state.weights).all()
    assert parameter.isnan().any()


@pytest.mark.parametrize("dampening", [0.0, 0.5, 1.0])
def test_the_first_momentum_step_is_not_dampened(dampening: float) -> None:
    optimizer = SGD(lr=1.0, momentum=0.5, dampening=dampening)
    first = kernel_runs.on_cpu(optimizer, ones(), kernel_runs.start(optimizer, np.zeros(1, np.float32)), 1)
    assert first.slots[0] == 1
    second = kernel_runs.on_cpu(optimizer, ones(), first, 2)
    assert second.slots[0] == 0.5 + 1 - dampening


@over()
def test_a_learning_rate_of_0_leaves_the_weights_as_they_are(optimizer: Optimizer) -> None:
    still = dataclasses.replace(optimizer, lr=0.0)
    gradient, state = kernel_runs.anything(still, 2, 1000, largest_weight=1e30)
    for updates in (1, 2):
        made = kernel_runs.on_cpu(still, gradient, state, updates)
        np.testing.assert_array_equal(made.weights, state.weights)


def test_adagrad_never_forgets_a_huge_gradient_and_adadelta_does() -> None:
    moved = {}
    for optimizer in (Adagrad(lr=1.0), Adadelta(rho=0.5)):
        state = kernel_runs.start(optimizer, np.zeros(1, np.float32))
        state = kernel_runs.on_cpu(optimizer, np.full(1, MAGNITUDE_MAX, np.float32), state, 1)
        before = state.weights
        # Halved 128 times, the square of 2**64 is 1.
        for updates in range(2, 152):
            state = kernel_runs.on_cpu(optimizer, ones(), state, updates)
        moved[optimizer.kind] = float(before[0] - state.weights[0])
    assert moved["adadelta"] > 0.05
    assert moved["adagrad"] < 1e-6
