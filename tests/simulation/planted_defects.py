"""Defects of the state machine, each a subclass that overrides what is wrong. The simulation must find every one."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import pytest
from histories import SCENARIOS, Scenario
from simulator import Simulation

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.model import (
    Answer,
    Async,
    Bounded,
    BumpVersion,
    Combine,
    Contribution,
    Decision,
    Key,
    Machine,
    Policy,
    Push,
    PushResult,
    PushStatus,
    Refused,
    Session,
    Sync,
    Tensor,
    Update,
    machine,
    versioned_model,
)
from deltaserve_server.model.policies import UpdatePolicy
from deltaserve_server.model.round import PendingPush, Round
from deltaserve_server.model.sessions import Record, Sessions
from deltaserve_server.model.versioned_model import VersionedModel

_T = TypeVar("_T", bound=type)

DEFECTS: dict[str, tuple[type, Scenario]] = {}
"""By what is wrong: the class that has the defect, and the scenario that shows it soon."""

_TWO_DEADLINES = Scenario((Sync(quorum=2, grace_seconds=2.0, round_timeout_seconds=3.0),))
_MANY_CHANGES = Scenario((Sync(), Sync(reduction="median")), often=(("change", 100), ("extend", 6)))

_BUILDERS = {Session: machine, PendingPush: machine, Sessions: versioned_model, Round: versioned_model}
"""Where objects of a class are made, by its name."""


def planted(defect: str, scenario: str | Scenario) -> Callable[[_T], _T]:
    """Registers a class that has a defect."""
    chosen = SCENARIOS[scenario] if isinstance(scenario, str) else scenario

    def register(flawed: _T) -> _T:
        assert defect not in DEFECTS
        DEFECTS[defect] = flawed, chosen
        return flawed

    return register


@contextmanager
def simulation_with(defect: str) -> Iterator[Callable[[], Simulation]]:
    """Builds simulations of a machine that has a defect."""
    flawed, scenario = DEFECTS[defect]
    base = flawed.__mro__[1]
    with pytest.MonkeyPatch.context() as patch:
        if base in _BUILDERS:
            patch.setattr(_BUILDERS[base], base.__name__, flawed)
        if issubclass(base, UpdatePolicy):
            scenario = replace(scenario, policies=tuple(_flawed(flawed, policy) for policy in scenario.policies))
        yield lambda: Simulation(scenario, machine=flawed if base is Machine else Machine)


def _flawed(flawed: type, policy: Policy) -> Any:
    if type(policy) is not flawed.__mro__[1]:
        return policy
    return flawed(**{field.name: getattr(policy, field.name) for field in fields(policy)})


# --- exactly once


@planted("a duplicate is applied again", "async")
class DuplicateApplied(Session):
    def known(self, push: Push) -> bool:
        return super().known(push) and push.sequence < self.last_accepted


@planted("a number may be left out", "async")
class GapAccepted(Session):
    def known(self, push: Push) -> bool:
        return push.sequence == self.last_accepted + 2 or super().known(push)


@planted("other values under a used number are a duplicate", "async")
class ValuesIgnored(Session):
    def known(self, push: Push) -> bool:
        return super().known(replace(push, fingerprint=None))


@planted("values are compared beyond the last 8", "async")
class WindowTooLong(Session):
    def known(self, push: Push) -> bool:
        if push.sequence == self.last_accepted - 8 and push.fingerprint != 2 * push.sequence:
            raise Refused("SEQUENCE_REUSED", sequence=push.sequence)
        return super().known(push)


@planted("results are kept of the last 7", "async")
class WindowTooShort(Session):
    def _in_window(self, sequence: int) -> Record | None:
        return super()._in_window(sequence) if sequence > self.last_accepted - 7 else None


@planted("a push that was given up keeps its number", "sync, round_timeout")
class NumberKept(Session):
    def give_up(self, sequence: int, now: float) -> None:
        super().give_up(sequence, now)
        self.last_accepted = sequence


@planted("the last 8 forget a push for one that is given up", "sync, round_timeout")
class WindowMovedEarly(Session):
    def accept(self, sequence: int, fingerprint: int | None) -> None:
        super().accept(sequence, fingerprint)
        self.window.pop(sequence - 8, None)


@planted("a fenced session goes on", "async")
class NotFenced(Sessions):
    def add(self, session: Session) -> None:
        self._by_name.pop(session.worker, None)
        super().add(session)


@planted("an epoch is used twice", "async")
class EpochUsedTwice(Sessions):
    def new_epoch(self, worker: str) -> int:
        self.epochs[worker] = min(super().new_epoch(worker), 2)
        return self.epochs[worker]


@planted("a rank is given twice", "async")
class RankGivenTwice(Sessions):
    def free_rank(self) -> int:
        return 0


# --- leases


@planted("a lease runs out late", "async")
class LeaseTooLong(Session):
    def expired(self, now: float) -> bool:
        return now > self.expires


@planted("a call does not renew the lease", "async")
class LeaseNotRenewed(Session):
    def renew(self, now: float) -> None:
        pass


@planted("the lease does not start anew when a round closes", "sync")
class LeaseNotRenewedByUpdate(Session):
    def apply(self, sequence: int, result: PushResult, now: float) -> None:
        expires = self.expires
        super().apply(sequence, result, now)
        self.expires = expires


# --- when a round closes


@planted("a quorum is one too few", "sync, quorum")
class QuorumTooSmall(Sync):
    def _deadlines(self, arrivals: list[float]) -> list[float]:
        one_short = 0 < len(arrivals) == (self.quorum or 0) - 1
        return [*([arrivals[-1] + self.grace_seconds] if one_short else []), *super()._deadlines(arrivals)]


@planted("a quorum is one too many", "sync, quorum")
class QuorumTooLarge(Sync):
    def _deadlines(self, arrivals: list[float]) -> list[float]:
        deadlines = super()._deadlines(arrivals)
        return deadlines[1:] if len(arrivals) == self.quorum else deadlines


@planted("grace counts from the first push", "sync, quorum")
class GraceFromFirst(Sync):
    def _deadlines(self, arrivals: list[float]) -> list[float]:
        if self.quorum is None or len(arrivals) < self.quorum:
            return super()._deadlines(arrivals)
        return [arrivals[0] + self.grace_seconds, *super()._deadlines(arrivals)[1:]]


@planted("a timeout counts from the last push", "sync, round_timeout")
class TimeoutFromLast(Sync):
    def _deadlines(self, arrivals: list[float]) -> list[float]:
        deadlines = super()._deadlines(arrivals)
        if self.round_timeout_seconds is not None and arrivals:
            deadlines[-1] = arrivals[-1] + self.round_timeout_seconds
        return deadlines


@planted("the later of two times counts", _TWO_DEADLINES)
class LaterDeadline(Sync):
    def due(self, model: VersionedModel) -> float | None:
        return max(self._deadlines(model.round.arrivals), default=None)


@planted("a round closes a moment late", "sync, quorum")
class ClosedLate(Sync):
    def _time_is_up(self, model: VersionedModel, now: float) -> bool:
        due = self.due(model)
        return due is not None and now > due


@planted("min_workers is one too few", "sync, min_workers")
class MinWorkersTooFew(Sync):
    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        one_short = 0 < len(model.round.pushes) == self.min_workers - 1
        if one_short and (self._time_is_up(model, now) or not self._awaited(model)):
            return self._close(model, now)
        return super().advance(model, now)


@planted("a round is closed below min_workers when time is up", "sync, round_timeout")
class ClosedBelowMinWorkers(Sync):
    def _fail(self, model: VersionedModel, now: float) -> list[Decision]:
        return self._close(model, now)


@planted("a round that fails is kept", "sync, round_timeout")
class FailedRoundKept(Sync):
    def _fail(self, model: VersionedModel, now: float) -> list[Decision]:
        failed, decisions = model.round, super()._fail(model, now)
        model.round = failed
        return decisions


@planted("a round that fails makes no version for late joiners", "sync, round_timeout")
class NoVersionAfterFailure(Sync):
    def _fail(self, model: VersionedModel, now: float) -> list[Decision]:
        version, decisions = model.version, super()._fail(model, now)
        model.version = version
        return [decision for decision in decisions if not isinstance(decision, BumpVersion)]


# --- who belongs to a round


@planted("a push of a closed round counts", "sync")
class OldBaseTaken(Round):
    def check(self, push: Push, base_version: int) -> None:
        super().check(push, base_version + (base_version == self.opened - 1))


@planted("hyperparameters need not agree", "sync")
class ConflictIgnored(Round):
    def check(self, push: Push, base_version: int) -> None:
        super().check(replace(push, hyperparameters=None), base_version)


@planted("the hyperparameters of the first push alone count", "any")
class FirstHyperparametersCount(Round):
    def add(self, pending: PendingPush, now: float) -> None:
        first = self.hyperparameters
        super().add(pending, now)
        self.hyperparameters = first or self.hyperparameters


@planted("a late joiner pushes for the open round", "sync")
class LateJoinerPushes(Sync):
    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        if session.waiting:
            super().check(model, session, push, base_version)
        model.round.check(push, base_version)


@planted("a session pushes twice for a round", "sync")
class PushesTwice(Sync):
    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        if not session.member:
            super().check(model, session, push, base_version)
        model.round.check(push, base_version)


@planted("a late joiner joins the open round", "sync")
class LateJoinerJoins(Sync):
    def joins(self, model: VersionedModel, worker: str) -> bool:
        return super().joins(model, worker) or worker not in model.round.pushes


@planted("nobody joins a round that lacks workers", "sync, min_workers")
class NobodyJoins(Sync):
    def joins(self, model: VersionedModel, worker: str) -> bool:
        return Sync(min_workers=0).joins(model, worker)


@planted("a successor does not take its predecessor's place", "sync")
class PlaceNotTaken(Sync):
    def joins(self, model: VersionedModel, worker: str) -> bool:
        returns = model.sessions.named(worker) is not None
        return not model.round.pushes or (not returns and super().joins(model, worker))


@planted("nobody is admitted late to a round that lacks workers", "sync, min_workers")
class NobodyAdmitted(Sync):
    def _admit_late(self, model: VersionedModel) -> list[Decision]:
        return []


@planted("a name is in a round twice", "sync, min_workers")
class NameAdmittedTwice(Sync):
    def _admit_late(self, model: VersionedModel) -> list[Decision]:
        late = model.sessions.late()
        for session in late:
            session.member = True
        return [model.bump_version()] if late else []


@planted("a late joiner is no member of the next round", "sync")
class LateJoinerForgotten(Machine):
    def open_round(self, opened: int) -> None:
        late = self.sessions.late()
        super().open_round(opened)
        for session in late:
            session.member = False


@planted("a round waits for a session that was closed", "sync")
class ClosedSessionAwaited(Machine):
    def close_session(self, session_id: bytes, epoch: int, now: float) -> list[Decision]:
        self.sessions.remove(self.sessions.get(session_id, epoch))
        return []


# --- reduction


@planted("folds are in the order of arrival", "sync")
class FoldedByArrival(Round):
    def foldable(self, awaited: Collection[str]) -> list[PendingPush]:
        ready = super().foldable(awaited)
        return [pending for pending in self.pushes.values() if pending in ready]


@planted("folds do not wait for names before them", "sync")
class FoldedTooEarly(Round):
    def foldable(self, awaited: Collection[str]) -> list[PendingPush]:
        return super().foldable(())


@planted("a push is folded twice", "sync")
class FoldedTwice(Sync):
    def _fold(self, model: VersionedModel, awaited: Collection[str]) -> list[Decision]:
        folded, decisions = model.round.folded, super()._fold(model, awaited)
        model.round.folded = folded
        return decisions


@planted("a round is folded while others may still join", "sync, min_workers")
class FoldedBelowMinWorkers(Sync):
    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        if model.round.pushes and self._awaited(model) and not self._time_is_up(model, now):
            return self._fold(model, self._awaited(model))
        return super().advance(model, now)


@planted("weights do not count", "sync")
class WeightsIgnored(Sync):
    def _factor(self, push: Push) -> float:
        return super()._factor(replace(push, weight=1.0))


@planted("a push within the bound is clipped too", "sync, robust")
class ShortPushScaled(Sync):
    def _factor(self, push: Push) -> float:
        lengthened = max(1.0, self.clip_norm / push.norm) if self.clip_norm and push.norm else 1.0
        return super()._factor(push) * lengthened


@planted("nothing is clipped", "sync, robust")
class NothingClipped(Sync):
    def _factor(self, push: Push) -> float:
        return super()._factor(replace(push, norm=0.0))


@planted("weights count in the median", "sync, robust")
class WeightedMedian(Sync):
    def _factor(self, push: Push) -> float:
        return super()._factor(push) * (1.0 if self.reduction == "mean" else push.weight)


@planted("the median drops one more", "sync, robust")
class MedianTrimsMore(Sync):
    def _close(self, model: VersionedModel, now: float) -> list[Decision]:
        reduction, *others = super()._close(model, now)
        if self.reduction == "median" and isinstance(reduction, Combine):
            reduction = replace(reduction, trim=len(reduction.pushes) // 2)
        return [reduction, *others]


@planted("contributions are in the order of arrival", "sync")
class ContributionsByArrival(Round):
    def in_order(self) -> list[PendingPush]:
        return list(self.pushes.values())


@planted("a tensor that some pushes lack is left out", "sync")
class TooManyAbsent(Machine):
    def update(
        self, pushes: Sequence[PendingPush], hyperparameters: tuple[Optimizer, ...], now: float
    ) -> tuple[Update, list[Answer]]:
        update, answers = super().update(pushes, hyperparameters, now)
        absent = frozenset[int]().union(*(pending.absent(len(self.layout.tensors)) for pending in pushes))
        return replace(update, absent=absent), answers


@planted("an update has the counts of the one before", "async")
class CountsOfBefore(Machine):
    def update(
        self, pushes: Sequence[PendingPush], hyperparameters: tuple[Optimizer, ...], now: float
    ) -> tuple[Update, list[Answer]]:
        before = self.update_counts
        update, answers = super().update(pushes, hyperparameters, now)
        return replace(update, counts=before), answers


@planted("the updates of one event have the counts of the last", "any")
class CountsOfTheLast(Machine):
    def _reconfigure(self, groups: tuple[Optimizer, ...], policy: Policy, now: float) -> list[Decision]:
        decisions = super()._reconfigure(groups, policy, now)
        return [replace(d, counts=self.update_counts) if isinstance(d, Update) else d for d in decisions]


# --- versions


@planted("a version is left out", "sync, min_workers")
class VersionLeftOut(Machine):
    def bump_version(self) -> BumpVersion:
        self.version += 1
        return super().bump_version()


@planted("staleness counts the update itself", "async")
class StalenessTooLarge(PendingPush):
    def contribution(self, version: int) -> Contribution:
        return super().contribution(version + 1)


# --- async and bounded


@planted("max_staleness is one too many", "async")
class StalenessBoundTooLarge(Async):
    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        if self.max_staleness is None or model.version - base_version != self.max_staleness + 1:
            super().check(model, session, push, base_version)


@planted("max_staleness is one too few", "async")
class StalenessBoundTooSmall(Async):
    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        if model.version - base_version == self.max_staleness:
            raise Refused("STALE_BASE", base=base_version, current=model.version, bound=self.max_staleness)
        super().check(model, session, push, base_version)


@planted("damping divides by the staleness alone", "any")
class DampedTooLittle(Async):
    def accept(self, model: VersionedModel, pending: PendingPush, now: float) -> list[Decision]:
        staleness, decisions = model.version - pending.base_version, super().accept(model, pending, now)
        for decision in decisions:
            if self.damping and staleness and isinstance(decision, Update):
                summary = decision.summary
                summary.hyperparameters = tuple(
                    replace(group, lr=group.lr * (1 + staleness) / staleness) for group in summary.hyperparameters
                )
        return decisions


@planted("damping is always on", "async")
class AlwaysDamped(Async):
    def accept(self, model: VersionedModel, pending: PendingPush, now: float) -> list[Decision]:
        return Async(max_staleness=self.max_staleness, damping=True).accept(model, pending, now)


@planted("slack is one too much", "bounded")
class SlackTooLarge(Bounded):
    def _waits(self, model: VersionedModel, session_id: bytes) -> bool:
        return Bounded(slack=self.slack + 1)._waits(model, session_id)


@planted("slack is one too little", "bounded")
class SlackTooSmall(Bounded):
    def _waits(self, model: VersionedModel, session_id: bytes) -> bool:
        return Bounded(slack=self.slack - 1)._waits(model, session_id)


@planted("a withheld answer is never given", "bounded")
class AnswerNeverGiven(Bounded):
    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        answers = super().advance(model, now)
        for answer in answers[:1]:
            assert isinstance(answer, Answer)
            model.withheld[answer.key] = answer
        return answers[1:]


@planted("a withheld answer is given too early", "bounded")
class AnswerTooEarly(Bounded):
    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        return Bounded(slack=self.slack + 1).advance(model, now)


@planted("the answer of a session that has ended is withheld for ever", "bounded")
class EndedSessionWaits(Bounded):
    def _waits(self, model: VersionedModel, session_id: bytes) -> bool:
        session = model.sessions.find_any(session_id)
        return session is not None and session.clock - model.sessions.slowest_clock() > self.slack


@planted("a worker that is too far ahead may push", "bounded")
class FarAheadPushes(Bounded):
    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        pass


@planted("a duplicate is answered before its push", "bounded")
class DuplicateAnsweredFirst(Machine):
    def push(self, push: Push, now: float) -> list[Decision]:
        if push.key not in self.withheld:
            return super().push(push, now)
        result = self.check(push, now).result(push.sequence, self.version)
        return [Answer(push.key, replace(result, duplicate=True))] if result else []


@planted("a newcomer counts from zero", "bounded")
class NewcomerFromZero(Machine):
    def open_session(self, *given: Any) -> tuple[Session, list[Decision]]:
        session, decisions = super().open_session(*given)
        session.clock = 0
        return session, decisions


# --- changes


@planted("a change does not wait for a round that is reduced in part", "sync, any")
class ChangedTooEarly(Sync):
    def may_change(self, model: VersionedModel, successor: UpdatePolicy) -> bool:
        return True


@planted("every change waits", "sync, any")
class ChangedTooLate(Sync):
    def may_change(self, model: VersionedModel, successor: UpdatePolicy) -> bool:
        return not model.round.pushes


@planted("a change that waits is forgotten", "sync, any")
class ChangeForgotten(Machine):
    def _advance(self, now: float) -> list[Decision]:
        return self.policy.advance(self, now)


@planted("a later change does not replace one that waits", "sync, any")
class ChangeNotReplaced(Machine):
    def change(self, groups: tuple[Optimizer, ...], policy: Policy, now: float) -> tuple[int, list[Decision]]:
        deferred = self.next_settings
        changed = super().change(groups, policy, now)
        self.next_settings = self.next_settings or deferred
        return changed


@planted("steps count on under another policy", "any")
class StepsCountOn(Machine):
    def _configure(self, groups: tuple[Optimizer, ...], policy: Policy) -> None:
        clocks = {session.id: session.clock for session in self.sessions.live()}
        super()._configure(groups, policy)
        for session in self.sessions.live():
            session.clock = clocks[session.id]


@planted("pushes that wait are forgotten when rounds end", "any")
class WaitingForgotten(Machine):
    def _hand_over(self, waiting: Sequence[PendingPush], late: bool, now: float) -> list[Decision]:
        return []


@planted("pushes that wait are not judged by max_staleness", "any")
class WaitingNotJudged(Machine):
    def _hand_over(self, waiting: Sequence[PendingPush], late: bool, now: float) -> list[Decision]:
        return [decision for pending in waiting for decision in self.policy.accept(self, pending, now)]


@planted("answers stay withheld under another policy", "any")
class AnswersStayWithheld(Machine):
    def _reconfigure(self, groups: tuple[Optimizer, ...], policy: Policy, now: float) -> list[Decision]:
        if isinstance(policy, Bounded):
            return super()._reconfigure(groups, policy, now)
        withheld: dict[Key, Answer] = self.withheld
        self.withheld = {}
        decisions = super()._reconfigure(groups, policy, now)
        self.withheld = withheld
        return decisions


@planted("an old base is taken by the first round", "any")
class FirstRoundTakesOldBase(Machine):
    def _configure(self, groups: tuple[Optimizer, ...], policy: Policy) -> None:
        opened = self.round.opened
        super()._configure(groups, policy)
        self.round.opened = opened


@planted("new groups are lost to a change that waits", _MANY_CHANGES)
class NewGroupsLost(Machine):
    def extend(self, tensors: Sequence[Tensor], groups: Sequence[Optimizer]) -> None:
        deferred = self.next_settings
        super().extend(tensors, groups)
        self.next_settings = deferred


# --- what became of a push


@planted("a push that waits has not arrived", "sync")
class WaitingNotAccepted(Session):
    def status(self, sequence: int, version: int, live: bool) -> PushStatus:
        status = super().status(sequence, version, live)
        return PushStatus("not accepted", final=False) if status.state == "waiting" else status


@planted("a push that never arrived may still arrive", "async")
class NeverFinal(Session):
    def status(self, sequence: int, version: int, live: bool) -> PushStatus:
        return super().status(sequence, version, live=True)


@planted("a push of an ended session is forgotten", "async")
class EndedSessionForgotten(Sessions):
    def ended_with(self, push: Push) -> Session | None:
        return None


@planted("an ended session is unknown", "async")
class EndedSessionUnknown(Sessions):
    def find_any(self, session_id: bytes) -> Session | None:
        return self.find(session_id)


# --- refusals


@planted("a refused push has its number", "async")
class RefusalTakesNumber(Machine):
    def check(self, push: Push, now: float) -> Session:
        try:
            return super().check(push, now)
        except Refused:
            session = self.sessions.find(push.session_id)
            if session and push.sequence == session.last_accepted + 1:
                session.last_accepted += 1
            raise


@planted("a refused push leaves its hyperparameters", "sync")
class RefusalLeavesHyperparameters(Round):
    def check(self, push: Push, base_version: int) -> None:
        self.hyperparameters = self.hyperparameters or push.hyperparameters
        super().check(push, base_version)
