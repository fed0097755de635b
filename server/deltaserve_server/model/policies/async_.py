"""The asynchronous policy: every push is an update at once."""

from dataclasses import dataclass, replace

from deltaserve_server.model.decision import Decision, Fold
from deltaserve_server.model.policies.base import UpdatePolicy
from deltaserve_server.model.push import Push
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import PendingPush
from deltaserve_server.model.sessions import Session
from deltaserve_server.model.versioned_model import VersionedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Async(UpdatePolicy):
    """Every push is an update at once. No worker waits for another.

    Attributes:
        max_staleness: The largest accepted number of versions between a push's base and the current version; None
            means no limit.
        damping: Divide lr by 1 + staleness (Zhang et al., 2016, arXiv:1511.05950), so that a gradient counts less the
            older the weights are that it was computed on.
    """

    max_staleness: int | None = None
    damping: bool = False

    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        """Refuses a push whose base is too old."""
        if self.max_staleness is not None and model.version - base_version > self.max_staleness:
            raise Refused("STALE_BASE", base=base_version, current=model.version, bound=self.max_staleness)

    def accept(self, model: VersionedModel, pending: PendingPush, now: float) -> list[Decision]:
        """Makes an update of the push."""
        groups = model.hyperparameters(pending.push.hyperparameters)
        if self.damping:
            # The base decides, not the time: a push on the current weights is never damped.
            divisor = 1 + model.version - pending.base_version
            groups = tuple(replace(group, lr=group.lr / divisor) for group in groups)
        update, answers = model.update([pending], groups, now)
        return [Fold(pending.push.key, pending.push.weight), update, *answers]
