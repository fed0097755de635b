"""The synchronous policy: the pushes of a round make one update."""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from deltaserve_server.model.decision import Combine, Decision, Fold
from deltaserve_server.model.policies.base import UpdatePolicy
from deltaserve_server.model.push import Push
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import PendingPush
from deltaserve_server.model.sessions import Session
from deltaserve_server.model.versioned_model import VersionedModel

Reduction = Literal["mean", "trimmed_mean", "median"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sync(UpdatePolicy):
    """The pushes of a round make one update; the round closes when every member has pushed, or when time is up.

    Attributes:
        min_workers: The smallest number of pushes that close a round.
        quorum: The number of pushes that start `grace_seconds`; None means that the round waits for every member.
        grace_seconds: How long the round waits for the other members once the quorum has pushed.
        round_timeout_seconds: How long a round lasts from its first push; None means no limit.
        reduction: How the pushes of a round become one gradient.
        trim: How many values "trimmed_mean" drops at either end, per element.
        clip_norm: The largest L2 norm of a push; a longer one is scaled down to it. None means no limit.
    """

    min_workers: int = 1
    quorum: int | None = None
    grace_seconds: float = 0.0
    round_timeout_seconds: float | None = None
    reduction: Reduction = "mean"
    trim: int = 0
    clip_norm: float | None = None

    # --- membership

    def joins(self, model: VersionedModel, worker: str) -> bool:
        """Returns whether a session that opens now is a member of the open round.

        It is not once others have pushed and could close the round without it: a stream of newcomers would keep the
        round open for ever, and a newcomer's name may come before names that are reduced already. There are two
        exceptions. A worker that reconnects before its push takes its own place. And a round with fewer than
        `min_workers` members needs the newcomer.
        """
        pushed, former = model.round.pushes, model.sessions.named(worker)
        if not pushed or (former and former.member and worker not in pushed):
            return True
        others = {session.worker for session in model.sessions.live() if session.member} - {worker}
        # A name has one push in a round: a worker whose former session has pushed joins the next round.
        return worker not in pushed and len(others | pushed.keys()) < self.min_workers

    def _admit_late(self, model: VersionedModel) -> list[Decision]:
        """Admits the sessions that wait for the next round, because without them this one would never close.

        `OpenSession` told them to compute on the next version, so the weights get that version now, unchanged.
        Otherwise they would wait for it for ever.
        """
        late = [session for session in model.sessions.late() if session.worker not in model.round.pushes]
        for session in late:
            session.member = True
        return [model.bump_version()] if late else []

    # --- pushes

    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        """Refuses a push that does not belong to the open round."""
        if not session.member or session.waiting:
            raise Refused("ROUND_CLOSED", base=base_version, current=model.version + 1)
        model.round.check(push, base_version)

    def accept(self, model: VersionedModel, pending: PendingPush, now: float) -> list[Decision]:
        """Adds the push to the open round."""
        model.round.add(pending, now)
        return []

    # --- closing

    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        """Closes the open round, fails it, or reduces the part of it that is complete."""
        if not model.round.pushes:
            return []
        awaited, time_is_up = self._awaited(model), self._time_is_up(model, now)
        if len(model.round.pushes) >= self.min_workers:
            # A round with enough pushes never fails, so folding some of them early is safe.
            return self._close(model, now) if time_is_up or not awaited else self._fold(model, awaited)
        if time_is_up:
            return self._fail(model, now)
        return [] if awaited else self._admit_late(model)

    def due(self, model: VersionedModel) -> float | None:
        """Returns when the open round stops waiting for its members; None means that it waits for all of them."""
        return min(self._deadlines(model.round.arrivals), default=None)

    def _deadlines(self, arrivals: list[float]) -> list[float]:
        deadlines = []
        if self.quorum is not None and len(arrivals) >= self.quorum:
            # From the push that completes the quorum: the time that stragglers are given for its sake.
            deadlines.append(arrivals[self.quorum - 1] + self.grace_seconds)
        if self.round_timeout_seconds is not None and arrivals:
            deadlines.append(arrivals[0] + self.round_timeout_seconds)
        return deadlines

    def _time_is_up(self, model: VersionedModel, now: float) -> bool:
        due = self.due(model)
        return due is not None and now >= due

    def _awaited(self, model: VersionedModel) -> set[str]:
        """Returns the workers whose push the open round lacks."""
        return {session.worker for session in model.sessions.live() if session.member and not session.waiting}

    def _close(self, model: VersionedModel, now: float) -> list[Decision]:
        """Makes the update of the open round, and opens the next."""
        pushes = model.round.in_order()
        if self.reduction == "mean":
            reduction = self._fold(model, ())
        else:
            # A robust reduction needs all values of an element at once. A median keeps the one or two in the middle.
            trim = (len(pushes) - 1) // 2 if self.reduction == "median" else self.trim
            reduction = [Combine(tuple((pending.push.key, self._factor(pending.push)) for pending in pushes), trim)]
        update, answers = model.update(pushes, model.hyperparameters(model.round.hyperparameters), now)
        model.open_round(model.version)
        return [*reduction, update, *answers]

    def _fail(self, model: VersionedModel, now: float) -> list[Decision]:
        """Gives up the pushes of a round that has too few of them when its time is up.

        None of them is reduced yet, so the next round begins on the same weights. Sessions that wait for the next
        round were told to compute on the next version; where there are any, the weights get that version.
        """
        refusal = Refused("ROUND_FAILED", got=len(model.round.pushes), need=self.min_workers)
        bump: list[Decision] = [model.bump_version()] if model.sessions.late() else []
        refusals = [model.give_up(pending, refusal, now) for pending in model.round.in_order()]
        model.open_round(model.round.opened)
        return [*bump, *refusals]

    # --- reduction

    def _fold(self, model: VersionedModel, awaited: Collection[str]) -> list[Decision]:
        """Adds the pushes that precede every awaited name to the sum, so that the server holds fewer gradients.

        Sums of floats depend on their order, so pushes are added in the order of worker names and never of arrival:
        the same pushes give the same bits. Nothing is added before `min_workers` have pushed, because until then a
        worker of any name may still join the round.
        """
        if self.reduction != "mean":
            return []
        ready = model.round.foldable(awaited)
        model.round.folded += len(ready)
        return [Fold(pending.push.key, self._factor(pending.push)) for pending in ready]

    def _factor(self, push: Push) -> float:
        """Returns what the values of a push are multiplied by: its weight, after clipping.

        Robust reductions ignore weights: a single liar could claim any weight for itself.
        """
        factor = push.weight if self.reduction == "mean" else 1.0
        if self.clip_norm is not None and push.norm > self.clip_norm:
            factor *= self.clip_norm / push.norm
        return max(factor, sys.float_info.min)  # a tiny clip_norm may round to 0, and a factor must be positive

    # --- changes and recovery

    def may_change(self, model: VersionedModel, successor: UpdatePolicy) -> bool:
        """Returns whether the successor can close the open round.

        Where a part of the round is reduced, the rest must be reduced in the same way.
        """
        if not model.round.folded:
            return True
        return (
            isinstance(successor, Sync)
            and (successor.reduction, successor.trim, successor.clip_norm)
            == (self.reduction, self.trim, self.clip_norm)
            and successor.min_workers <= len(model.round.pushes)
        )

    def replay_update(self, model: VersionedModel, sessions: object) -> None:
        """Opens the round that followed the update."""
        model.open_round(model.version)
