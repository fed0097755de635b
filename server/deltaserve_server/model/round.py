"""One round of a synchronous policy: the pushes that together make one update."""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.difference import first_difference
from deltaserve_server.model.policy import Sync
from deltaserve_server.model.push import Contribution, Push
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.sessions import Session


@dataclass(frozen=True, slots=True)
class PendingPush:
    """A push, the session it came from, and the version it was computed on."""

    session: Session
    push: Push
    base_version: int

    def absent(self, tensor_count: int) -> frozenset[int]:
        """Returns the tensors without a gradient: those left out, and those that the session does not know."""
        return self.push.absent.union(range(self.session.tensor_count, tensor_count))

    def contribution(self, version: int) -> Contribution:
        """Returns what the push is in an update of `version`."""
        return Contribution(
            worker=self.session.worker,
            epoch=self.session.epoch,
            sequence=self.push.sequence,
            staleness=version - self.base_version,
            weight=self.push.weight,
            norm=self.push.norm,
        )


@dataclass(slots=True)
class Round:
    """Pushes by worker name, folded in the order of names.

    Attributes:
        opened: Version at which the round began; no older base is taken.
        contributions: Accepted pushes by worker name.
        hyperparameters: Those that the round's pushes carry; None while none does.
        folded: How many contributions, in order of names, are already reduced.
    """

    opened: int
    contributions: dict[str, PendingPush] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameters, ...] | None = None
    folded: int = 0
    _arrivals: list[float] = field(default_factory=list)

    def check(self, push: Push, base_version: int) -> None:
        """Raises Refused where the push does not fit into this round."""
        if base_version < self.opened:
            raise Refused("ROUND_CLOSED", base=base_version, current=self.opened)
        difference = _difference(self.hyperparameters or (), push.hyperparameters or ())
        if difference:
            raise Refused("HYPERPARAMETER_CONFLICT", None, **difference)

    def add(self, contribution: PendingPush, now: float) -> None:
        """Takes a push in."""
        self.contributions[contribution.session.worker] = contribution
        self._arrivals.append(now)
        carried = contribution.push.hyperparameters
        if carried and len(carried) > len(self.hyperparameters or ()):
            self.hyperparameters = carried

    def enough(self, policy: Sync) -> bool:
        """Whether the round has the pushes without which it does not close."""
        return len(self.contributions) >= policy.min_workers

    def due(self, policy: Sync) -> float | None:
        """Returns the time from which on nobody is awaited; None while there is none."""
        times = []
        if policy.quorum is not None and len(self._arrivals) >= policy.quorum:
            times.append(self._arrivals[policy.quorum - 1] + policy.grace_seconds)
        if policy.round_timeout_seconds is not None and self._arrivals:
            times.append(self._arrivals[0] + policy.round_timeout_seconds)
        return min(times, default=None)

    def foldable(self, awaited: Collection[str]) -> list[PendingPush]:
        """Returns what can be reduced now, in order: the contributions whose names come before every awaited one."""
        first_awaited = min(awaited, default=None)
        ready = sorted(name for name in self.contributions if first_awaited is None or name < first_awaited)
        return [self.contributions[name] for name in ready[self.folded :]]

    def in_order(self) -> list[PendingPush]:
        """Returns the contributions by worker name."""
        return [self.contributions[name] for name in sorted(self.contributions)]

    def absent(self, tensor_count: int) -> frozenset[int]:
        """Returns the tensors that no contribution has a gradient for."""
        return frozenset.intersection(*(held.absent(tensor_count) for held in self.contributions.values()))


def factor(push: Push, policy: Sync) -> float:
    """Returns what a push's values are multiplied with before they are reduced: its weight, after clipping."""
    clips = policy.clip_norm is not None and push.norm > policy.clip_norm
    scale = policy.clip_norm / push.norm if clips and policy.clip_norm else 1.0
    made = scale * push.weight if policy.reduction == "mean" else scale
    return max(made, sys.float_info.min)  # a tiny clip_norm leaves nothing of a push, but a factor is more than 0


def trim(policy: Sync, count: int) -> int:
    """Returns how many of `count` values are left out at either end: for the median, all but one or two."""
    return (count - 1) // 2 if policy.reduction == "median" else policy.trim


def _difference(held: tuple[Hyperparameters, ...], got: tuple[Hyperparameters, ...]) -> dict[str, object]:
    """Names the first hyperparameter in which two pushes differ, in the groups that both know; empty if none does."""
    for group, (ours, theirs) in enumerate(zip(held, got, strict=False)):
        difference = first_difference(ours, theirs)
        if difference:
            name, left, right = difference
            return {"field": f"groups[{group}].{name}", "round": left, "got": right}
    return {}
