"""Properties that the CPU kernel has for every optimizer, whatever its inputs."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import kernel_runs
from tests.support.kernel_runs import State, Vector
from tests.support.optimizer_cases import STRUCTURES, over

from deltaserve._common.optimizers import SGD, Adadelta, Optimizer
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX, hyperparameters
from deltaserve_server.optimizers import cpu
from deltaserve_server.optimizers.formats import widened

deterministic = functools.partial(settings, derandomize=True, database=None)

sizes = st.one_of(st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 1023, 1024, 1025]), st.integers(0, 3000))
seeds = st.integers(0, 2**32)
divisors = st.sampled_from([1, 2, 3, 7, 1000, 2**24, 0.5, 0.3])
counts = st.one_of(st.integers(1, 5), st.integers(1, 2**40), st.sampled_from([2**24, 2**24 + 1, 2**40]))

DECAYS = st.sampled_from([0.0, 0.01])
FACTORS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-45, 2.0**38, 1e18, FLOAT32_MAX]))
# The largest number below 1, and those that float32 rounds to 1.
BETAS = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1e-30, 1 - 2**-25, 1 - 2**-26, 1 - 2**-53]))
MOMENTUMS = st.one_of(st.floats(2**-100, 1), st.sampled_from([1e-45, 1.5, 1e10, FLOAT32_MAX]))
EPSILONS = st.one_of(st.floats(1e-10, 1), st.sampled_from([1e-45, 2.0**-126, 1e10, MAGNITUDE_MAX, 2.0**64]))
EXTREMES: dict[str, st.SearchStrategy[Any]] = {
    "lr": FACTORS,
    "lr_decay": FACTORS,
    "weight_decay": FACTORS,
    "initial_accumulator_value": FACTORS,
    "rho": st.one_of(BETAS, st.just(1.0)),
    "alpha": st.one_of(BETAS, st.just(1.0)),
    "beta1": BETAS,
    "beta2": BETAS,
    "eps": EPSILONS,
    "momentum": MOMENTUMS,
    "dampening": st.one_of(BETAS, st.just(1.0)),
    "maximize": st.booleans(),
}


@st.composite
def extremes(draw: st.DrawFn, structure: Optimizer) -> Optimizer:
    """Draws an optimizer of a structure, with any hyperparameters that are in range."""
    bounds = {
        field.name: field.metadata["bounds"] for field in dataclasses.fields(structure) if "bounds" in field.metadata
    }
    changes = {
        name: draw(EXTREMES[name].filter(bounds[name].allow) if name in bounds else EXTREMES[name])
        for name in hyperparameters(structure)
        if name in EXTREMES
        and (name != "momentum" or (structure.slots[-1:] and "momentum" in structure.slots[-1].name))
    }
    if getattr(structure, "nesterov", False):
        changes["dampening"] = 0.0
    drawn = dataclasses.replace(structure, **changes)
    assert drawn.problem() is None
    assert drawn.structure == structure.structure
    return drawn


def assert_valid(optimizer: Optimizer, state: State) -> None:
    for vector in (*state.slots, state.weights):
        assert np.isfinite(vector).all()
    for slot, vector in zip(optimizer.slots, state.slots, strict=True):
        assert (vector >= slot.minimum).all(), slot.name


@over(STRUCTURES)
@deterministic(max_examples=30)
@given(data=st.data(), seed=seeds)
def test_the_state_stays_finite(optimizer: Optimizer, data: st.DataObject, seed: int) -> None:
    """For finite weights and any gradient, and for hyperparameters, counts and divisors at either end."""
    _, state = kernel_runs.anything(optimizer, seed, 200)
    for number in range(4):
        drawn = data.draw(extremes(optimizer))
        gradient, _ = kernel_runs.anything(optimizer, seed + number, 200)
        if number == 1:  # any bits, as in memory that is shared with a worker
            gradient = np.random.default_rng(seed).integers(0, 2**32, 200, np.uint32).view(np.float32)
        state = kernel_runs.on_cpu(drawn, gradient, state, data.draw(counts), data.draw(divisors))
        assert_valid(drawn, state)


@over(STRUCTURES)
@deterministic(max_examples=15)
@given(
    data=st.data(),
    seed=seeds,
    size=sizes,
    cuts=st.lists(st.integers(0, 3000), max_size=4),
    divisor=divisors,
    updates=counts,
)
def test_any_split_gives_the_same_bits(
    optimizer: Optimizer, data: st.DataObject, seed: int, size: int, cuts: list[int], divisor: float, updates: int
) -> None:
    drawn = data.draw(extremes(optimizer))
    gradient, state = kernel_runs.anything(drawn, seed, size)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    pieces = [
        kernel_runs.on_cpu(drawn, gradient[a:b], state.part(a, b), updates, divisor)
        for a, b in itertools.pairwise(edges)
    ]
    whole = kernel_runs.on_cpu(drawn, gradient, state, updates, divisor)
    joined = State(
        tuple(map(np.concatenate, zip(*(piece.slots for piece in pieces), strict=True))),
        np.concatenate([piece.weights for piece in pieces]),
    )
    assert joined.bits() == whole.bits()


@over(STRUCTURES)
@deterministic(max_examples=8)
@given(seed=seeds, size=sizes, divisor=divisors, decay=DECAYS, updates=counts)
def test_a_gradient_of_16_bits_counts_as_its_float32_value(
    optimizer: Optimizer, seed: int, size: int, divisor: float, decay: float, updates: int
) -> None:
    """With any bits, so infinities and NaN too."""
    drawn = dataclasses.replace(optimizer, weight_decay=decay)
    _, state = kernel_runs.anything(drawn, seed, size, largest_weight=1e30)
    bits = np.random.default_rng(seed).integers(0, 1 << 16, size, np.uint16)
    for gradient in (bits.view(np.float16), bits):
        made = kernel_runs.on_cpu(drawn, gradient, state, updates, divisor)
        assert made.bits() == kernel_runs.on_cpu(drawn, widened(gradient), state, updates, divisor).bits()


@over(STRUCTURES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001])
@pytest.mark.parametrize("divisor", [1, 3])
def test_a_gradient_that_is_nan_counts_as_0(optimizer: Optimizer, bits: int, divisor: int) -> None:
    for decay, maximize in itertools.product((0.0, 0.01), (False, True)):
        drawn = dataclasses.replace(optimizer, weight_decay=decay, maximize=maximize)
        gradient, state = kernel_runs.anything(drawn, bits, 1000, largest_weight=1e30)
        at = np.random.default_rng(bits).random(1000) < 0.5
        made = []
        for value in (np.float32(0), np.uint32(bits).view(np.float32)):
            gradient[at] = value
            made.append(kernel_runs.on_cpu(drawn, gradient, state, 2, divisor))
        for one, other in zip((*made[0].slots, made[0].weights), (*made[1].slots, made[1].weights), strict=True):
            np.testing.assert_array_equal(one, other)


@over(STRUCTURES)
@deterministic(max_examples=10)
@given(data=st.data(), seed=seeds, size=sizes, shift=st.integers(0, 7), divisor=divisors)
def test_a_gradient_at_any_byte_gives_the_same_bits(
    optimizer: Optimizer, data: st.DataObject, seed: int, size: int, shift: int, divisor: float
) -> None:
    drawn = data.draw(extremes(optimizer))
    gradient, state = kernel_runs.anything(drawn, seed, size)
    message = b"h" * shift + gradient.tobytes()
    received = np.frombuffer(message, np.uint8)[shift:].view(np.float32)
    made, expected = (kernel_runs.on_cpu(drawn, sent, state, 3, divisor) for sent in (received, gradient))
    assert made.bits() == expected.bits()


@over(STRUCTURES)
def test_streaming_stores_give_the_same_bits(optimizer: Optimizer) -> None:
    gradient, state = kernel_runs.usual(optimizer, 3, 1003)
    expected = kernel_runs.on_cpu(optimizer, gradient, state, 2)
    memory = np.empty(1100, np.float32)
    aligned = -(memory.ctypes.data // 4) % 16
    for start in (aligned, aligned + 1):  # around the caches, and where that is impossible
        new_weights, slots = memory[start : start + 1003], [slot.copy() for slot in state.slots]
        count = optimizer.relevant_count(2)
        cpu.update(gradient, 1, slots, state.weights, new_weights, optimizer, count, streaming=True)
        assert State(tuple(slots), new_weights).bits() == expected.bits()


@pytest.mark.parametrize(
    "divisor", [2.0**k for k in (-149, -148, -128, -127, -126, -1, 0, 1, 24, 126, 127)] + [3.0, 1e40]
)
def test_a_division_is_rounded_once(divisor: float) -> None:
    """A power of two is multiplied by its reciprocal where that exists: the quotient is the same."""
    gradient, _ = kernel_runs.anything(SGD(), 0, 5000)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        quotient = gradient / np.float32(divisor)
    expected = np.clip(quotient, -MAGNITUDE_MAX, MAGNITUDE_MAX)
    zeros = State((), np.zeros_like(gradient))
    for optimizer, sign in ((SGD(lr=1.0), -1), (SGD(lr=1.0, maximize=True), 1)):
        made = kernel_runs.on_cpu(optimizer, gradient, zeros, 1, divisor)
        np.testing.assert_array_equal(made.weights, sign * expected)


def test_denormals_are_not_flushed_to_zero() -> None:
    """The inputs are powers of two, so all results are exact."""
    tiny = np.array([2.0**-140], np.float32)
    gradient = np.array([2.0**-70], np.float32)
    optimizer, state = Adadelta(rho=0.5, eps=2.0**-149), State((tiny, tiny), tiny)
    made = kernel_runs.on_cpu(optimizer, gradient, state, 1)
    # s = 2**-141 + 2**-141. As s = dx, g' = g: dx = s, x = 2**-140 - 2**-70 = -2**-70, rounded.
    expected: Vector = np.array([2.0**-140, 2.0**-140, -(2.0**-70)], np.float32)
    np.testing.assert_array_equal(np.concatenate([*made.slots, made.weights]), expected)
    idle = kernel_runs.on_cpu(optimizer, np.zeros(1, np.float32), state, 1)
    expected = np.array([2.0**-141, 2.0**-141, 2.0**-140], np.float32)
    np.testing.assert_array_equal(np.concatenate([*idle.slots, idle.weights]), expected)


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.7, 0.9, 1 - 2**-20, 2**-20, 1 - 2**-25])
def test_averages_at_the_limit_do_not_exceed_it(rho: float) -> None:
    """(1 - rho) and rho, each rounded, may add up to more than 1."""
    largest = np.full(2, FLOAT32_MAX, np.float32)
    state = State((largest, largest), np.ones(2, np.float32))
    for _ in range(3):
        gradient = np.array([MAGNITUDE_MAX, -MAGNITUDE_MAX], np.float32)
        state = kernel_runs.on_cpu(Adadelta(rho=rho), gradient, state, 1)
        assert_valid(Adadelta(), state)


@over(STRUCTURES)
@pytest.mark.parametrize(
    "wrong", [np.ones(6, np.float32), np.ones(5), np.ones(10, np.float32)[::2], np.ones((5, 1), "f")]
)
def test_wrong_vectors_are_refused_and_nothing_changes(optimizer: Optimizer, wrong: Any) -> None:
    for place in range(3 + len(optimizer.slots)):
        good = [np.full(5, 2, np.float32) for _ in range(3 + len(optimizer.slots))]
        gradient, weights, new_weights, *slots = (wrong if k == place else vector for k, vector in enumerate(good))
        with pytest.raises((TypeError, ValueError)):
            cpu.update(gradient, 1, slots, weights, new_weights, optimizer, 1)
        assert all((unchanged == 2).all() for unchanged in good)
        assert (wrong == 1).all()


@over(STRUCTURES)
def test_another_number_of_slots_is_refused(optimizer: Optimizer) -> None:
    for wrong in (len(optimizer.slots) - 1, len(optimizer.slots) + 1):
        if wrong >= 0:
            gradient, weights, new_weights, *slots = (np.full(5, 2, np.float32) for _ in range(3 + wrong))
            with pytest.raises(TypeError):
                cpu.update(gradient, 1, slots, weights, new_weights, optimizer, 1)


@over(STRUCTURES)
def test_inputs_may_be_read_only_and_outputs_may_not(optimizer: Optimizer) -> None:
    vectors = [np.ones(5, np.float32) for _ in range(3 + len(optimizer.slots))]
    gradient, weights, new_weights, *slots = vectors
    gradient.flags.writeable = weights.flags.writeable = False
    cpu.update(gradient, 1, slots, weights, new_weights, optimizer, 1)
    for output in (new_weights, *slots):
        output.flags.writeable = False
        with pytest.raises(TypeError):
            cpu.update(gradient, 1, slots, weights, new_weights, optimizer, 1)
        output.flags.writeable = True
