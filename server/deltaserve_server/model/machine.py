"""The state machine of one model: events in, decisions out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.decision import Answer, BumpVersion, Combine, Decision, Fold, Refuse, Update
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.policy import Async, Bounded, Policy, Sync, reduces_alike
from deltaserve_server.model.push import Key, Push, PushResult, PushStatus, UpdateSummary
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import PendingPush, Round, factor, trim
from deltaserve_server.model.sessions import Session, Sessions

_RETRY_SECONDS = 0.1


class Machine:
    """All of a model's state but its vectors.

    Every method that takes `now` takes seconds of a monotonic clock. A method that raises Refused has changed nothing.

    Attributes:
        name: The model's name.
        layout: Its tensors.
        groups: Its hyperparameters by parameter group.
        policy: When a push becomes an update.
        created_as: Groups and policy as they were asked for when it was created, or extended.
        version: How many updates it has had, and replacements of the whole state, and see `Renumber`.
        update_counts: By tensor: how many updates its optimizer state has had.
        sessions: Its workers.
        shorter: How many tensors and groups it had before each extension.
        round: The open round, under `Sync`.
        next: Groups and policy that take effect when it closes, if others are to.
    """

    def __init__(self, name: str, layout: Layout, groups: Sequence[Hyperparameters], policy: Policy) -> None:
        self.name = name
        self.layout = layout
        self.groups = tuple(groups)
        self.policy = policy
        self.created_as = self.groups, policy
        self.version = 0
        self.update_counts = [0] * len(layout.tensors)
        self.sessions = Sessions()
        self.shorter: set[tuple[int, int]] = set()
        self.round = Round(opened=0)
        self._held: dict[Key, tuple[Session, PushResult]] = {}
        self.next: tuple[tuple[Hyperparameters, ...], Policy] | None = None

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
        """Gives a worker a standing; an older session of its name is fenced.

        Args:
            worker: Its name.
            session_id: A new id, 16 bytes.
            lease_seconds: How long the session outlives its last call.
            now: The time.
            tensor_count: How many tensors the worker knows; None means all.
            group_count: How many groups the worker knows; None means all.

        Raises:
            Refused: PUSH_INVALID for more than there are.
        """
        tensor_count = _known("tensor_count", tensor_count, len(self.layout.tensors))
        group_count = _known("group_count", group_count, len(self.groups))
        decisions = self._advance(now)  # a round whose time is up is not joined any more
        older = self.sessions.named(worker)
        rank = older.rank if older else self.sessions.free_rank()
        member = self._joinable(worker)
        session = Session(
            worker=worker,
            id=session_id,
            epoch=self.sessions.new_epoch(worker),
            rank=rank,
            tensor_count=tensor_count,
            group_count=group_count,
            lease_seconds=lease_seconds,
            expires=now + lease_seconds,
            first_version=self.version if member else self.version + 1,
            member=member,
            clock=self._slowest(),
        )
        self.sessions.add(session)
        return session, [*decisions, *self._advance(now)]

    def keep_session(self, session_id: bytes, epoch: int, now: float) -> Session:
        """Renews a lease.

        Raises:
            Refused: SESSION_UNKNOWN or SESSION_FENCED.
        """
        session = self.sessions.get(session_id, epoch)
        session.renew(now)
        return session

    def close_session(self, session_id: bytes, epoch: int, now: float) -> list[Decision]:
        """Lets a worker leave; a push of it that waits still counts.

        Raises:
            Refused: SESSION_UNKNOWN or SESSION_FENCED.
        """
        self.sessions.remove(self.sessions.get(session_id, epoch))
        return self._advance(now)

    def renew(self, session_id: bytes, now: float) -> None:
        """Renews the lease of a session whose call is still there, if it lives."""
        session = self.sessions.find(session_id)
        if session:
            session.renew(now)

    # --- time

    def tick(self, now: float) -> tuple[list[Session], list[Decision]]:
        """Ends the sessions whose lease has run out; returns them, and what follows from that and from the time."""
        gone = [session for session in self.sessions.live() if session.expired(now)]
        for session in gone:
            self.sessions.remove(session)
        return gone, self._advance(now)

    def due(self) -> float | None:
        """Returns the time at which `tick` is wanted for the open round; None while there is none."""
        return self.round.due(self.policy) if isinstance(self.policy, Sync) else None

    # --- pushes

    def check(self, push: Push, now: float) -> Session:
        """Looks at a push before its values have come, and renews the lease.

        A push that was accepted is known also when its session has ended: its answer may be lost to a worker that is
        away for longer than its lease.

        Raises:
            Refused: For whatever can be known without the values.
        """
        session = self.sessions.ended_with(push) or self.keep_session(push.session_id, push.epoch, now)
        if not session.known(push):
            self._check_new(session, push)
        return session

    def push(self, push: Push, now: float) -> list[Decision]:
        """Takes a push whose values are here. The Answer comes now, or with a later event.

        Raises:
            Refused: The push is not accepted.
        """
        session = self.check(push, now)
        if session.known(push):
            result = None if push.key in self._held else session.result(push.sequence, self.version)
            return [Answer(push.key, result)] if result else []
        contribution = PendingPush(session, push, self._base_version(push))
        session.accept(push.sequence, push.fingerprint)
        if isinstance(self.policy, Sync):
            self.round.add(contribution, now)
            return self._advance(now)
        return [*self._update_alone(contribution, now), *self._advance(now)]

    def push_status(self, session_id: bytes, sequence: int) -> PushStatus:
        """Returns what became of a push.

        Raises:
            Refused: SESSION_UNKNOWN; PUSH_INVALID for a number that no push has.
        """
        if sequence < 1:
            raise Refused("PUSH_INVALID", field="sequence", allowed=">= 1")
        return self.sessions.push_status(session_id, sequence, self.version)

    # --- the whole state

    def put_state(self, update_counts: Sequence[int]) -> None:
        """Takes note of a state put in place of the present one, which makes a version."""
        self.update_counts = list(update_counts)
        self.version += 1

    def extend(self, tensors: Sequence[Tensor], groups: Sequence[Hyperparameters]) -> None:
        """Adds tensors and groups at the end of the layout."""
        self.shorter.add((len(self.layout.tensors), len(self.groups)))
        self.layout = self.layout.extended(tensors)
        self.groups = (*self.groups, *groups)
        self.created_as = (*self.created_as[0], *groups), self.created_as[1]
        if self.next:
            self.next = (*self.next[0], *groups), self.next[1]
        self.update_counts += [0] * len(tensors)

    def configuration(self) -> tuple[tuple[Hyperparameters, ...], Policy]:
        """Returns groups and policy as they are, or will be when the open round has closed."""
        return self.next or (self.groups, self.policy)

    def change(self, groups: tuple[Hyperparameters, ...], policy: Policy, now: float) -> tuple[int, list[Decision]]:
        """Changes hyperparameters and policy, from the next update on.

        Where a part of the open round is reduced already, and the new policy would reduce it otherwise, from the one
        after.

        Args:
            groups: As many as there are.
            policy: The policy.
            now: The time.

        Returns:
            The first version that is made with the change in place, and what follows.
        """
        if self.round.folded and not reduces_alike(self.policy, policy, len(self.round.contributions)):
            self.next = groups, policy
            return self.version + 2, []
        self.next = None
        first_version = self.version + 1
        return first_version, list(self._reconfigure(groups, policy, now))

    # --- going on after a restart

    def redo(
        self, summary: UpdateSummary, absent: frozenset[int], sources: Sequence[tuple[bytes, int | None]], now: float
    ) -> None:
        """Takes note of an update that was made before a restart.

        Args:
            summary: The update.
            absent: Tensors that it left as they were.
            sources: Session id and fingerprint of each of its pushes, in the order of `summary.contributions`.
            now: The time.
        """
        self._count(summary.version, absent)
        for contribution, (session_id, fingerprint) in zip(summary.contributions, sources, strict=True):
            session = self.sessions.find_any(session_id)
            if session:
                session.accept(contribution.sequence, fingerprint)
                session.apply(
                    contribution.sequence,
                    PushResult(version=summary.version, contribution=contribution, summary=summary),
                    now,
                )
                session.clock += not isinstance(self.policy, Sync)
        if isinstance(self.policy, Sync):
            self._open_round(summary.version)
            if self.next:
                (groups, policy), self.next = self.next, None
                self._configure(groups, policy)

    def redo_change(self, groups: tuple[Hyperparameters, ...], policy: Policy, waits: bool) -> None:
        """Takes note of settings that were changed before a restart, or that `waits` for the round to close."""
        self.next = (groups, policy) if waits else None
        if not waits:
            self._configure(groups, policy)

    def redo_version(self, version: int) -> None:
        """Takes note of a version that came about without an update before a restart."""
        self.version = version
        self._open_round(self.round.opened)

    def resume(self, now: float) -> bool:
        """Goes on after a restart: leases begin anew, and whoever waited sends its push again.

        Returns:
            Whether that made a version, for those who wait for one.
        """
        for session in self.sessions.live():
            session.expires = now + session.lease_seconds
            record = session.window.get(session.last_applied)
            if isinstance(self.policy, Bounded) and record and record.result and self._too_far(session, self.policy):
                self._held[session.id, session.last_applied] = session, record.result
        # Who came too late for the round that is gone waits for the version after it.
        late = any(not s.member and s.first_version > self.version for s in self.sessions.live())
        self._open_round(self.round.opened)
        self.version += late
        return late

    def lose_sessions(self) -> None:
        """Ends all sessions: what they know of the model may be of versions that are lost."""
        for session in self.sessions.live():
            self.sessions.remove(session)

    # --- whether a push fits

    def _base_version(self, push: Push) -> int:
        return self.version if push.base_version is None else push.base_version

    def _check_new(self, session: Session, push: Push) -> None:
        base = self._base_version(push)
        if base > self.version:
            raise Refused("PUSH_INVALID", field="base_version", allowed=f"at most {self.version}, the current version")
        if push.hyperparameters is not None and len(push.hyperparameters) != session.group_count:
            raise Refused("HYPERPARAMETER_INVALID", field="hyperparameters", allowed=f"{session.group_count} groups")
        match self.policy:
            case Sync():
                if not session.member or session.waiting:
                    raise Refused("ROUND_CLOSED", base=base, current=self.version + 1)
                self.round.check(push, base)
            case Async(max_staleness=bound):
                if bound is not None and self.version - base > bound:
                    raise Refused("STALE_BASE", base=base, current=self.version, bound=bound)
            case Bounded(slack=slack):
                if (session.id, session.last_accepted) in self._held:
                    raise Refused("SLACK_EXCEEDED", _RETRY_SECONDS, ahead=session.clock - self._slowest(), slack=slack)

    # --- rounds

    def _joinable(self, worker: str) -> bool:
        """Whether a session that is opened now belongs to the open round."""
        held = self.round.contributions
        older = self.sessions.named(worker)
        if not held or (older and older.member and worker not in held):  # the latter takes its own place
            return True
        others = {session.worker for session in self.sessions.live() if session.member and session.worker != worker}
        least = self.policy.min_workers if isinstance(self.policy, Sync) else 1
        return len(others | held.keys()) < least and worker not in held

    def _advance(self, now: float) -> list[Decision]:
        """Does what the sessions, the pushes and the time now allow."""
        if not isinstance(self.policy, Sync):
            return self._release()
        if not self.round.contributions:
            return []
        awaited = {s.worker for s in self.sessions.live() if s.member and not s.waiting}
        due = self.round.due(self.policy)
        time_is_up = due is not None and now >= due
        if self.round.enough(self.policy):
            return self._close_round(now) if time_is_up or not awaited else self._fold(self.policy, awaited)
        if time_is_up:
            return self._fail_round(self.policy, now)
        return [] if awaited else self._take_in()

    def _fold(self, policy: Sync, awaited: set[str]) -> list[Decision]:
        """Reduces what can be reduced before the round closes, so that fewer pushes are held.

        Not before `min_workers` are in: until then a worker of any name may still join the round, and what an update
        gives must not depend on who came first.
        """
        if policy.reduction != "mean":
            return []
        ready = self.round.foldable(awaited)
        self.round.folded += len(ready)
        return [Fold(held.push.key, factor(held.push, policy)) for held in ready]

    def _take_in(self) -> list[Decision]:
        """Takes those who wait for the next round into this one, which lacks workers and would never close without.

        They were told to start from the next version, so there is one, of the same weights.
        """
        late = [session for session in self.sessions.live() if not session.member]
        late = [session for session in late if session.worker not in self.round.contributions]
        if not late:
            return []
        for session in late:
            session.member = True
        return [self._bump_version()]

    def _bump_version(self) -> BumpVersion:
        self.version += 1
        return BumpVersion(self.version)

    def _close_round(self, now: float) -> list[Decision]:
        """Makes the update of the open round, and opens the next."""
        assert isinstance(self.policy, Sync)
        decisions: list[Decision]
        if self.policy.reduction == "mean":
            decisions = self._fold(self.policy, set())
        else:
            pushes = tuple((c.push.key, factor(c.push, self.policy)) for c in self.round.in_order())
            decisions = [Combine(pushes, trim(self.policy, len(pushes)))]
        decisions += self._update(self.round, self.groups, now)
        self._open_round(self.version)
        if self.next:
            (groups, policy), self.next = self.next, None
            decisions += self._reconfigure(groups, policy, now)
        return decisions

    def _fail_round(self, policy: Sync, now: float) -> list[Decision]:
        """Gives up a round whose time is up; nothing of it was reduced yet. The next one is on the same weights."""
        refusal = Refused("ROUND_FAILED", got=len(self.round.contributions), need=policy.min_workers)
        late = any(not session.member for session in self.sessions.live())
        decisions: list[Decision] = [self._give_up(held, refusal, now) for held in self.round.in_order()]
        self._open_round(self.round.opened)
        return [self._bump_version(), *decisions] if late else decisions  # who waits for the next version has it then

    def _give_up(self, contribution: PendingPush, refusal: Refused, now: float) -> Refuse:
        contribution.session.give_up(contribution.push.sequence, now)
        return Refuse(contribution.push.key, refusal)

    def _open_round(self, opened: int) -> None:
        self.round = Round(opened=opened)
        for session in self.sessions.live():
            session.member = True

    # --- updates

    def _update(self, made_of: Round, groups: tuple[Hyperparameters, ...], now: float) -> Iterator[Decision]:
        """Makes the update of pushes that are reduced, and answers them."""
        absent = made_of.absent(len(self.layout.tensors))
        carried = made_of.hyperparameters or ()
        contributions = tuple(held.contribution(self.version) for held in made_of.in_order())
        self._count(self.version + 1, absent)
        summary = UpdateSummary(
            version=self.version,
            contributions=contributions,
            hyperparameters=(*carried, *groups[len(carried) :]),  # for groups that the pushes do not know, the model's
        )
        sources = tuple((held.session.id, held.push.fingerprint) for held in made_of.in_order())
        yield Update(summary, sum(contribution.weight for contribution in contributions), absent, sources)
        for held, contribution in zip(made_of.in_order(), contributions, strict=True):
            result = PushResult(version=self.version, contribution=contribution, summary=summary)
            held.session.apply(held.push.sequence, result, now)
            yield from self._answer(held, result)

    def _count(self, version: int, absent: frozenset[int]) -> None:
        self.version = version
        for index in range(len(self.update_counts)):
            self.update_counts[index] += index not in absent

    def _update_alone(self, contribution: PendingPush, now: float) -> list[Decision]:
        """Makes an update of one push."""
        alone = Round(opened=self.version)
        alone.add(contribution, now)
        groups = self.groups
        if isinstance(self.policy, Async) and self.policy.damping:
            divisor = 1 + self.version - contribution.base_version
            alone.hyperparameters = _damped(alone.hyperparameters or (), divisor) or None
            groups = _damped(groups, divisor)
        contribution.session.clock += 1
        return [Fold(contribution.push.key, contribution.push.weight), *self._update(alone, groups, now)]

    def _answer(self, contribution: PendingPush, result: PushResult) -> Iterator[Answer]:
        """Answers a push, or holds the answer while its worker is too far ahead."""
        session = contribution.session
        if isinstance(self.policy, Bounded) and self._too_far(session, self.policy):
            self._held[contribution.push.key] = session, result
        else:
            yield Answer(contribution.push.key, result)

    # --- how far ahead

    def _slowest(self) -> int:
        return min((session.clock for session in self.sessions.live()), default=0)

    def _ahead(self, session: Session) -> int:
        """Returns how many steps a session is ahead of the slowest; one that has ended is not any more."""
        return session.clock - self._slowest() if self.sessions.find(session.id) else 0

    def _too_far(self, session: Session, policy: Bounded) -> bool:
        return self._ahead(session) > policy.slack

    def _release(self) -> list[Decision]:
        """Gives the answers that are held no longer."""
        most = self._slowest() + self.policy.slack if isinstance(self.policy, Bounded) else None
        free = [
            key
            for key, (session, _) in self._held.items()
            if most is None or session.clock <= most or not self.sessions.find(session.id)
        ]
        return [Answer(key, self._held.pop(key)[1]) for key in free]

    # --- another configuration

    def _reconfigure(self, groups: tuple[Hyperparameters, ...], policy: Policy, now: float) -> Iterator[Decision]:
        """Puts a configuration in place; pushes that wait are judged by it."""
        before, waiting = self.policy, self.round
        late = any(not session.member for session in self.sessions.live())
        self._configure(groups, policy)
        if isinstance(before, Sync) and not isinstance(policy, Sync):
            yield from self._disband(waiting, late, now)
        yield from self._release()
        yield from self._advance(now)

    def _configure(self, groups: tuple[Hyperparameters, ...], policy: Policy) -> None:
        """Puts a configuration in place, with no push that waits."""
        before = self.policy
        self.groups, self.policy = groups, policy
        if type(before) is not type(policy):
            for session in self.sessions.live():
                session.clock = 0
        if isinstance(before, Sync) != isinstance(policy, Sync):
            self._open_round(self.version)

    def _disband(self, waiting: Round, late: bool, now: float) -> Iterator[Decision]:
        """Makes every push of a round an update of its own, or gives it up where the new policy would refuse it.

        Where somebody came too `late` for the round, a version is made in any case.
        """
        before = self.version
        for held in waiting.in_order():
            stale = self.version - held.base_version
            bound = self.policy.max_staleness if isinstance(self.policy, Async) else None
            if bound is not None and stale > bound:
                refusal = Refused("STALE_BASE", base=held.base_version, current=self.version, bound=bound)
                yield self._give_up(held, refusal, now)
            else:
                yield from self._update_alone(held, now)
        if late and self.version == before:  # who waits for the next version has it then
            yield self._bump_version()


def _damped(groups: tuple[Hyperparameters, ...], divisor: int) -> tuple[Hyperparameters, ...]:
    return tuple(replace(group, lr=group.lr / divisor) for group in groups)


def _known(field: str, count: int | None, total: int) -> int:
    if count is None:
        return total
    if not 1 <= count <= total:
        raise Refused("PUSH_INVALID", field=field, allowed=f"1 to {total}")
    return count
