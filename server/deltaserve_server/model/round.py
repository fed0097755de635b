"""A round: the pushes that wait to become one update together."""

from collections.abc import Collection
from dataclasses import dataclass, field

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.model.difference import first_difference
from deltaserve_server.model.push import Contribution, Push
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.sessions import Session


@dataclass(frozen=True, slots=True)
class PendingPush:
    """An accepted push that is not part of an update yet.

    Attributes:
        session: The session that sent it.
        push: The push.
        base_version: Version of the weights that its gradient was computed on.
    """

    session: Session
    push: Push
    base_version: int

    def absent(self, tensor_count: int) -> frozenset[int]:
        """Returns the tensors that it has no gradient for: left out by the worker, or unknown to its session."""
        return self.push.absent.union(range(self.session.tensor_count, tensor_count))

    def contribution(self, version: int) -> Contribution:
        """Returns what the push contributes to an update of the weights of `version`."""
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
    """The open round of the synchronous policy. Under the other policies it stays empty.

    Attributes:
        opened: Version at which it began; a push with an older base is refused.
        pushes: Its pushes by worker name. A name has at most one, whatever sessions it had.
        hyperparameters: By group, as its pushes carry them; None while no push carries any.
        folded: How many pushes, in the order of worker names, are part of the sum already.
        arrivals: When each push came, in seconds, in the order of arrival.
    """

    opened: int
    pushes: dict[str, PendingPush] = field(default_factory=dict)
    hyperparameters: tuple[Optimizer, ...] | None = None
    folded: int = 0
    arrivals: list[float] = field(default_factory=list)

    def check(self, push: Push, base_version: int) -> None:
        """Checks that a push fits into this round.

        Raises:
            Refused: ROUND_CLOSED for a base before the round; HYPERPARAMETER_CONFLICT for hyperparameters other than
                those of its pushes.
        """
        if base_version < self.opened:
            raise Refused("ROUND_CLOSED", base=base_version, current=self.opened)
        # Only the groups that both pushes know can conflict.
        both = zip(self.hyperparameters or (), push.hyperparameters or (), strict=False)
        for group, (in_round, got) in enumerate(both):
            if difference := first_difference(in_round, got):
                name, expected, value = difference
                raise Refused("HYPERPARAMETER_CONFLICT", field=f"groups[{group}].{name}", round=expected, got=value)

    def add(self, pending: PendingPush, now: float) -> None:
        """Adds a push."""
        self.pushes[pending.session.worker] = pending
        self.arrivals.append(now)
        carried = pending.push.hyperparameters
        # The groups that two pushes share agree; the worker that knows more groups has the last word on the others.
        if carried and len(carried) > len(self.hyperparameters or ()):
            self.hyperparameters = carried

    def foldable(self, awaited: Collection[str]) -> list[PendingPush]:
        """Returns, in the order of worker names, the pushes that can join the sum now.

        These are the pushes whose names come before every awaited name and that are not in the sum yet.
        """
        first_awaited = min(awaited, default=None)
        ready = sorted(name for name in self.pushes if first_awaited is None or name < first_awaited)
        # Those in the sum are the first `folded` of them: nobody joins before a name that is folded.
        return [self.pushes[name] for name in ready[self.folded :]]

    def in_order(self) -> list[PendingPush]:
        """Returns the pushes in the order of worker names."""
        return [self.pushes[name] for name in sorted(self.pushes)]
