"""A push as the state machine sees it: who, which, on what; never its values."""

from dataclasses import dataclass, replace

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
        fingerprint: Of the values; None before they have come.
    """

    session_id: bytes
    epoch: int
    sequence: int
    base_version: int | None = None
    hyperparameters: tuple[Hyperparameters, ...] | None = None
    absent: frozenset[int] = frozenset()
    fingerprint: int | None = None

    @property
    def key(self) -> Key:
        """Identifies the push."""
        return self.session_id, self.sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What became of a push.

    Attributes:
        version: The version that the update made.
        duplicate: The push had been applied before; this is its first result.
        staleness: Versions between the push's base and its update; None when it is no longer known.
        contributors: Number of pushes in the update; None when it is no longer known.
        hyperparameters: What the update used, by group; empty when it is no longer known.
    """

    version: int
    duplicate: bool = False
    staleness: int | None = None
    contributors: int | None = None
    hyperparameters: tuple[Hyperparameters, ...] = ()

    def again(self) -> "PushResult":
        """Returns the result as a duplicate push gets it."""
        return replace(self, duplicate=True)
