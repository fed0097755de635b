"""A second, naive implementation of the state machine, written from the contract. It searches lists for everything.

The simulation compares its decisions with those of the machine: updates, version bumps, answers and refusals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from deltaserve._common.optimizers import Optimizer
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve_server.model import Async, Bounded, Key, Policy, Push, Sync

Groups = tuple[Optimizer, ...]


class No(Exception):
    """A refusal: its reason and metadata."""

    def __init__(self, reason: str, **metadata: object) -> None:
        super().__init__(reason)
        self.reason, self.metadata = reason, {key: str(value) for key, value in metadata.items()}


@dataclass(eq=False, slots=True)
class Worker:
    """One session. `pushes` are its accepted pushes; sequence number n is at index n - 1."""

    name: str
    id: bytes
    epoch: int
    rank: int
    tensors: int
    groups: int
    lease: float
    expires: float
    first: int
    member: bool
    steps: int
    pushes: list["Sent"] = field(default_factory=list)
    live: bool = True
    fenced: bool = False

    @property
    def applied(self) -> int:
        waiting = self.pushes and not self.pushes[-1].summary
        return len(self.pushes) - bool(waiting)


@dataclass(eq=False, slots=True)
class Sent:
    """One accepted push. `summary` is the version of its update, or 0."""

    worker: Worker
    push: Push
    base: int
    at: float
    summary: int = 0


class Part(NamedTuple):
    """One push in an update."""

    key: Key
    factor: float
    worker: str
    epoch: int
    sequence: int
    staleness: int
    weight: float
    norm: float


class Updated(NamedTuple):
    """An update. `trim` is None if its gradient is a sum."""

    version: int
    parts: tuple[Part, ...]
    hyperparameters: Groups
    absent: frozenset[int]
    counts: tuple[int, ...]
    trim: int | None


class VersionBumped(NamedTuple):
    """A version of the same weights."""

    version: int


class Answered(NamedTuple):
    """The answer to a push. `full` is whether its result is still known."""

    key: Key
    version: int
    duplicate: bool
    full: bool


class GivenUp(NamedTuple):
    """A push that was accepted, waited, and is refused."""

    key: Key
    reason: str
    metadata: dict[str, str]


Said = Updated | VersionBumped | Answered | GivenUp


class Reference:
    """The contract as code. Each method leaves the decisions of its event in `said`."""

    def __init__(self, tensors: int, groups: Groups, policy: Policy) -> None:
        self.tensors, self.groups, self.policy = tensors, groups, policy
        self.version = self.opened = 0
        self.counts: tuple[int, ...] = (0,) * tensors
        self.live: list[Worker] = []
        self.known: dict[bytes, Worker] = {}
        self.ended: list[Worker] = []
        self.epochs: dict[str, int] = {}
        self.waiting: list[Sent] = []  # for the round, as they came
        self.held: list[tuple[Sent, Answered]] = []
        self.coming: tuple[Groups, Policy] | None = None
        self.said: list[Said] = []

    # --- sessions

    def open_session(
        self, name: str, session_id: bytes, lease: float, now: float, tensors: int | None, groups: int | None
    ) -> Worker:
        for what, count, most in (("tensor", tensors, self.tensors), ("group", groups, len(self.groups))):
            if count is not None and not 1 <= count <= most:
                raise No("PUSH_INVALID", field=f"{what}_count", allowed=f"1 to {most}")
        self.flush(now)
        self.epochs[name] = self.epochs.get(name, 0) + 1
        older = next((worker for worker in self.live if worker.name == name), None)
        ranks = [worker.rank for worker in self.live]
        rank = older.rank if older else min(rank for rank in range(len(ranks) + 1) if rank not in ranks)
        names = {sent.worker.name for sent in self.waiting}
        least = self.policy.min_workers if isinstance(self.policy, Sync) else 1
        others = {worker.name for worker in self.live if worker.member and worker.name != name}
        takes_place = older is not None and older.member and name not in names
        member = not names or takes_place or (len(others | names) < least and name not in names)
        first = self.version if member else self.version + 1
        known = tensors or self.tensors, groups or len(self.groups)
        new = Worker(
            name,
            session_id,
            self.epochs[name],
            rank,
            *known,
            lease,
            now + lease,
            first,
            member,
            self.slowest(self.live),
        )
        if older:
            self.end(older)
            older.fenced = True
        self.live.append(new)
        self.known[session_id] = new
        self.flush(now)
        return new

    def get(self, session_id: bytes, epoch: int) -> Worker:
        worker = self.known.get(session_id)
        if worker and (worker.fenced or self.replaced(worker)):
            raise No("SESSION_FENCED", worker=worker.name, epoch=epoch, current=self.epochs[worker.name])
        if not worker or not worker.live:
            raise No("SESSION_UNKNOWN")
        if worker.epoch != epoch:
            raise No("PUSH_INVALID", field="epoch", allowed=f"{worker.epoch}, as OpenSession answered")
        return worker

    def replaced(self, worker: Worker) -> bool:
        """Returns whether another session of its name opened after it had ended."""
        return worker in self.ended and self.epochs[worker.name] > worker.epoch

    def keep(self, session_id: bytes, epoch: int, now: float) -> Worker:
        worker = self.get(session_id, epoch)
        worker.expires = max(worker.expires, now + worker.lease)
        return worker

    def close(self, session_id: bytes, epoch: int, now: float) -> None:
        self.end(self.get(session_id, epoch))
        self.flush(now)

    def end(self, worker: Worker) -> None:
        worker.live = False
        self.live.remove(worker)
        self.ended = [*self.ended, worker][-1024:]

    def tick(self, now: float) -> list[str]:
        gone = [worker for worker in self.live if worker.expires <= now]
        for worker in sorted(gone, key=lambda worker: worker.name):
            self.end(worker)
        self.flush(now)
        return sorted(worker.name for worker in gone)

    @staticmethod
    def slowest(live: Sequence[Worker]) -> int:
        return min([worker.steps for worker in live], default=0)

    # --- pushes

    def check(self, push: Push, now: float) -> tuple[Worker, Sent | None]:
        """Returns the worker of a push, and the accepted push that it repeats."""
        ended = self.known.get(push.session_id)
        replaced = ended and (ended.fenced or self.replaced(ended))
        if ended and not ended.live and not replaced and ended in self.ended and ended.epoch == push.epoch:
            worker = ended if 1 <= push.sequence <= len(ended.pushes) else self.keep(push.session_id, push.epoch, now)
        else:
            worker = self.keep(push.session_id, push.epoch, now)
        last = len(worker.pushes)
        if push.sequence < 1:
            raise No("PUSH_INVALID", field="sequence", allowed=">= 1")
        if push.sequence > last + 1:
            raise No("SEQUENCE_GAP", expected=last + 1, got=push.sequence)
        if push.sequence == last + 1:
            self.check_new(worker, push, self.version if push.base_version is None else push.base_version)
            return worker, None
        sent = worker.pushes[push.sequence - 1]
        if push.sequence > last - 8 and push.fingerprint not in (None, sent.push.fingerprint):
            raise No("SEQUENCE_REUSED", sequence=push.sequence)
        return worker, sent

    def check_new(self, worker: Worker, push: Push, base: int) -> None:
        policy, given = self.policy, push.hyperparameters
        if base > self.version:
            raise No("PUSH_INVALID", field="base_version", allowed=f"at most {self.version}, the current version")
        if given is not None and len(given) != worker.groups:
            raise No("HYPERPARAMETER_INVALID", field="hyperparameters", allowed=f"{worker.groups} groups")
        if (
            isinstance(policy, Async)
            and policy.max_staleness is not None
            and self.version - base > policy.max_staleness
        ):
            raise No("STALE_BASE", base=base, current=self.version, bound=policy.max_staleness)
        if isinstance(policy, Bounded) and worker in [sent.worker for sent, _ in self.held]:
            raise No("SLACK_EXCEEDED", ahead=worker.steps - self.slowest(self.live), slack=policy.slack)
        if isinstance(policy, Sync):
            self.check_round(worker, push, base)

    def check_round(self, worker: Worker, push: Push, base: int) -> None:
        if not worker.member or worker in [sent.worker for sent in self.waiting]:
            raise No("ROUND_CLOSED", base=base, current=self.version + 1)
        if base < self.opened:
            raise No("ROUND_CLOSED", base=base, current=self.opened)
        for group, got in enumerate(push.hyperparameters or ()):
            for held in carried(self.waiting, group)[:1]:
                for name in hyperparameters(got):
                    ours, theirs = getattr(held, name), getattr(got, name)
                    if ours != theirs:
                        raise No("HYPERPARAMETER_CONFLICT", field=f"groups[{group}].{name}", round=ours, got=theirs)

    def push(self, push: Push, now: float) -> None:
        worker, known = self.check(push, now)
        if known:
            if known.summary and known not in [sent for sent, _ in self.held]:
                full = push.sequence > len(worker.pushes) - 8
                self.said.append(Answered(push.key, known.summary if full else self.version, True, full))
            return
        sent = Sent(worker, push, self.version if push.base_version is None else push.base_version, now)
        worker.pushes.append(sent)
        if isinstance(self.policy, Sync):
            self.waiting.append(sent)
        else:
            self.apply_alone(sent, now)
        self.flush(now)

    def status(self, session_id: bytes, sequence: int) -> tuple[str, bool, int | None]:
        """Returns a push's state, whether that is final, and the version of its result."""
        if sequence < 1:
            raise No("PUSH_INVALID", field="sequence", allowed=">= 1")
        worker = self.known.get(session_id)
        if not worker or (not worker.live and worker not in self.ended):
            raise No("SESSION_UNKNOWN")
        if sequence > len(worker.pushes):
            return "not accepted", not worker.live, None
        summary = worker.pushes[sequence - 1].summary
        if not summary:
            return "waiting", False, None
        return "applied", True, summary if sequence > len(worker.pushes) - 8 else self.version

    # --- the whole state

    def put_state(self, counts: Sequence[int]) -> None:
        self.version, self.counts = self.version + 1, tuple(counts)

    def extend(self, tensors: int, groups: Groups) -> None:
        self.tensors, self.groups = self.tensors + tensors, self.groups + groups
        self.counts += (0,) * tensors
        if self.coming:
            self.coming = self.coming[0] + groups, self.coming[1]

    def change(self, groups: Groups, policy: Policy, now: float) -> int:
        """Returns the first version that is made with the change in place."""
        if self.partly_reduced() and not self.reduces_alike(policy):
            self.coming = groups, policy
            return self.version + 2
        first, self.coming = self.version + 1, None
        self.reconfigure(groups, policy, now)
        return first

    def reconfigure(self, groups: Groups, policy: Policy, now: float) -> None:
        before, late, version = self.policy, [worker for worker in self.live if not worker.member], self.version
        self.groups, self.policy = groups, policy
        if type(before) is not type(policy):
            for worker in self.live:
                worker.steps, worker.member = 0, True
            waiting, self.waiting, self.opened = by_name(self.waiting), [], self.version
            for sent in waiting:
                stale = self.version - sent.base
                bound = policy.max_staleness if isinstance(policy, Async) else None
                if bound is not None and stale > bound:
                    self.give_up(sent, now, "STALE_BASE", base=sent.base, current=self.version, bound=bound)
                else:
                    self.apply_alone(sent, now)
            if late and self.version == version:
                self.bump_version()
        self.flush(now)

    def partly_reduced(self) -> bool:
        """Returns whether a sum has begun: the round has enough pushes, and no awaited name precedes its first one."""
        policy = self.policy
        if not isinstance(policy, Sync) or policy.reduction != "mean" or not self.waiting:
            return False
        first = min(sent.worker.name for sent in self.waiting)
        return len(self.waiting) >= policy.min_workers and all(worker.name > first for worker in self.awaited())

    def reduces_alike(self, policy: Policy) -> bool:
        now = self.policy
        return (
            isinstance(policy, Sync)
            and isinstance(now, Sync)
            and (policy.reduction, policy.clip_norm) == (now.reduction, now.clip_norm)
            and policy.min_workers <= len(self.waiting)
        )

    # --- what follows

    def awaited(self) -> list[Worker]:
        pushed = [sent.worker for sent in self.waiting]
        return [worker for worker in self.live if worker.member and worker not in pushed]

    def due(self) -> float | None:
        policy, came = self.policy, [sent.at for sent in self.waiting]
        if not isinstance(policy, Sync) or not came:
            return None
        quorum = (
            [came[policy.quorum - 1] + policy.grace_seconds] if policy.quorum and len(came) >= policy.quorum else []
        )
        return min(quorum + [came[0] + seconds for seconds in [policy.round_timeout_seconds] if seconds], default=None)

    def flush(self, now: float) -> None:
        """Closes, fails or fills up the round, or gives withheld answers."""
        policy, due = self.policy, self.due()
        if not isinstance(policy, Sync) or not self.waiting:
            return self.release()
        time_is_up = due is not None and due <= now
        if self.awaited() and not time_is_up:
            return None
        if len(self.waiting) >= policy.min_workers:
            return self.close_round(policy, now)
        return self.fail_round(policy, now) if time_is_up else self.fill_up()

    def release(self) -> None:
        slack = self.policy.slack if isinstance(self.policy, Bounded) else float("inf")
        for sent, answer in list(self.held):
            if not sent.worker.live or sent.worker.steps - self.slowest(self.live) <= slack:
                self.held.remove((sent, answer))
                self.said.append(answer)

    def fail_round(self, policy: Sync, now: float) -> None:
        if not all(worker.member for worker in self.live):
            self.bump_version()
        failed, self.waiting = by_name(self.waiting), []
        for sent in failed:
            self.give_up(sent, now, "ROUND_FAILED", got=len(failed), need=policy.min_workers)
        for worker in self.live:
            worker.member = True

    def fill_up(self) -> None:
        names = [sent.worker.name for sent in self.waiting]
        late = [worker for worker in self.live if not worker.member and worker.name not in names]
        for worker in late:
            worker.member = True
        if late:
            self.bump_version()

    def close_round(self, policy: Sync, now: float) -> None:
        sent, self.waiting = by_name(self.waiting), []
        trims = {"mean": None, "trimmed_mean": policy.trim, "median": (len(sent) - 1) // 2}
        self.update(sent, [reduction_factor(one.push, policy) for one in sent], trims[policy.reduction], 1, now)
        for worker in self.live:
            worker.member = True
        self.opened = self.version
        if self.coming:
            (groups, policy_), self.coming = self.coming, None
            self.reconfigure(groups, policy_, now)

    def apply_alone(self, sent: Sent, now: float) -> None:
        damping = isinstance(self.policy, Async) and self.policy.damping
        sent.worker.steps += 1
        self.update([sent], [sent.push.weight], None, 1 + self.version - sent.base if damping else 1, now)
        ahead = sent.worker.steps - self.slowest(self.live) if sent.worker.live else 0
        if isinstance(self.policy, Bounded) and ahead > self.policy.slack:
            answer = self.said.pop()
            assert isinstance(answer, Answered)
            self.held.append((sent, answer))

    def update(self, sent: list[Sent], factors: list[float], trim: int | None, divisor: int, now: float) -> None:
        parts = []
        for one, factor in zip(sent, factors, strict=True):
            worker, push = one.worker, one.push
            contribution = worker.name, worker.epoch, push.sequence, self.version - one.base, push.weight, push.norm
            parts.append(Part(push.key, factor, *contribution))
        used = [(carried(sent, group) or [model])[0] for group, model in enumerate(self.groups)]
        if divisor > 1:
            used = [replace(group, lr=group.lr / divisor) for group in used]
        absent = [k for k in range(self.tensors) if all(k in s.push.absent or k >= s.worker.tensors for s in sent)]
        self.version += 1
        self.counts = tuple([count + (k not in absent) for k, count in enumerate(self.counts)])
        self.said.append(Updated(self.version, tuple(parts), tuple(used), frozenset(absent), self.counts, trim))
        for one in sent:
            one.summary = self.version
            one.worker.expires = max(one.worker.expires, now + one.worker.lease)
            self.said.append(Answered(one.push.key, self.version, False, True))

    def give_up(self, sent: Sent, now: float, reason: str, **metadata: object) -> None:
        assert sent.worker.pushes.pop() is sent
        sent.worker.expires = max(sent.worker.expires, now + sent.worker.lease)
        self.said.append(GivenUp(sent.push.key, reason, {key: str(value) for key, value in metadata.items()}))

    def bump_version(self) -> None:
        self.version += 1
        self.said.append(VersionBumped(self.version))


def by_name(sent: list[Sent]) -> list[Sent]:
    return sorted(sent, key=lambda one: one.worker.name)


def carried(sent: list[Sent], group: int) -> list[Optimizer]:
    """Returns the hyperparameters that pushes carry for one group."""
    given = [one.push.hyperparameters or () for one in sent]
    return [groups[group] for groups in given if len(groups) > group]


def reduction_factor(push: Push, policy: Sync) -> float:
    scale = 1.0 if policy.clip_norm is None or push.norm <= policy.clip_norm else policy.clip_norm / push.norm
    return push.weight * scale if policy.reduction == "mean" else scale
