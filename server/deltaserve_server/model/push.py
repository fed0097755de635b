"""A push as the state machine sees it: who, which, on what; never its values."""

from dataclasses import dataclass, replace
from typing import Literal

from deltaserve_server.adadelta import Hyperparameters

Key = tuple[bytes, int]
"""Identifies a push: session id and sequence number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One worker's gradient for the whole model.

    Attributes:
        session_id: 16 bytes.
        epoch: The session's epoch as the worker knows it.
        sequence: 1 for the session's first push.
        base_version: Version of the weights that the gradient was computed on; None means the current one.
        hyperparameters: By group, for the update that this push becomes part of; None means the model's own.
        absent: Indices of tensors without a gradient.
        weight: How much it counts in a weighted mean.
        fingerprint: Of the values; None before they have come.
        norm: L2 norm of the values; 0 before they have come.
    """

    session_id: bytes
    epoch: int
    sequence: int
    base_version: int | None = None
    hyperparameters: tuple[Hyperparameters, ...] | None = None
    absent: frozenset[int] = frozenset()
    weight: float = 1.0
    fingerprint: int | None = None
    norm: float = 0.0

    @property
    def key(self) -> Key:
        """Identifies the push."""
        return self.session_id, self.sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """What one push was in an update.

    Attributes:
        worker: The worker's name.
        epoch: Of the session that it came from.
        sequence: Its number there.
        staleness: Versions between its base and the update.
        weight: Its weight in the mean.
        norm: L2 norm of its values.
    """

    worker: str
    epoch: int
    sequence: int
    staleness: int
    weight: float
    norm: float


@dataclass(kw_only=True, slots=True, eq=False)
class UpdateSummary:
    """An update that was made.

    Attributes:
        version: The version that it made.
        contributions: Its pushes, by worker name.
        hyperparameters: What it used, by group.
        norm: L2 norm of the change of the weights; who carries the update out enters it.
    """

    version: int
    contributions: tuple[Contribution, ...]
    hyperparameters: tuple[Hyperparameters, ...]
    norm: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What became of a push.

    Attributes:
        version: The version that its update made; the current one where that is no longer known.
        duplicate: The push had been applied before; this is its first result.
        contribution: What it was in the update; None when that is no longer known.
        summary: The update; None likewise.
    """

    version: int
    duplicate: bool = False
    contribution: Contribution | None = None
    summary: UpdateSummary | None = None

    def again(self) -> "PushResult":
        """Returns the result as a duplicate push gets it."""
        return replace(self, duplicate=True)


@dataclass(frozen=True, slots=True)
class PushStatus:
    """Where a push stands.

    Attributes:
        state: "waiting" is for its round; "not accepted" also before it has come.
        final: Whether that will not change any more.
        result: Of a push that was applied.
    """

    state: Literal["not accepted", "waiting", "applied"]
    final: bool
    result: PushResult | None = None
