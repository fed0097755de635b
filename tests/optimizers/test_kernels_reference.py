"""The references: against torch in double precision, and against the traced definitions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import kernel_runs
from tests.support.kernel_runs import State
from tests.support.optimizer_cases import CASES, IN_TORCH, STRUCTURES, over, torchs

from deltaserve._common.optimizers import OPTIMIZERS, Adam, Optimizer, RMSprop
from deltaserve_server.optimizers import reference
from deltaserve_server.optimizers.trace import traced


def test_every_kind_has_a_case() -> None:
    assert {optimizer.kind for optimizer in STRUCTURES} == set(OPTIMIZERS)
    assert len({optimizer.structure for optimizer in STRUCTURES}) == len(STRUCTURES)
    assert {optimizer.structure for optimizer in STRUCTURES} == {optimizer.structure for optimizer in CASES}
    assert all(optimizer.problem() is None for optimizer in CASES)


@over(IN_TORCH)
def test_the_reference_equals_torch_in_double_precision(optimizer: Optimizer) -> None:
    rng = np.random.default_rng(0)
    state = kernel_runs.start(optimizer, rng.standard_normal(100))
    parameter = torch.nn.Parameter(torch.from_numpy(state.weights.copy()))
    stepping = torchs(optimizer, [parameter], foreach=False)
    for updates in range(1, 101):
        gradient = rng.standard_normal(100)
        state = kernel_runs.in_reference(optimizer, gradient, state, updates)
        parameter.grad = torch.from_numpy(gradient)
        stepping.step()
    for slot, vector in zip(optimizer.slots, state.slots, strict=True):
        expected = stepping.state[parameter][slot.name].numpy()
        np.testing.assert_allclose(vector, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(state.weights, parameter.detach().numpy(), rtol=1e-9, atol=1e-11)


class Doubles:
    """The operations of definitions in float64."""

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return a * b + c

    def sqrt(self, x: Any) -> Any:
        return np.sqrt(x)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return np.where(condition, x, y)


def shared_steps(optimizer: Optimizer, gradient: Any, weights: Any) -> tuple[Any, Any]:
    g = -gradient if optimizer.maximize else gradient
    if optimizer.decoupled:
        return g, weights * (1 - optimizer.lr * optimizer.weight_decay)
    return g + optimizer.weight_decay * weights, weights


def from_definition(optimizer: Optimizer, gradient: Any, state: State, updates: int) -> State:
    h = SimpleNamespace(**optimizer.scalars(optimizer.relevant_count(updates)))
    g, w = shared_steps(optimizer, gradient, state.weights)
    new, slots = optimizer.update(Doubles(), g, w, state.slots, h)
    return State(tuple(slots), new)


def from_trace(optimizer: Optimizer, gradient: Any, state: State, updates: int) -> State:
    g, w = shared_steps(optimizer, gradient, state.weights)
    trace, scalars = traced(optimizer), optimizer.scalars(optimizer.relevant_count(updates))
    known = {"g": g, "w": w, **dict(zip(trace.slots, state.slots, strict=True))}
    known |= {f"h_{name}": value for name, value in scalars.items()}
    assert tuple(scalars) == trace.scalars
    operations = {
        "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "<": np.less, ">": np.greater,
        "fma": Doubles().fma, "sqrt": np.sqrt, "where": np.where,
    }  # fmt: skip
    for step in trace.steps:
        operands = [known[operand] if isinstance(operand, str) else operand for operand in step.operands]
        known[step.name] = operations[step.operation](*operands)  # type: ignore[operator]
    slots = [known[slot] for slot in trace.new_slots if isinstance(slot, str)]
    assert isinstance(trace.weight, str)
    return State(tuple(slots), known[trace.weight])


@over()
@pytest.mark.parametrize("step", [from_definition, from_trace])
def test_the_definition_in_double_precision_equals_the_reference(optimizer: Optimizer, step: Any) -> None:
    """At several counts, because each has its own branches: SGD's first step, Adam's corrections."""
    for updates in (1, 2, 3, 1000):
        for drawn in (kernel_runs.usual(optimizer, updates, 1000), ordinary(optimizer, updates, 1000)):
            gradient, state = (drawn[0].astype(np.float64), widened(drawn[1]))
            made, expected = (run(optimizer, gradient, state, updates) for run in (step, kernel_runs.in_reference))
            # Two ways to round may differ where a sum cancels.
            for vector, right in zip((*made.slots, made.weights), (*expected.slots, expected.weights), strict=True):
                np.testing.assert_allclose(vector, right, rtol=1e-8, atol=1e-11)


def ordinary(optimizer: Optimizer, seed: int, size: int) -> tuple[Any, State]:
    """Returns values around 1 of both signs. A variance stays above 0: the square of the mean is at most 1/4."""
    rng = np.random.default_rng(seed)
    slots = tuple(
        rng.uniform(0.5, 1, size) if slot.minimum == 0 else rng.uniform(-0.5, 0.5, size) for slot in optimizer.slots
    )
    return rng.standard_normal(size), State(slots, rng.standard_normal(size))


def widened(state: State) -> State:
    return State(tuple(slot.astype(np.float64) for slot in state.slots), state.weights.astype(np.float64))


def test_a_trace_depends_on_the_structure_alone() -> None:
    traces: dict[Any, Any] = {}
    for optimizer in CASES:
        assert traces.setdefault(optimizer.structure, traced(optimizer)) == traced(optimizer)
    assert traced(Adam()) != traced(Adam(amsgrad=True))
    assert traced(RMSprop()) != traced(RMSprop(centered=True))


def test_a_definition_that_branches_on_a_value_cannot_be_traced() -> None:
    class Branching(Adam):
        def update(self, op: Any, g: Any, w: Any, slots: Any, h: Any) -> Any:
            return (w if g > 0.0 else g), slots

    with pytest.raises(TypeError, match=r"op\.where"):
        traced(Branching())


def test_the_change_of_the_reference() -> None:
    assert reference.squared_change([1, 2, -3], [4, 2, 1]) == 25
    assert reference.squared_change([], []) == 0
