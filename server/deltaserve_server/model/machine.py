"""The state machine of one model: events in, decisions out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.policy import Async, Policy
from deltaserve_server.model.push import Key, Push, PushResult
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import Contribution, Round
from deltaserve_server.model.sessions import Session, Sessions


@dataclass(frozen=True, slots=True)
class Fold:
    """Reduce this push's gradient into the update that comes next."""

    key: Key


@dataclass(frozen=True, slots=True)
class Update:
    """Apply the reduced gradient, divided by the number of contributors, and publish the version.

    Attributes:
        version: The version that the update makes.
        contributors: Number of pushes that were folded.
        absent: Tensors that keep their weights and optimizer state.
        hyperparameters: By group.
    """

    version: int
    contributors: int
    absent: frozenset[int]
    hyperparameters: tuple[Hyperparameters, ...]


@dataclass(frozen=True, slots=True)
class Renumber:
    """Give the weights as they are a new version, for those who wait for it."""

    version: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell whoever waits for this push what became of it."""

    key: Key
    result: PushResult


Decision = Fold | Update | Renumber | Answer


class Machine:
    """All of a model's state but its vectors.

    Every method that takes `now` takes seconds of a monotonic clock. A method that raises Refused has changed nothing.

    Attributes:
        name: The model's name.
        layout: Its tensors.
        groups: Its hyperparameters by parameter group.
        policy: When a push becomes an update.
        version: How many updates it has had, and replacements of the whole state, and see `Renumber`.
        update_counts: By tensor: how many updates its optimizer state has had.
        sessions: Its workers.
        shorter: How many tensors and groups it had before each extension.
    """

    def __init__(self, name: str, layout: Layout, groups: Sequence[Hyperparameters], policy: Policy) -> None:
        self.name = name
        self.layout = layout
        self.groups = tuple(groups)
        self.policy = policy
        self.version = 0
        self.update_counts = [0] * len(layout.tensors)
        self.sessions = Sessions()
        self.shorter: set[tuple[int, int]] = set()
        self._round = Round(opened=0)

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
        )
        self.sessions.add(session)
        return session, self._advance(now)

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

    def expire(self, now: float) -> tuple[list[Session], list[Decision]]:
        """Ends the sessions whose lease has run out; returns them, and what follows."""
        gone = [session for session in self.sessions.live() if session.expired(now)]
        for session in gone:
            self.sessions.remove(session)
        return gone, self._advance(now) if gone else []

    # --- pushes

    def check(self, push: Push, now: float) -> Session:
        """Looks at a push before its values have come, and renews the lease.

        Raises:
            Refused: For whatever can be known without the values.
        """
        session = self.keep_session(push.session_id, push.epoch, now)
        if not session.known(push):
            self._check_new(session, push)
        return session

    def push(self, push: Push, now: float) -> list[Decision]:
        """Takes a push whose values are here. The Answer comes now, or with a later event when its round closes.

        Raises:
            Refused: The push is not accepted.
        """
        session = self.check(push, now)
        if session.known(push):
            result = session.result(push.sequence, self.version)
            return [Answer(push.key, result)] if result else []
        base_version = self.version if push.base_version is None else push.base_version
        contribution = Contribution(session, push, base_version)
        session.accept(push)
        if isinstance(self.policy, Async):
            alone = Round(opened=self.version)
            alone.add(contribution)
            return list(self._update(alone, now))
        self._round.add(contribution)
        return self._advance(now)

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
        self.update_counts += [0] * len(tensors)

    # --- rounds

    @property
    def _min_workers(self) -> int:
        return 1 if isinstance(self.policy, Async) else self.policy.min_workers

    def _joinable(self, worker: str) -> bool:
        """Whether a session that is opened now belongs to the open round."""
        held = self._round.contributions
        older = self.sessions.named(worker)
        if not held or (older and older.member and worker not in held):  # the latter takes its own place
            return True
        others = {session.worker for session in self.sessions.live() if session.member and session.worker != worker}
        return len(others | held.keys()) < self._min_workers and worker not in held

    def _check_new(self, session: Session, push: Push) -> None:
        base = self.version if push.base_version is None else push.base_version
        if base > self.version:
            raise Refused("PUSH_INVALID", field="base_version", allowed=f"at most {self.version}, the current version")
        if push.hyperparameters is not None and len(push.hyperparameters) != session.group_count:
            raise Refused("HYPERPARAMETER_INVALID", field="hyperparameters", allowed=f"{session.group_count} groups")
        if isinstance(self.policy, Async):
            return
        if not session.member or session.waiting:
            raise Refused("ROUND_CLOSED", base=base, current=self.version + 1)
        self._round.check(push, base)

    def _advance(self, now: float) -> list[Decision]:
        """Folds what can be folded, and closes the round where nobody is awaited any more."""
        if isinstance(self.policy, Async) or not self._round.contributions:
            return []
        awaited = {s.worker for s in self.sessions.live() if s.member and not s.waiting}
        decisions: list[Decision] = []
        ready = self._round.foldable(awaited, self._min_workers)
        if not awaited and len(self._round.contributions) >= self._min_workers:
            return list(self._update(self._round, now))
        self._round.folded += len(ready)
        decisions.extend(Fold(contribution.push.key) for contribution in ready)
        return decisions if awaited else [*decisions, *self._take_in()]

    def _take_in(self) -> list[Decision]:
        """Takes those who wait for the next round into this one, which lacks workers and would never close without.

        They were told to start from the next version, so there is one, of the same weights.
        """
        late = [session for session in self.sessions.live() if not session.member]
        late = [session for session in late if session.worker not in self._round.contributions]
        if not late:
            return []
        for session in late:
            session.member = True
        self.version += 1
        return [Renumber(self.version)]

    def _update(self, made_of: Round, now: float) -> Iterator[Decision]:
        """Makes the update of a round in which nobody is awaited."""
        for contribution in made_of.foldable(set(), 1):
            yield Fold(contribution.push.key)
        absent = made_of.absent(len(self.layout.tensors))
        hyperparameters = self._effective(made_of.hyperparameters)
        before, self.version = self.version, self.version + 1
        for index in range(len(self.update_counts)):
            self.update_counts[index] += index not in absent
        contributions = made_of.contributions
        yield Update(self.version, len(contributions), absent, hyperparameters)
        for name in sorted(contributions):
            session, push = contributions[name].session, contributions[name].push
            result = PushResult(
                version=self.version,
                staleness=before - contributions[name].base_version,
                contributors=len(contributions),
                hyperparameters=hyperparameters,
            )
            session.apply(push.sequence, result, now)
            yield Answer(push.key, result)
        if made_of is self._round:
            self._open_round()

    def _effective(self, carried: tuple[Hyperparameters, ...] | None) -> tuple[Hyperparameters, ...]:
        """Returns what an update uses: the groups that its pushes carry; for groups they do not know, the model's."""
        carried = carried or ()
        return (*carried, *self.groups[len(carried) :])

    def _open_round(self) -> None:
        self._round = Round(opened=self.version)
        for session in self.sessions.live():
            session.member = True


def _known(field: str, count: int | None, total: int) -> int:
    if count is None:
        return total
    if not 1 <= count <= total:
        raise Refused("PUSH_INVALID", field=field, allowed=f"1 to {total}")
    return count
