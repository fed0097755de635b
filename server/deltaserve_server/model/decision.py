"""What the state machine decides. The engine carries decisions out in the order given."""

from dataclasses import dataclass

from deltaserve_server.model.push import Key, PushResult, UpdateSummary
from deltaserve_server.model.refused import Refused


@dataclass(frozen=True, slots=True)
class Fold:
    """Add `factor` times the push's gradient to the sum that the next update takes."""

    key: Key
    factor: float


@dataclass(frozen=True, slots=True)
class Combine:
    """Make the next update's gradient from several pushes at once, element by element.

    Attributes:
        pushes: The pushes, each with the factor that its values are multiplied by.
        trim: How many of an element's values are dropped at either end; the gradient is the mean of the rest.
    """

    pushes: tuple[tuple[Key, float], ...]
    trim: int


@dataclass(frozen=True, slots=True)
class Update:
    """Apply the reduced gradient and publish the version.

    Attributes:
        summary: Describes the update. The engine fills in its norm.
        weight: What the sum of the folded pushes is divided by: the sum of their weights.
        absent: Tensors that keep their weights and optimizer state.
        counts: The number of updates of each tensor, this one included. One event may make several updates, so the
            machine's own counts may be those of a later one.
        sources: Session id and fingerprint of each push, in the order of `summary.contributions`.
    """

    summary: UpdateSummary
    weight: float
    absent: frozenset[int]
    counts: tuple[int, ...]
    sources: tuple[tuple[bytes, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class BumpVersion:
    """Publish the same weights under the next version, for the workers that wait for it."""

    version: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the call that waits for this push."""

    key: Key
    result: PushResult


@dataclass(frozen=True, slots=True)
class Refuse:
    """Refuse a push that was accepted and waited, and drop its values."""

    key: Key
    refusal: Refused


Decision = Fold | Combine | Update | BumpVersion | Answer | Refuse
