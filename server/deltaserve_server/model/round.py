"""One round of a synchronous policy: the pushes that together make one update."""

from dataclasses import dataclass, field

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.push import Push
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.sessions import Session


@dataclass(frozen=True, slots=True)
class Contribution:
    """A push, the session it came from, and the version it was computed on."""

    session: Session
    push: Push
    base_version: int

    def absent(self, tensor_count: int) -> frozenset[int]:
        """Returns the tensors without a gradient: those left out, and those that the session does not know."""
        return self.push.absent.union(range(self.session.tensor_count, tensor_count))


@dataclass(slots=True)
class Round:
    """Pushes by worker name, folded in the order of names.

    Attributes:
        opened: Version at which the round began.
        contributions: Accepted pushes by worker name.
        hyperparameters: Those that the round's pushes carry; None while none does.
        folded: How many contributions, in order of names, are already reduced.
    """

    opened: int
    contributions: dict[str, Contribution] = field(default_factory=dict)
    hyperparameters: tuple[Hyperparameters, ...] | None = None
    folded: int = 0

    def check(self, push: Push, base_version: int) -> None:
        """Raises Refused where the push does not fit into this round."""
        if base_version < self.opened:
            raise Refused("ROUND_CLOSED", base=base_version, current=self.opened)
        difference = _difference(self.hyperparameters or (), push.hyperparameters or ())
        if difference:
            raise Refused("HYPERPARAMETER_CONFLICT", None, **difference)

    def add(self, contribution: Contribution) -> None:
        """Takes a push in."""
        self.contributions[contribution.session.worker] = contribution
        carried = contribution.push.hyperparameters
        if carried and len(carried) > len(self.hyperparameters or ()):
            self.hyperparameters = carried

    def foldable(self, awaited: set[str], min_workers: int) -> list[Contribution]:
        """Returns what can be reduced now, in order: the contributions whose names come before every awaited one.

        Nothing can before `min_workers` are in: until then a worker of any name may still join the round, and what an
        update gives must not depend on who came first.
        """
        if len(self.contributions) < min_workers:
            return []
        first_awaited = min(awaited, default=None)
        ready = sorted(name for name in self.contributions if first_awaited is None or name < first_awaited)
        return [self.contributions[name] for name in ready[self.folded :]]

    def absent(self, tensor_count: int) -> frozenset[int]:
        """Returns the tensors that no contribution has a gradient for."""
        return frozenset.intersection(*(held.absent(tensor_count) for held in self.contributions.values()))


def _difference(held: tuple[Hyperparameters, ...], got: tuple[Hyperparameters, ...]) -> dict[str, object]:
    """Names the first hyperparameter in which two pushes differ, in the groups that both know; empty if none does."""
    for group, (ours, theirs) in enumerate(zip(held, got, strict=False)):
        for field_name in ("lr", "rho", "eps", "weight_decay", "maximize"):
            left, right = getattr(ours, field_name), getattr(theirs, field_name)
            if left != right:
                return {"field": f"groups[{group}].{field_name}", "round": left, "got": right}
    return {}
