"""Triton source of an optimizer's kernel, from a trace of its definition: a line for each operation, in `cpu`'s order.

To see a kernel, print its source:

    >>> print(source(deltaserve.Adam(amsgrad=True)))
"""

from collections.abc import Iterator

from deltaserve._common.optimizers import Optimizer
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX, rounded_to_float32
from deltaserve_server.optimizers.trace import Operand, Step, traced

_DENORMAL = 2.0**-126
"""The smallest float32 that is not denormal."""

_BEFORE = """\
import triton
import triton.language as tl


@triton.jit
def {name}(
    {vectors},
    {numbers},
    block: tl.constexpr,
):
    # Offsets need 64 bits: a model may have more than 2**31 elements.
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < size
    old = tl.load(weights + i, inside)
    g = tl.div_rn(tl.load(gradient + i, inside).to(tl.float32), divisor)
    g = tl.where(g == g, g, 0.0)
"""

_COUPLED_DECAY = """\
    # As in torch, 0 skips the addition, which could change the sign of a zero gradient.
    if decay != 0:
        g = tl.fma(decay, old, g)
    w = old
"""

_DECOUPLED_DECAY = """\
    w = old * decay
"""

_AFTER = """\
    tl.store(new_weights + i, new, inside)
    change = tl.where(inside, new - old, 0.0).to(tl.float64)
    tl.store(squares + tl.program_id(0), tl.sum(change * change, 0))
"""

# Triton's own division and root are approximate for float32.
_PATTERNS = {
    "/": "tl.div_rn({}, {})",
    "fma": "tl.fma({}, {}, {})",
    "sqrt": "tl.sqrt_rn({})",
    "where": "tl.where({}, {}, {})",
    **{operator: f"{{}} {operator} {{}}" for operator in "+-*<>"},
}


def name(optimizer: Optimizer) -> str:
    """Returns the name of the kernel, which profilers show."""
    return f"update_{optimizer.kind}"


def source(optimizer: Optimizer) -> str:
    """Returns the source of a module with the kernel of an optimizer; it depends on the optimizer's structure alone.

    The kernel's parameters are the gradient, the slots, the weights, the new weights, the sums of squares and the size,
    then the signed divisor and the decay (see `cuda`), and then the numbers of `Optimizer.scalars`.
    """
    trace, slots = traced(optimizer), [slot.name for slot in optimizer.slots]
    vectors = ["gradient", *slots, "weights", "new_weights", "squares"]
    numbers = ["size", "divisor", "decay", *(f"h_{scalar}" for scalar in trace.scalars)]
    lines = [
        *(_bounded("w", "w", FLOAT32_MAX) if optimizer.decoupled else ()),
        *_bounded("g", "g", MAGNITUDE_MAX),
        *(f"{value} = tl.load({slot} + i, inside)" for value, slot in zip(trace.slots, slots, strict=True)),
        *_steps(trace.steps),
        f"new = {_text(trace.weight)}",
        *(_bounded("new", "new", FLOAT32_MAX) if optimizer.clips_weight else ()),
        *(f"tl.store({slot} + i, {_text(value)}, inside)" for value, slot in zip(trace.new_slots, slots, strict=True)),
    ]
    before = _BEFORE.format(name=name(optimizer), vectors=", ".join(vectors), numbers=", ".join(numbers))
    decay = _DECOUPLED_DECAY if optimizer.decoupled else _COUPLED_DECAY
    return before + decay + "".join(f"    {line}\n" for line in lines) + _AFTER


def _steps(steps: tuple[Step, ...]) -> Iterator[str]:
    """Yields the lines of a trace; a comparison is part of the lines that use it."""
    comparisons: dict[Operand, str] = {}
    for step in steps:
        operands = (comparisons.get(operand) or _text(operand) for operand in step.operands)
        expression = _PATTERNS[step.operation].format(*operands)
        if step.operation in "<>":
            comparisons[step.name] = expression
        else:
            yield f"{step.name} = {expression}"


def _bounded(result: str, value: str, limit: float) -> Iterator[str]:
    """Yields the lines that clip a value, as `definition.bounded` does."""
    yield f"{result} = tl.where({value} > {limit}, {limit}, {value})"
    yield f"{result} = tl.where({result} < {-limit}, {-limit}, {result})"


def _text(operand: Operand) -> str:
    """Returns a value's name, or a number as a literal that Triton compiles to the nearest float32.

    Raises:
        ValueError: Triton would compile the literal to something else.
    """
    if isinstance(operand, str):
        return operand
    number = rounded_to_float32(operand)
    # Triton takes a denormal literal for a float64, and drops the sign of a zero.
    if repr(number) != "0.0" and not _DENORMAL <= abs(number) <= FLOAT32_MAX:
        raise ValueError(f"expected 0.0 or a normal float32, got {number}")
    return repr(number)
