"""The state machine of one model: events go in, decisions come out."""

from collections.abc import Sequence
from dataclasses import replace

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.model.decision import Answer, Decision
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.policies import Policy
from deltaserve_server.model.push import Push, PushResult, PushStatus, UpdateSummary
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import PendingPush
from deltaserve_server.model.sessions import Session
from deltaserve_server.model.versioned_model import VersionedModel

Settings = tuple[tuple[Optimizer, ...], Policy]
"""Hyperparameters by group, and the policy."""


class Machine(VersionedModel):
    """Decides what becomes of every push, session and change of settings of one model.

    Each event is a method call. It checks the event, changes the state, and returns decisions for the engine to carry
    out in order. A method that raises Refused has changed nothing but the lease of the session that called. The machine
    never sees a gradient and never reads a clock: `now` is in seconds of a monotonic clock, and the same events with
    the same times give the same decisions. That is what lets a simulator test it and a journal replay it.

    Exactly once: a session numbers its pushes 1, 2, 3, ... without gaps, and the machine accepts each number once. A
    push that arrives again gets the result of the first, from a window of the last 8 results. The numbers and the
    window are part of the same state as the version, so no crash can separate the two.

    Fencing: a worker name has one live session. Opening another one ends the former and raises the name's epoch, so a
    worker that was cut off cannot push beside its own replacement.

    When an accepted push becomes an update is up to the policy: see `policies`.

    Attributes:
        policy: When a push becomes an update.
        initial_settings: Hyperparameters and policy that CreateModel asked for, and ExtendModel for its groups.
        earlier_sizes: Number of tensors and of groups before each extension.
        next_settings: Hyperparameters and policy that take effect when the open round closes; None means no change.
    """

    def __init__(self, name: str, layout: Layout, groups: Sequence[Optimizer], policy: Policy) -> None:
        super().__init__(name, layout, groups)
        self.policy = policy
        self.initial_settings: Settings = self.groups, policy
        self.earlier_sizes: set[tuple[int, int]] = set()
        self.next_settings: Settings | None = None

    # --- sessions

    def open_session(
        self,
        worker: str,
        session_id: bytes,
        lease_seconds: float,
        now: float,
        tensor_count: int | None = None,
        group_count: int | None = None,
    ) -> tuple[Session, list[Decision]]:
        """Opens a session for a worker. An older session of the same name is fenced.

        Args:
            worker: The worker's name.
            session_id: A new id, 16 bytes.
            lease_seconds: How long the session outlives its last call.
            now: The time, in seconds of a monotonic clock.
            tensor_count: How many tensors of the layout the worker knows; None means all.
            group_count: How many parameter groups the worker knows; None means all.

        Raises:
            Refused: PUSH_INVALID for more tensors or groups than there are.
        """
        tensor_count = _checked_count("tensor_count", tensor_count, len(self.layout.tensors))
        group_count = _checked_count("group_count", group_count, len(self.groups))
        decisions = self._advance(now)  # a round whose time is up closes before anybody joins it
        former = self.sessions.named(worker)
        member = self.policy.joins(self, worker)
        session = Session(
            worker=worker,
            id=session_id,
            epoch=self.sessions.new_epoch(worker),
            # A worker that comes back keeps its rank, and with it its part of the data.
            rank=former.rank if former else self.sessions.free_rank(),
            tensor_count=tensor_count,
            group_count=group_count,
            lease_seconds=lease_seconds,
            expires=now + lease_seconds,
            first_version=self.version if member else self.version + 1,
            member=member,
            clock=self.sessions.slowest_clock(),  # a newcomer at 0 would hold up everybody else under `Bounded`
        )
        self.sessions.add(session)
        return session, [*decisions, *self._advance(now)]

    def keep_session(self, session_id: bytes, epoch: int, now: float) -> Session:
        """Renews the lease of a session and returns it.

        Raises:
            Refused: SESSION_UNKNOWN, SESSION_FENCED, or PUSH_INVALID for another epoch.
        """
        session = self.sessions.get(session_id, epoch)
        session.renew(now)
        return session

    def close_session(self, session_id: bytes, epoch: int, now: float) -> list[Decision]:
        """Ends a session. A push of it that waits for its round still counts.

        Raises:
            Refused: SESSION_UNKNOWN, SESSION_FENCED, or PUSH_INVALID for another epoch.
        """
        self.sessions.remove(self.sessions.get(session_id, epoch))
        return self._advance(now)

    def renew(self, session_id: bytes, now: float) -> None:
        """Renews the lease of a session, if it is live, because a call of it is still waiting."""
        session = self.sessions.find(session_id)
        if session:
            session.renew(now)

    # --- time

    def tick(self, now: float) -> tuple[list[Session], list[Decision]]:
        """Ends the sessions whose lease has run out, and decides what follows from that and from the time."""
        expired = [session for session in self.sessions.live() if session.expired(now)]
        for session in expired:
            self.sessions.remove(session)
        return expired, self._advance(now)

    def due(self) -> float | None:
        """Returns when the open round needs a `tick`; None means that it waits for its members alone."""
        return self.policy.due(self)

    # --- pushes

    def check(self, push: Push, now: float) -> Session:
        """Checks a push before its values have arrived, renews the lease, and returns the session.

        A push that was accepted is also known once its session has ended: a worker that was away for longer than its
        lease asks in this way what became of its last push.

        Raises:
            Refused: The push would be refused whatever its values are.
        """
        session = self.sessions.ended_with(push) or self.keep_session(push.session_id, push.epoch, now)
        # A duplicate passes in any state: it was judged when it was new, and the worker needs its result.
        if session.known(push):
            return session
        base = self._base_version(push)
        if base > self.version:
            raise Refused("PUSH_INVALID", field="base_version", allowed=f"at most {self.version}, the current version")
        if push.hyperparameters is not None and len(push.hyperparameters) != session.group_count:
            raise Refused("HYPERPARAMETER_INVALID", field="hyperparameters", allowed=f"{session.group_count} groups")
        self.policy.check(self, session, push, base)
        return session

    def push(self, push: Push, now: float) -> list[Decision]:
        """Accepts a push whose values have arrived. Its Answer is among the decisions of this event or of a later one.

        Raises:
            Refused: The push is not accepted.
        """
        # The check is made again, because much can happen while the values of a large push arrive.
        session = self.check(push, now)
        if session.known(push):
            # A duplicate of a push that is still to be answered gets the same answer, later.
            result = None if push.key in self.withheld else session.result(push.sequence, self.version)
            return [Answer(push.key, replace(result, duplicate=True))] if result else []
        # Before the policy acts, because it may apply the push at once.
        session.accept(push.sequence, push.fingerprint)
        pending = PendingPush(session, push, self._base_version(push))
        decisions = self.policy.accept(self, pending, now)
        return [*decisions, *self._advance(now)]

    def push_status(self, session_id: bytes, sequence: int) -> PushStatus:
        """Returns what became of a push of a session that is live, or that the history still has.

        Raises:
            Refused: SESSION_UNKNOWN, or PUSH_INVALID for a sequence number below 1.
        """
        if sequence < 1:
            raise Refused("PUSH_INVALID", field="sequence", allowed=">= 1")
        session = self.sessions.find_any(session_id)
        if session is None:
            raise Refused("SESSION_UNKNOWN")
        return session.status(sequence, self.version, live=self.sessions.find(session_id) is not None)

    def _base_version(self, push: Push) -> int:
        return self.version if push.base_version is None else push.base_version

    def _advance(self, now: float) -> list[Decision]:
        """Lets the policy act. Every event ends with this."""
        opened = self.round.opened
        decisions = self.policy.advance(self, now)
        # An update opens the next round at a higher version. A round that failed starts again at its own.
        if self.next_settings and self.round.opened > opened:
            (groups, policy), self.next_settings = self.next_settings, None
            decisions += self._reconfigure(groups, policy, now)
        return decisions

    # --- the whole state

    def put_state(self, update_counts: Sequence[int]) -> None:
        """Records that weights and optimizer state were replaced, which makes a version."""
        self.update_counts = tuple(update_counts)
        self.version += 1  # the open round goes on: its pushes are one version staler, and still gradients

    def extend(self, tensors: Sequence[Tensor], groups: Sequence[Optimizer]) -> None:
        """Adds tensors and groups at the end of the layout. Sessions that do not know them go on without."""
        # A worker that starts later creates the model in an earlier size, then extends it as others have done.
        self.earlier_sizes.add((len(self.layout.tensors), len(self.groups)))
        self.layout = self.layout.extended(tensors)
        self.groups = (*self.groups, *groups)
        self.initial_settings = (*self.initial_settings[0], *groups), self.initial_settings[1]
        if self.next_settings:
            self.next_settings = (*self.next_settings[0], *groups), self.next_settings[1]
        self.update_counts += (0,) * len(tensors)

    # --- settings

    def configuration(self) -> Settings:
        """Returns hyperparameters and policy as they are, or as they will be once the open round has closed."""
        return self.next_settings or (self.groups, self.policy)

    def change(self, groups: tuple[Optimizer, ...], policy: Policy, now: float) -> tuple[int, list[Decision]]:
        """Changes hyperparameters and policy.

        The change counts from the next update on. It waits for the update after that where a part of the open round is
        reduced and the new policy would reduce the rest in another way.

        Returns:
            The first version that is made with the change in place, and the decisions.
        """
        if not self.policy.may_change(self, policy):
            self.next_settings = groups, policy
            return self.version + 2, []
        self.next_settings = None
        first_version = self.version + 1  # `_reconfigure` may make a version
        return first_version, self._reconfigure(groups, policy, now)

    def _reconfigure(self, groups: tuple[Optimizer, ...], policy: Policy, now: float) -> list[Decision]:
        """Puts settings in place and judges by them the pushes that wait."""
        decisions: list[Decision] = []
        if type(policy) is type(self.policy):
            self._configure(groups, policy)
        else:
            waiting, late = self.round.in_order(), self.sessions.late()
            decisions += self.withheld.values()  # only the policy that withholds answers knows when to give them
            self.withheld = {}
            self._configure(groups, policy)
            decisions += self._hand_over(waiting, bool(late), now)
        return [*decisions, *self._advance(now)]

    def _configure(self, groups: tuple[Optimizer, ...], policy: Policy) -> None:
        """Puts settings in place. A policy of another kind begins with an empty round and with equal clocks."""
        changes_kind = type(policy) is not type(self.policy)
        self.groups, self.policy = groups, policy
        if changes_kind:
            # No base from before may enter the first round, and no step from before may count as a lead.
            self.open_round(self.version)
            for session in self.sessions.live():
                session.clock = 0

    def _hand_over(self, waiting: Sequence[PendingPush], late: bool, now: float) -> list[Decision]:
        """Gives the pushes of a round that ends without an update to the policy that follows.

        Each becomes an update of its own, or is given up where the new policy would not take it. Sessions that came too
        late for the round were told to compute on the next version; where there are any, a version is made in any case.
        """
        before, decisions = self.version, list[Decision]()
        for pending in waiting:
            try:
                self.policy.check(self, pending.session, pending.push, pending.base_version)
            except Refused as refusal:
                decisions.append(self.give_up(pending, refusal, now))
            else:
                decisions += self.policy.accept(self, pending, now)
        if late and self.version == before:
            decisions.append(self.bump_version())
        return decisions

    # --- recovery

    def replay_update(
        self, summary: UpdateSummary, absent: frozenset[int], sources: Sequence[tuple[bytes, int | None]], now: float
    ) -> None:
        """Repeats an update that the journal holds; see `Update` for `absent` and `sources`.

        Afterwards `update_counts` are those of this update: `Layout.ranges` needs them to repeat it on the vectors.
        """
        self.count_update(summary.version, absent)
        sessions = []
        for contribution, (session_id, fingerprint) in zip(summary.contributions, sources, strict=True):
            session = self.sessions.find_any(session_id)
            if session:  # None if it ended so long ago that it is forgotten
                result = PushResult(version=summary.version, contribution=contribution, summary=summary)
                session.accept(contribution.sequence, fingerprint)
                session.apply(contribution.sequence, result, now)
                sessions.append(session)
        self.policy.replay_update(self, sessions)
        if self.next_settings:
            (groups, policy), self.next_settings = self.next_settings, None
            self._configure(groups, policy)

    def replay_change(self, groups: tuple[Optimizer, ...], policy: Policy, deferred: bool) -> None:
        """Repeats a change of settings that the journal holds; `deferred` until the round of that time closed."""
        self.next_settings = (groups, policy) if deferred else None
        if not deferred:
            self._configure(groups, policy)

    def replay_version_bump(self, version: int) -> None:
        """Repeats a version bump that the journal holds."""
        self.version = version
        self.open_round(self.round.opened)

    def resume(self, now: float) -> bool:
        """Prepares for the first event after a restart.

        Leases begin anew. Pushes that waited for a round are gone: nobody was told that they count, so their workers
        send them again, and every live session is a member of an empty round.

        Returns:
            Whether this made a version. It does where sessions had come too late for the lost round: they were told to
            compute on the next version, which that round would have made.
        """
        # The server was away, not the workers.
        for session in self.sessions.live():
            session.expires = now + session.lease_seconds
        self.policy.resume(self)
        late = any(session.first_version > self.version for session in self.sessions.late())
        self.open_round(self.round.opened)
        self.version += late
        return late

    def lose_sessions(self) -> None:
        """Ends all sessions, because they may know versions of the model that are lost."""
        live = self.sessions.live()
        for session in live:
            # None of them leaves the history: each worker asks it what became of its last push.
            self.sessions.remove(session, len(self.sessions.ended) + len(live))


def _checked_count(field: str, count: int | None, total: int) -> int:
    if count is None:
        return total
    if not 1 <= count <= total:
        raise Refused("PUSH_INVALID", field=field, allowed=f"1 to {total}")
    return count
