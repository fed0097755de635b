"""What kernels of all kinds take from a definition: the operations of its update, and the numbers that they use."""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

from deltaserve._common.optimizers import Optimizer
from deltaserve._common.optimizers.definition import FLOAT32_MAX, rounded_to_float32

Operand = str | float
"""A value by its name, or a plain number."""


class Step(NamedTuple):
    """One operation, rounded once.

    Attributes:
        name: The name of its result: `t0`, `t1`, ...
        operation: One of + - * / < > fma sqrt where.
        operands: Its operands, in order.
    """

    name: str
    operation: str
    operands: tuple[Operand, ...]


class Trace(NamedTuple):
    """The update of one element.

    Attributes:
        scalars: The names of the numbers in `Optimizer.scalars`, in order; number NAME is the value `h_NAME`.
        slots: The values of the slots before the update: `slot_0`, `slot_1`, ... The gradient is `g`, the weight `w`.
        steps: The operations, in order.
        weight: The new weight.
        new_slots: The new value of each slot.
    """

    scalars: tuple[str, ...]
    slots: tuple[str, ...]
    steps: tuple[Step, ...]
    weight: Operand
    new_slots: tuple[Operand, ...]


def traced(optimizer: Optimizer) -> Trace:
    """Traces the update of an optimizer. The result depends on its `structure` alone."""
    steps = _Steps()
    scalars = tuple(optimizer.scalars(optimizer.relevant_count(1)))
    slots = tuple(f"slot_{k}" for k in range(len(optimizer.slots)))
    numbers = SimpleNamespace(**{name: _Value(steps, f"h_{name}") for name in scalars})
    g, w, *values = (_Value(steps, name) for name in ("g", "w", *slots))
    weight, new_slots = optimizer.update(steps, g, w, values, numbers)
    return Trace(scalars, slots, tuple(steps.made), _operand(weight), tuple(map(_operand, new_slots)))


@functools.lru_cache(maxsize=1024)
def kernel_numbers(optimizer: Optimizer, count: int) -> tuple[float, ...]:
    """Returns the numbers of one update, rounded to float32: the decay, and then `Optimizer.scalars`.

    The decay is the factor of the weight: in the gradient, or of the weight itself where weight decay is decoupled.
    """
    decay = optimizer.weight_decay
    if optimizer.decoupled:
        decay = max(1 - optimizer.lr * decay, -FLOAT32_MAX)
    return tuple(map(rounded_to_float32, (decay, *optimizer.scalars(count).values())))


class _Value:
    """A value that has no number yet: each operator appends a step and returns the value of its result."""

    def __init__(self, steps: "_Steps", name: str) -> None:
        self.steps = steps
        self.name = name

    def __add__(self, other: Any) -> "_Value":
        return self.steps.append("+", self, other)

    def __sub__(self, other: Any) -> "_Value":
        return self.steps.append("-", self, other)

    def __mul__(self, other: Any) -> "_Value":
        return self.steps.append("*", self, other)

    def __truediv__(self, other: Any) -> "_Value":
        return self.steps.append("/", self, other)

    def __lt__(self, other: Any) -> "_Value":
        return self.steps.append("<", self, other)

    def __gt__(self, other: Any) -> "_Value":
        return self.steps.append(">", self, other)

    def __bool__(self) -> bool:
        raise TypeError("an update cannot branch on a value: use op.where")


class _Steps:
    """The steps so far, and the operations that an update may use."""

    def __init__(self) -> None:
        self.made: list[Step] = []

    def append(self, operation: str, *operands: Any) -> _Value:
        self.made.append(Step(f"t{len(self.made)}", operation, tuple(map(_operand, operands))))
        return _Value(self, self.made[-1].name)

    def fma(self, a: Any, b: Any, c: Any) -> _Value:
        return self.append("fma", a, b, c)

    def sqrt(self, x: Any) -> _Value:
        return self.append("sqrt", x)

    def where(self, condition: Any, x: Any, y: Any) -> _Value:
        return self.append("where", condition, x, y)


def _operand(value: Any) -> Operand:
    return value.name if isinstance(value, _Value) else float(value)
