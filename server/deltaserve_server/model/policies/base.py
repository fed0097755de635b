"""The interface that the three policies implement."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from deltaserve_server.model.decision import Decision
from deltaserve_server.model.push import Push
from deltaserve_server.model.round import PendingPush
from deltaserve_server.model.sessions import Session
from deltaserve_server.model.versioned_model import VersionedModel


class UpdatePolicy(ABC):
    """Decides when a push becomes an update.

    A policy is an immutable value: the settings that the user chose. What it must remember between two events, the
    open round and the withheld answers, belongs to the model that each method receives. So a change of settings keeps
    them, and a snapshot of the model covers them.
    """

    __slots__ = ()

    def joins(self, model: VersionedModel, worker: str) -> bool:
        """Returns whether a session that `worker` opens now may push before the next version."""
        return True

    @abstractmethod
    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        """Checks a push that has not been accepted before. Changes nothing.

        Raises:
            Refused: The policy does not take this push now.
        """

    @abstractmethod
    def accept(self, model: VersionedModel, pending: PendingPush, now: float) -> list[Decision]:
        """Takes a push that passed `check`. The caller calls `advance` next."""

    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        """Decides what the sessions, the accepted pushes and the time now allow. Every event ends with this."""
        return []

    def due(self, model: VersionedModel) -> float | None:
        """Returns when `advance` must run even if no event arrives; None means that it need not."""
        return None

    def may_change(self, model: VersionedModel, successor: "UpdatePolicy") -> bool:
        """Returns whether `successor` may replace this policy before the open round closes."""
        return True

    def replay_update(self, model: VersionedModel, sessions: Iterable[Session]) -> None:  # noqa: B027 (optional)
        """Repeats what an update of one push of each of `sessions` did to the policy's own state."""

    def resume(self, model: VersionedModel) -> None:  # noqa: B027 (optional)
        """Restores, after a restart, the state that neither snapshot nor journal holds."""
