"""What the state machine decides, for the engine to carry out in the order given."""

from dataclasses import dataclass

from deltaserve_server.model.push import Key, PushResult, UpdateSummary
from deltaserve_server.model.refused import Refused


@dataclass(frozen=True, slots=True)
class Fold:
    """Add `factor` times this push's gradient to the sum that the next update takes."""

    key: Key
    factor: float


@dataclass(frozen=True, slots=True)
class Combine:
    """Make the next update's gradient of these pushes, each times its factor.

    Attributes:
        pushes: With their factors.
        trim: Of the values of each element, so many are left out at either end; the mean of the others is taken.
    """

    pushes: tuple[tuple[Key, float], ...]
    trim: int


@dataclass(frozen=True, slots=True)
class Update:
    """Apply the gradient and publish the version.

    Attributes:
        summary: The update; its norm is to be entered.
        weight: What a sum is divided by: the weights of its pushes together.
        absent: Tensors that keep their weights and optimizer state.
        sources: Session id and fingerprint of each push, in the order of `summary.contributions`.
    """

    summary: UpdateSummary
    weight: float
    absent: frozenset[int]
    sources: tuple[tuple[bytes, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class BumpVersion:
    """Give the weights as they are a new version, for those who wait for it."""

    version: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell whoever waits for this push what became of it."""

    key: Key
    result: PushResult


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell whoever waits for this push that it was given up, and forget its values."""

    key: Key
    refusal: Refused


Decision = Fold | Combine | Update | BumpVersion | Answer | Refuse
