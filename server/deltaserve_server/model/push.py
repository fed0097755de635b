"""A push as the state machine sees it: everything but its values."""

from dataclasses import dataclass
from typing import Literal

from deltaserve._common.optimizers import Optimizer

Key = tuple[bytes, int]
"""Identifies a push: session id and sequence number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One worker's gradient for the whole model.

    Attributes:
        session_id: 16 bytes.
        epoch: The session's epoch as the worker knows it.
        sequence: Its number in the session, from 1.
        base_version: Version of the weights that the gradient was computed on; None means the current one.
        hyperparameters: By group, for the update that this push becomes part of; None means the model's own.
        absent: Indices of tensors without a gradient.
        weight: Its weight in a weighted mean.
        fingerprint: Fingerprint of its values; None before they have arrived.
        norm: L2 norm of its values; 0 before they have arrived.
    """

    session_id: bytes
    epoch: int
    sequence: int
    base_version: int | None = None
    hyperparameters: tuple[Optimizer, ...] | None = None
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
    """What one push contributed to an update.

    Attributes:
        worker: The worker's name.
        epoch: The epoch of its session.
        sequence: Its number in the session.
        staleness: Number of versions between its base and the weights that the update changed.
        weight: Its weight in the mean.
        norm: L2 norm of its values, before clipping.
    """

    worker: str
    epoch: int
    sequence: int
    staleness: int
    weight: float
    norm: float


@dataclass(kw_only=True, slots=True, eq=False)
class UpdateSummary:
    """Describes an update.

    Attributes:
        version: The version that it made.
        contributions: What its pushes contributed, in the order of worker names.
        hyperparameters: What it used, by group.
        norm: L2 norm of the change of the weights. The engine fills it in once the update is computed.
    """

    version: int
    contributions: tuple[Contribution, ...]
    hyperparameters: tuple[Optimizer, ...]
    norm: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """The result of a push that is part of an update.

    Attributes:
        version: The version that the update made; the current one where the update is no longer known.
        duplicate: Whether the push arrived again; the rest is its first result.
        contribution: What it contributed; None where that is no longer known.
        summary: The update; None where that is no longer known.
    """

    version: int
    duplicate: bool = False
    contribution: Contribution | None = None
    summary: UpdateSummary | None = None


@dataclass(frozen=True, slots=True)
class PushStatus:
    """What became of a push.

    Attributes:
        state: "waiting" for its round; "not accepted" also if it never arrived.
        final: Whether the state cannot change any more.
        result: The result of a push that was applied.
    """

    state: Literal["not accepted", "waiting", "applied"]
    final: bool
    result: PushResult | None = None
