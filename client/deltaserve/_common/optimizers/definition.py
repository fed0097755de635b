"""What an optimizer is: its hyperparameters, its state, and the update of one element.

An optimizer is a frozen dataclass that derives from `Optimizer`, in a file of its own. Everything else follows from it:
messages, text on the command line, files, memory budgets and the kernels. The update is written once, as an expression
over a few float32 operations. The CPU kernel, the GPU kernel and the tests each evaluate this same expression.
"""

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Protocol

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
"""The largest finite float32."""

MAGNITUDE_MAX = (2.0 - 2.0**-23) * 2.0**63
"""The largest float32 whose square is finite in float32: the next one is 2**64."""


class Operations(Protocol):
    """The operations that an update may use beside the operators + - * / and the comparisons < and >.

    All of them work on float32, and each result is rounded once. A comparison with NaN is false. A plain number stands
    for its nearest float32. The left operand of an operator, the first argument of `fma`, and one of the choices of
    `where` are values, never plain numbers.
    """

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Returns a * b + c, rounded once."""

    def sqrt(self, x: Any) -> Any:
        """Returns the square root, correctly rounded."""

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Returns x where the condition holds, else y."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A vector of optimizer state, with one float32 for each weight.

    Attributes:
        name: Its name in the state of the torch optimizer.
        minimum: The smallest value that it can have.
        initial: The value of all its elements before the first update.
    """

    name: str
    minimum: float = -FLOAT32_MAX
    initial: float = 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values that a hyperparameter may have. All of them are finite as float32.

    Attributes:
        minimum: The smallest allowed value.
        above: The largest value that is too small, also after rounding to float32.
        maximum: The largest allowed value.
        below: The smallest value that is too large. In float32 a value may be rounded to it.
    """

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def allow(self, value: float) -> bool:
        """Returns whether a value is allowed."""
        rounded = rounded_to_float32(value)
        return (
            math.isfinite(rounded)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or rounded > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Describes the values, as in "in [0, 1)"."""
        least = self.minimum if self.above is None else self.above
        if self.maximum is None and self.below is None:
            return f"{'>=' if self.above is None else '>'} {least:g} and finite, also in float32"
        high = f"{self.below:g})" if self.maximum is None else f"{self.maximum:g}]"
        return f"in [{least:g}, {high}" if self.above is None else f"in ({least:g}, {high}, also in float32"


def hyper(default: float, **bounds: float) -> Any:
    """Returns the dataclass field of a hyperparameter; `bounds` are the arguments of `Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def option(default: bool = False) -> Any:
    """Returns the dataclass field of an option that a model fixes when it is created, such as Adam's amsgrad."""
    return field(default=default, metadata={"structural": True})


class Optimizer(ABC):
    """An optimizer with its hyperparameters, which are named as in torch: one value for each parameter group.

    The gradient that `update` gets is the mean gradient after the steps that all optimizers share, in torch's order:
    `maximize` negates it, NaN becomes 0, a coupled `weight_decay` adds `weight_decay` times the weight, and it is
    clipped at `MAGNITUDE_MAX`. A decoupled one instead multiplies the weight by 1 - lr * weight_decay. The new weight
    is clipped at `FLOAT32_MAX` afterwards, if `clips_weight`.

    Attributes:
        kind: The optimizer's name in messages, files and texts; a dataclass field, so that encoders write it.
        lr: Learning rate.
        weight_decay: Weight decay, coupled or decoupled.
        maximize: Ascend instead of descend.
        decoupled: Whether weight decay multiplies the weight instead of being added to the gradient.
        clips_weight: Whether the new weight is clipped. Where the ranges exclude an infinite weight, no clip is needed.
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]  # every subclass is a dataclass

    kind: str
    lr: float
    weight_decay: float
    maximize: bool
    decoupled: ClassVar[bool] = False
    clips_weight: ClassVar[bool] = True

    @property
    @abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The optimizer's state, in the order in which it is stored and sent. A slot exists only where it is used."""

    @abstractmethod
    def scalars(self, count: int) -> Mapping[str, float]:
        """Returns the numbers that `update` uses, computed in float64. They are rounded to float32 once, afterwards.

        Args:
            count: The value of `relevant_count` for the number of updates of the tensor, this one included.
        """

    @abstractmethod
    def update(self, op: Operations, g: Any, w: Any, slots: Sequence[Any], h: Any) -> tuple[Any, Sequence[Any]]:
        """Computes the update of one element.

        For finite arguments the new slots must be finite and not below their minimum, and the new weight must not be
        NaN. Which operations are used may depend on `structure` alone.

        Args:
            op: The operations.
            g: The gradient; see the class. Its magnitude is at most `MAGNITUDE_MAX`.
            w: The weight.
            slots: The value of each slot.
            h: The numbers of `scalars`, as attributes.

        Returns:
            The new weight and the new value of each slot.
        """

    def relevant_count(self, count: int) -> int:
        """Returns the number of updates of a tensor as far as `scalars` depends on it.

        Tensors for which it is equal are updated in one call of the kernel.
        """
        return 0

    @property
    def structure(self) -> tuple[object, ...]:
        """What a model fixes when it is created: the kind, the slots that exist, and the options."""
        options = (getattr(self, name) for name, metadata in _fields(type(self)) if metadata.get("structural"))
        return (self.kind, *(slot.name for slot in self.slots), *options)

    def problem(self) -> tuple[str, str] | None:
        """Checks that all hyperparameters are in range.

        Returns:
            The name of the first one that is not and its allowed values, or None if all are in range.
        """
        for name, metadata in _fields(type(self)):
            bounds = metadata.get("bounds")
            if bounds and not bounds.allow(getattr(self, name)):
                return name, str(bounds)
        return None


def hyperparameters(optimizer: Optimizer | type[Optimizer]) -> tuple[str, ...]:
    """Returns the names of an optimizer's hyperparameters, options included, in order."""
    return tuple(name for name, _ in _fields(optimizer if isinstance(optimizer, type) else type(optimizer)))


def described(optimizer: Optimizer) -> str:
    """Returns the kind and what else a model fixes, as in "sgd with momentum, nesterov"."""
    default = type(optimizer)()
    fixed = [
        name
        for name in hyperparameters(optimizer)
        if replace(default, **{name: getattr(optimizer, name)}).structure != default.structure
    ]
    return f"{optimizer.kind} with {', '.join(fixed)}" if fixed else optimizer.kind


@cache  # every push that carries hyperparameters asks for them
def _fields(kind: type[Optimizer]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((f.name, f.metadata) for f in fields(kind) if f.init)


def at_most(op: Operations, x: Any, limit: float) -> Any:
    """Clips values above the limit; NaN stays NaN."""
    return op.where(x > limit, limit, x)


def bounded(op: Operations, x: Any, limit: float) -> Any:
    """Clips values to [-limit, limit]; NaN stays NaN."""
    clipped = at_most(op, x, limit)
    return op.where(clipped < -limit, -limit, clipped)


def lerp(op: Operations, start: Any, end: Any, weight: Any) -> Any:
    """Interpolates from `start` to `end`, as `torch.lerp` does: it starts from the nearer of the two."""
    is_near = weight < 0.5
    return op.fma(op.where(is_near, weight, weight - 1.0), end - start, op.where(is_near, start, end))


def rounded_to_float32(value: float) -> float:
    """Rounds to the nearest float32; a value beyond its range becomes infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:  # struct raises where rounding to nearest gives infinity
        return math.copysign(math.inf, value)
