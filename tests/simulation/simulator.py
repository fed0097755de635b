"""A seeded simulation: random events drive the state machine and the reference side by side.

An event names its worker and states everything else relative to the state of that worker and of the model. So any part
of a history is a history too, which is how a violating history is shortened.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from histories import GROUPS, LEASES, NAMES, Event, Scenario
from ledger import Ledger, Violation
from reference import No, Reference, Worker

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.model import Bounded, Decision, Layout, Machine, Policy, Push, Refused, Tensor

SNAPSHOT_EVERY = 97
"""Before one event in this many, the machine's whole state is saved to check that a refusal leaves it unchanged."""

_LONG = 1e6
"""Seconds after which every lease has run out and every round is over."""

_T = TypeVar("_T")
_U = TypeVar("_U")


class Simulation:
    """Gives a machine and a reference the same events, and compares them.

    Args:
        scenario: The policies, and what happens often.
        trace: Receives a line for each event; None means that nobody reads along.
        machine: Builds the machine; planted defects build one of their own.
    """

    def __init__(
        self,
        scenario: Scenario,
        trace: Callable[[str], None] | None = None,
        machine: Callable[[str, Layout, Sequence[Optimizer], Policy], Machine] = Machine,
    ) -> None:
        groups = (scenario.optimizer,)
        self.policies, self._optimizer = scenario.policies, scenario.optimizer
        self.machine = machine("m", Layout((Tensor("w", (2, 3)), Tensor("b", (3,)))), groups, self.policies[0])
        self.reference = Reference(2, groups, self.policies[0])
        self.now = 0.0
        self.ledger = Ledger(self.policies[0])
        self.totals = self.ledger.totals
        self._trace = trace
        self._line = ""
        self._sessions: list[list[Worker]] = [[] for _ in NAMES]
        self._image: bytes | None = None
        self._takes: dict[str, Callable[[Event, list[Worker]], list[Decision]]] = {
            "push": self._push,
            "check": self._check,
            "open": self._open,
            "close": self._close,
            "keep": self._keep,
            "lose the answer": self._lose,
            "tick": self._tick,
            "put state": self._put_state,
            "extend": self._extend,
            "change": self._change,
            "ask": self._ask,
        }

    @property
    def waiting(self) -> int:
        """How many pushes have no answer yet."""
        return len(self.ledger.unanswered)

    def run(self, events: Sequence[Event], snapshot_every: int = SNAPSHOT_EVERY) -> None:
        """Runs the events, then lets all sessions end.

        Raises:
            Violation: The machine broke a rule.
        """
        for count, event in enumerate(events):
            self.step(event, count % snapshot_every == 0)
        self.flush()

    def step(self, event: Event, snapshot: bool = False) -> None:
        """Runs one event and compares.

        Raises:
            Violation: The machine broke a rule.
        """
        self.totals.events += 1
        self.now += event.wait
        before = self.ledger.judged_by = self.machine.policy
        self._image = image(self.machine) if snapshot else None
        if event.patient and event.kind == "push":
            event = event._replace(worker=self._ready(event.worker))
        sessions = self._sessions[event.worker]
        take = self._takes[event.kind]
        if not sessions and event.kind not in _NEEDS_NO_SESSION:
            take = self._open
        elif event.kind == "push" and event.patient and not sessions[-1].live:
            take = self._open  # a worker whose session has ended begins anew
        try:
            decisions = take(event, sessions)
            said, self.reference.said = self.reference.said, []
            if self._trace:
                self._line += "".join(f"\n            {decision}" for decision in decisions)
            self.ledger.follow(decisions, said)
            self._compare()
            if self.machine.policy is not before:
                self.ledger.change(before, self.machine.policy)
        except Violation:
            raise
        except Exception as error:  # whatever the machine raises but Refused
            raise Violation(f"{type(error).__name__}: {error}") from error
        finally:
            if self._trace:
                self._trace(self._line)

    def flush(self) -> None:
        """Lets all sessions end and much time pass. Then nobody may wait, except in a round without a timeout.

        Raises:
            Violation: Somebody waits, or a push was lost.
        """
        self.ledger.present.clear()
        for _ in range(3):
            self.step(Event("tick", wait=_LONG))
        if len(self.machine.sessions):
            raise Violation("a session outlives its lease")
        self.ledger.check_all_settled(self.machine.policy)
        for worker in self.reference.ended[-100:]:
            for sequence in range(len(worker.pushes) + 2):
                self._status(worker.id, sequence)

    # --- events

    def _push(self, event: Event, sessions: list[Worker], only_check: bool = False) -> list[Decision]:
        worker = sessions[-1 - event.session % len(sessions)]
        sequence = len(worker.pushes) + 1 + event.number
        changed = event.carried and self._changed(event.carried)
        carried = (changed,) * (worker.groups + event.surplus) if changed else None
        push = Push(
            session_id=b"nobody" if event.stranger == 1 else worker.id,
            epoch=worker.epoch + (event.stranger == 2),
            sequence=sequence,
            base_version=None if event.age is None else max(self.ledger.version - event.age, 0),
            hyperparameters=carried,
            absent=event.absent,
            weight=event.weight,
            fingerprint=None if only_check else 2 * sequence + event.twisted,
            norm=0.0 if only_check else event.norm,
        )
        if self._trace:
            self._line = f"{worker.name}.{worker.epoch} {'check' if only_check else 'push'} {_pushed(push)}"
        if only_check:
            self._both(lambda: self.machine.check(push, self.now), lambda: self.reference.check(push, self.now))
            return []
        new = event.number == 0
        decisions = self._both(lambda: self.machine.push(push, self.now), lambda: self.reference.push(push, self.now))
        if decisions is None:
            return []
        if new:
            self.ledger.take_in(push.key)
            if isinstance(self.ledger.judged_by, Bounded):
                self.ledger.check_slack(worker, self.reference.slowest(self.reference.live))
        if push.key in self.ledger.unanswered:
            self.ledger.present.add(worker.id)
        return decisions[0]

    def _ready(self, first: int) -> int:
        """Returns the first worker from this one on that does not wait for an answer, or this one if all do."""
        for worker in chain(range(first, len(NAMES)), range(first)):
            sessions = self._sessions[worker]
            newest = sessions[-1] if sessions else None
            if newest and not (newest.live and (newest.id, len(newest.pushes)) in self.ledger.unanswered):
                return worker
        return first

    def _check(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        return self._push(event, sessions, only_check=True)

    def _open(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        reference, name = self.reference, NAMES[event.worker]
        tensors = {1: 1, 2: 0, 3: reference.tensors + 1}.get(event.number % 24)
        groups = {1: 1, 4: 0, 5: len(reference.groups) + 1}.get(event.number % 24)
        lease = LEASES[event.number % len(LEASES)]
        session_id = len(self.ledger.workers).to_bytes(16, "big")
        if self._trace:
            self._line = f"{name} open lease={lease} tensors={tensors} groups={groups}"
        opened = self._both(
            lambda: self.machine.open_session(name, session_id, lease, self.now, tensors, groups),
            lambda: reference.open_session(name, session_id, lease, self.now, tensors, groups),
        )
        if opened is None:
            return []
        (session, decisions), worker = opened
        if (session.epoch, session.rank, session.first_version) != (worker.epoch, worker.rank, worker.first):
            raise Violation(f"session {session}, expected {worker}")
        if session.member and session.first_version < self.reference.opened:
            raise Violation("the first version of a session is too old for the round that it belongs to")
        sessions.append(worker)
        self.ledger.workers[name, worker.epoch] = worker
        return decisions

    def _close(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        worker = sessions[-1 - event.session % len(sessions)]
        epoch = worker.epoch + (event.stranger == 2)
        if self._trace:
            self._line = f"{worker.name}.{epoch} close"
        closed = self._both(
            lambda: self.machine.close_session(worker.id, epoch, self.now),
            lambda: self.reference.close(worker.id, epoch, self.now),
        )
        return closed[0] if closed else []

    def _keep(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        worker = sessions[-1 - event.session % len(sessions)]
        epoch = worker.epoch + (event.stranger == 2)
        if self._trace:
            self._line = f"{worker.name}.{epoch} keep"
        self._both(
            lambda: self.machine.keep_session(worker.id, epoch, self.now),
            lambda: self.reference.keep(worker.id, epoch, self.now),
        )
        return []

    def _lose(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        """Cancels a call, so it does not renew the lease any more."""
        if self._trace:
            self._line = f"{NAMES[event.worker]} loses the answer"
        self.ledger.present.discard(sessions[-1].id)
        return []

    def _tick(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        for session_id in self.ledger.present:
            self.machine.renew(session_id, self.now)
            worker = self.reference.known[session_id]
            worker.expires = max(worker.expires, self.now + worker.lease)
        if self._trace:
            self._line = f"tick {self.now}"
        gone, decisions = self.machine.tick(self.now)
        if [session.worker for session in gone] != self.reference.tick(self.now):
            raise Violation("other leases ran out")
        due = self.machine.due()
        if due is not None and due <= self.now:
            raise Violation("a round is open longer than it may be")
        return decisions

    def _changed(self, values: Mapping[str, float]) -> Optimizer:
        """Returns the model's optimizer with other values."""
        return replace(self._optimizer, **values)

    def _put_state(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        counts = [event.number] * self.reference.tensors
        if self._trace:
            self._line = "put state"
        self.machine.put_state(counts)
        self.reference.put_state(counts)
        self.ledger.version += 1
        return []

    def _extend(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        if self.reference.tensors < 6:
            groups = (self._changed(GROUPS[1]),) if event.number % 2 else ()
            self.machine.extend([Tensor(f"t{self.reference.tensors}", (2,))], groups)
            self.reference.extend(1, groups)
        if self._trace:
            self._line = f"extend to {self.reference.tensors} tensors, {len(self.reference.groups)} groups"
        self._compare_configuration()
        return []

    def _change(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        groups, policy = self.machine.configuration()
        if event.number % 3:
            policy = self.policies[event.number // 3 % len(self.policies)]
        else:
            chosen = [GROUPS[(event.number // 3 + index) % len(GROUPS)] for index in range(len(groups))]
            groups = tuple(map(self._changed, chosen))
        if self._trace:
            self._line = f"change to {policy} {groups}"
        first, decisions = self.machine.change(groups, policy, self.now)
        if first != self.reference.change(groups, policy, self.now):
            raise Violation("a change takes effect at another version")
        self.ledger.judged_by = self.machine.policy
        self._compare_configuration()
        return decisions

    def _ask(self, event: Event, sessions: list[Worker]) -> list[Decision]:
        worker = sessions[-1 - event.session % len(sessions)]
        session_id = b"nobody" if event.stranger == 1 else worker.id
        sequence = len(worker.pushes) + event.number
        if self._trace:
            self._line = f"{worker.name}.{worker.epoch} ask for {sequence}"
        self._status(session_id, sequence)
        return []

    def _status(self, session_id: bytes, sequence: int) -> None:
        asked = self._both(
            lambda: self.machine.push_status(session_id, sequence),
            lambda: self.reference.status(session_id, sequence),
        )
        if asked is None:
            return
        status, (state, final, version) = asked
        if (status.state, status.final) != (state, final):
            raise Violation(f"asked for a push: {status}, expected {state}, final: {final}")
        if (status.result and status.result.version) != version:
            raise Violation(f"asked for a push: {status.result}, expected version {version}")
        if status.result and status.result.duplicate:
            raise Violation("asking for a push made it a duplicate")
        if status.result and status.result.summary not in (None, self.ledger.applied.get((session_id, sequence))):
            raise Violation("asked for a push: another update")

    # --- comparison

    def _both(self, ours: Callable[[], _T], theirs: Callable[[], _U]) -> tuple[_T, _U] | None:
        """Asks both. Returns both results, or None if both refuse."""
        refused = expected = None
        try:
            got = ours()
        except Refused as refusal:
            refused = refusal
        try:
            should = theirs()
        except No as refusal:
            expected = refusal
        if refused is None and expected is None:
            return got, should
        found = refused and (refused.reason, refused.metadata)
        wanted = expected and (expected.reason, expected.metadata)
        if found != wanted:
            raise Violation(f"refused: {found}, expected {wanted}")
        assert refused
        self._line += f" -> {refused}" if self._trace else ""
        self.totals.refusals[refused.reason] += 1
        if self._image is not None and self._image != image(self.machine):
            raise Violation(f"refused with {refused.reason}, and yet something has changed")
        return None

    def _compare_configuration(self) -> None:
        reference = self.reference
        if self.machine.configuration() != (reference.coming or (reference.groups, reference.policy)):
            raise Violation(f"configuration {self.machine.configuration()}")
        if (self.machine.groups, self.machine.policy) != (reference.groups, reference.policy):
            raise Violation(f"groups {self.machine.groups}, policy {self.machine.policy}")

    def _compare(self) -> None:
        """Compares versions, counts and sessions."""
        machine, reference = self.machine, self.reference
        if not machine.version == reference.version == self.ledger.version:
            raise Violation(f"version {machine.version}, expected {reference.version}, counted {self.ledger.version}")
        if machine.update_counts != reference.counts:
            raise Violation(f"update counts {machine.update_counts}, expected {reference.counts}")
        if len(machine.sessions) != len(reference.live):
            raise Violation(f"sessions of {[session.worker for session in machine.sessions.live()]}")
        find = machine.sessions.find
        for worker in reference.live:
            session = find(worker.id)
            if (
                session is None
                or session.last_accepted != len(worker.pushes)
                or session.last_applied != worker.applied
                or session.expires != worker.expires
                or session.member is not worker.member
            ):
                raise Violation(f"session {session}, expected {worker}")


_NEEDS_NO_SESSION = {"open", "tick", "put state", "extend", "change"}


def image(machine: Machine) -> bytes:
    """Returns a machine's state without leases, which a refused call renews, and without ended sessions."""
    leases = [(session, session.expires) for session in machine.sessions.live()]
    for session, _ in leases:
        session.expires = 0.0
    sessions = {name: tuple(table) for name, table in vars(machine.sessions).items()}
    taken = pickle.dumps([vars(machine) | {"sessions": None}, [session for session, _ in leases], sessions])
    for session, expires in leases:
        session.expires = expires
    return taken


def _pushed(push: Push) -> str:
    carried = f" carries={push.hyperparameters}" if push.hyperparameters else ""
    return (
        f"sequence={push.sequence} base={push.base_version} weight={push.weight} norm={push.norm}"
        f" absent={set(push.absent) or ''} fingerprint={push.fingerprint}{carried}"
    )
