"""Triton source of an optimizer's kernel, written by evaluating the optimizer's definition on names instead of numbers.

Each operation of the definition becomes one line, in the order in which `cpu` performs it. To see the kernel of an
optimizer, print its source:

    >>> print(source(deltaserve.Adam(amsgrad=True)))
"""

from collections.abc import Callable
from types import SimpleNamespace

from deltaserve._common.optimizers import Optimizer
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX, bounded, rounded_to_float32

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
"""

_AFTER = """\
    change = tl.where(inside, {new} - old, 0.0).to(tl.float64)
    tl.store(squares + tl.program_id(0), tl.sum(change * change, 0))
"""


def name(optimizer: Optimizer) -> str:
    """Returns the name of the kernel, which profilers show."""
    return f"update_{optimizer.kind}"


def source(optimizer: Optimizer) -> str:
    """Returns the source of a module with the kernel of an optimizer; it depends on the optimizer's structure alone.

    The kernel's parameters are the gradient, the slots, the weights, the new weights, the sums of squares and the size,
    then the divisor, the sign and the decay (see `cuda`), and then the optimizer's own numbers.
    """
    slots, numbers = [slot.name for slot in optimizer.slots], list(optimizer.scalars(1))
    vectors = ["gradient", *slots, "weights", "new_weights", "squares"]
    # The prefix is that of the definition, and keeps a number apart from the names of the kernel.
    h = {number: f"h_{number}" for number in numbers}
    lines = _Lines()
    old = lines.named("old", "tl.load(weights + i, inside)")
    before = [lines.named(f"old_{slot}", f"tl.load({slot} + i, inside)") for slot in slots]
    g, w = _shared(lines, optimizer, old)
    values = SimpleNamespace(**{number: _Value(text, lines) for number, text in h.items()})
    w, after = optimizer.update(lines, g, w, before, values)
    new = bounded(lines, w, FLOAT32_MAX)
    for slot, value in zip(slots, after, strict=True):
        lines.append(f"tl.store({slot} + i, {value.text}, inside)")
    lines.append(f"tl.store(new_weights + i, {new.text}, inside)")
    parameters = {
        "vectors": ", ".join(vectors),
        "numbers": ", ".join(["size", "divisor", "sign", "decay", *h.values()]),
    }
    return _BEFORE.format(name=name(optimizer), **parameters) + lines.text + _AFTER.format(new=new.text)


def _shared(lines: "_Lines", optimizer: Optimizer, old: "_Value") -> tuple["_Value", "_Value"]:
    """Writes the steps that all optimizers share; returns the gradient and the weight that the update gets."""
    g = lines.named("g", "sign * tl.div_rn(tl.load(gradient + i, inside).to(tl.float32), divisor)")
    lines.append("g = tl.where(g == g, g, 0.0)")
    w = old
    if optimizer.decoupled:
        w = bounded(lines, old * _Value("decay", lines), FLOAT32_MAX)
    else:
        # As in torch, 0 skips the addition, which could change the sign of a zero gradient.
        lines.append(f"if decay != 0:\n        g = tl.fma(decay, {old.text}, g)")
    return bounded(lines, g, MAGNITUDE_MAX), w


class _Lines:
    """The lines of a kernel, and the operations that append to them."""

    def __init__(self) -> None:
        self.text = ""
        self._count = 0

    def append(self, line: str) -> None:
        """Appends a statement."""
        self.text += f"    {line}\n"

    def named(self, name: str, expression: str) -> "_Value":
        """Appends an assignment."""
        self.append(f"{name} = {expression}")
        return _Value(name, self)

    def value(self, expression: str) -> "_Value":
        """Appends an assignment to a new name."""
        self._count += 1
        return self.named(f"t{self._count}", expression)

    def fma(self, a: object, b: object, c: object) -> "_Value":
        """Writes a * b + c, rounded once."""
        return self.value(f"tl.fma({_text(a)}, {_text(b)}, {_text(c)})")

    def sqrt(self, x: object) -> "_Value":
        """Writes the square root, correctly rounded."""
        return self.value(f"tl.sqrt_rn({_text(x)})")

    def where(self, condition: object, x: object, y: object) -> "_Value":
        """Writes a choice between two values."""
        return self.value(f"tl.where({_text(condition)}, {_text(x)}, {_text(y)})")


def _operator(pattern: str) -> Callable[["_Value", object], "_Value"]:
    """Returns a method for an operator, which appends one line."""
    return lambda left, right: left.lines.value(pattern.format(left.text, _text(right)))


def _comparison(pattern: str) -> Callable[["_Value", object], "_Value"]:
    """Returns a method for a comparison, which `where` writes into its own line."""
    return lambda left, right: _Value(pattern.format(left.text, _text(right)), left.lines)


class _Value:
    """A float32 or a condition while the kernel is written: its text, and the lines that come before."""

    def __init__(self, text: str, lines: _Lines) -> None:
        self.text = text
        self.lines = lines

    __add__ = _operator("{} + {}")
    __sub__ = _operator("{} - {}")
    __mul__ = _operator("{} * {}")
    # Triton's own division is approximate for float32.
    __truediv__ = _operator("tl.div_rn({}, {})")
    __lt__ = _comparison("{} < {}")
    __gt__ = _comparison("{} > {}")


def _text(operand: object) -> str:
    """Returns a value's text, or a number as a literal that Triton compiles to the nearest float32.

    Raises:
        ValueError: Triton would compile the literal to something else.
    """
    if isinstance(operand, _Value):
        return operand.text
    assert isinstance(operand, int | float)
    number = rounded_to_float32(operand)
    # Triton takes a denormal literal for a float64, and drops the sign of a zero.
    if repr(number) != "0.0" and not _DENORMAL <= abs(number) <= FLOAT32_MAX:
        raise ValueError(f"expected 0.0 or a normal float32, got {number}")
    return repr(number)
