"""The decisions of a simulated machine so far, and the invariants that they must keep."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from reference import Answered, GivenUp, Said, Updated, VersionBumped, Worker

from deltaserve_server.model import (
    Answer,
    Async,
    Bounded,
    BumpVersion,
    Combine,
    Decision,
    Fold,
    Key,
    Policy,
    Refuse,
    Sync,
    Update,
    UpdateSummary,
)


class Violation(Exception):
    """The machine broke a rule."""


@dataclass
class Totals:
    """Counts of one or several simulations."""

    events: int = 0
    updates: int = 0
    pushes: int = 0
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Totals") -> None:
        self.events += other.events
        self.updates += other.updates
        self.pushes += other.pushes
        self.refusals += other.refusals


class Ledger:
    """Follows every push from its acceptance to its answer, and every version.

    Attributes:
        totals: Counts of events.
        version: Updates, version bumps and replaced states so far.
        judged_by: The policy under which the current event makes updates.
        workers: Workers by name and epoch.
        present: Sessions whose call waits for an answer.
        accepted: Pushes that were accepted and not given up.
        applied: Accepted pushes that became part of an update, with that update.
        unanswered: Accepted pushes without an answer.
    """

    def __init__(self, policy: Policy) -> None:
        self.totals = Totals()
        self.version = 0
        self.judged_by = policy
        self.workers: dict[tuple[str, int], Worker] = {}
        self.present: set[bytes] = set()
        self.accepted: set[Key] = set()
        self.applied: dict[Key, UpdateSummary] = {}
        self.unanswered: set[Key] = set()
        self._reduced: list[tuple[Key, float]] = []
        self._trim: int | None = None
        self._closed = 0
        self._most_slack = policy.slack if isinstance(policy, Bounded) else 0
        self._takes: dict[type, Callable[[Any, Iterator[Said]], None]] = {
            Fold: self._folded,
            Combine: self._combined,
            Update: self._updated,
            Answer: self._answered,
            BumpVersion: self._version_bumped,
            Refuse: self._given_up,
        }

    def take_in(self, key: Key) -> None:
        """Records that a push was accepted."""
        self.totals.pushes += 1
        if key in self.accepted:
            raise Violation("a push is accepted twice")
        self.accepted.add(key)
        self.unanswered.add(key)

    def follow(self, decisions: list[Decision], said: list[Said]) -> None:
        """Compares the decisions of an event with those of the reference, and records them."""
        should = iter(said)
        for decision in decisions:
            self._takes[type(decision)](decision, should)
        missing = next(should, None)
        if missing is not None:
            raise Violation(f"missing: {missing}")

    def check_all_settled(self, policy: Policy) -> None:
        """Checks, long after all sessions have ended, that every push is answered unless its round has no timeout."""
        waits_for_ever = isinstance(policy, Sync) and policy.round_timeout_seconds is None
        too_few = isinstance(policy, Sync) and len(self.unanswered) < policy.min_workers
        if self.unanswered and not (waits_for_ever and too_few):
            raise Violation(f"{len(self.unanswered)} pushes are never answered")
        if self.accepted != self.applied.keys() | self.unanswered or self.applied.keys() & self.unanswered:
            raise Violation("an accepted push is neither applied nor given up nor waiting")

    def change(self, before: Policy, after: Policy) -> None:
        """Records a change of policy."""
        if isinstance(after, Sync) and not isinstance(before, Sync):
            self._closed = self.version
        if isinstance(after, Bounded):
            self._most_slack = max(after.slack, self._most_slack if isinstance(before, Bounded) else 0)

    def check_slack(self, worker: Worker, slowest: int) -> None:
        """Checks a step that a worker has just made under `Bounded`."""
        if worker.live and worker.steps > slowest + self._most_slack + 1:
            raise Violation("a worker went on that is too far ahead")

    # --- decisions

    def _folded(self, fold: Fold, should: Iterator[Said]) -> None:
        if self._trim is not None:
            raise Violation("folded into a gradient that is not a sum")
        self._reduced.append((fold.key, fold.factor))

    def _combined(self, combine: Combine, should: Iterator[Said]) -> None:
        if self._reduced or not 0 <= 2 * combine.trim < len(combine.pushes):
            raise Violation("combined with a sum, or too much left out")
        self._reduced, self._trim = list(combine.pushes), combine.trim

    def _version_bumped(self, bump: BumpVersion, should: Iterator[Said]) -> None:
        self.version += 1
        if next(should, None) != VersionBumped(bump.version) or bump.version != self.version:
            raise Violation(f"unexpected: {bump}")

    def _given_up(self, refuse: Refuse, should: Iterator[Said]) -> None:
        key, refusal = refuse.key, refuse.refusal
        if next(should, None) != GivenUp(key, refusal.reason, refusal.metadata):
            raise Violation(f"unexpected: {refuse}")
        if key not in self.unanswered or key in self.applied:
            raise Violation("given up, but did not wait")
        self.totals.refusals[refusal.reason] += 1
        self.unanswered.remove(key)
        self.accepted.remove(key)
        self.present.discard(key[0])

    def _updated(self, update: Update, should: Iterator[Said]) -> None:
        summary = update.summary
        self.totals.updates += 1
        self.version += 1
        if summary.version != self.version:
            raise Violation(f"version {summary.version} after {self.version - 1}")
        self._check_reduced(summary)
        self._check_bounds(summary)
        self._check_expected(update, next(should, None))
        self._reduced, self._trim = [], None

    def _check_reduced(self, summary: UpdateSummary) -> None:
        """Checks that the pushes of an update were reduced just before it, in order and for the first time."""
        keys = [
            (self.workers[contribution.worker, contribution.epoch].id, contribution.sequence)
            for contribution in summary.contributions
        ]
        if keys != [key for key, _ in self._reduced] or not keys:
            raise Violation("an update is not preceded by the reduction of its pushes in their order")
        if any(left.worker >= right.worker for left, right in pairwise(summary.contributions)):
            raise Violation("the pushes of an update are not in order of names")
        for key in keys:
            if key not in self.accepted or key in self.applied:
                raise Violation("a push is applied that was not accepted, or was applied before")
            self.applied[key] = summary

    def _check_expected(self, update: Update, should: Said | None) -> None:
        if not isinstance(should, Updated):
            raise Violation(f"unexpected: {update}, expected {should}")
        summary, parts = update.summary, should.parts
        used = summary.hyperparameters, update.absent, update.counts
        got = summary.version, tuple(self._reduced), *used, self._trim
        if got != (should.version, tuple([part[:2] for part in parts]), *should[2:]):
            raise Violation(f"unexpected: {got}, expected {should}")
        contributions = [(s.worker, s.epoch, s.sequence, s.staleness, s.weight, s.norm) for s in summary.contributions]
        if contributions != [part[2:] for part in parts]:
            raise Violation(f"unexpected: {contributions}, expected {parts}")
        if update.weight != sum([part.weight for part in parts]):
            raise Violation("another divisor than the weights of the pushes")

    def _check_bounds(self, summary: UpdateSummary) -> None:
        """Checks that no push of a closed round counts, and none that is too stale."""
        policy, before = self.judged_by, summary.version - 1
        for contribution in summary.contributions:
            if contribution.staleness < 0:
                raise Violation("a push on weights that there were not yet")
            if isinstance(policy, Sync) and before - contribution.staleness < self._closed:
                raise Violation("a push of a closed round counts")
            bound = policy.max_staleness if isinstance(policy, Async) else None
            if bound is not None and contribution.staleness > bound:
                raise Violation("a push is staler than allowed")
        if isinstance(policy, Sync):
            if len(summary.contributions) < policy.min_workers:
                raise Violation("an update of fewer pushes than min_workers")
            self._closed = summary.version

    def _answered(self, answer: Answer, said: Iterator[Said]) -> None:
        key, result = answer.key, answer.result
        should = next(said, None)
        if Answered(key, result.version, result.duplicate, result.summary is not None) != should:
            raise Violation(f"unexpected: {answer}, expected {should}")
        if key not in self.applied or (key in self.unanswered) == result.duplicate:
            raise Violation("an answer of a push that was not applied, or a second one")
        self.unanswered.discard(key)
        self.present.discard(key[0])
        contribution = result.contribution
        if contribution is None or result.summary is None:
            return
        worker = self.workers[contribution.worker, contribution.epoch]
        if result.summary is not self.applied[key] or contribution not in result.summary.contributions:
            raise Violation("the answer of another update")
        if (worker.id, contribution.sequence) != key:
            raise Violation("the answer of another push")
