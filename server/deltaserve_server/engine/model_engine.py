"""The engine of one model: takes events, runs the state machine and carries out what it decides.

The engine has no thread of its own. The thread that brings an event holds the model's lock until the decisions are
carried out. gRPC's synchronous server never interrupts a handler, so an update always runs to its end.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial

from deltaserve._common.failpoints import failpoint
from deltaserve._common.optimizers import Optimizer
from deltaserve_server.durability.commits import Commits, StorageError, extension_entries
from deltaserve_server.durability.folder import Head
from deltaserve_server.durability.model_storage import Checkpoint, ModelStorage
from deltaserve_server.durability.records import Changed, Ended, Extended, Opened, StatePut, VersionBumped
from deltaserve_server.durability.records import Updated as UpdatedRecord
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.engine.clock import SYSTEM_CLOCK, Clock
from deltaserve_server.engine.events import NO_OBSERVERS, Observers, Position, Updated
from deltaserve_server.engine.model_events import ModelEvents
from deltaserve_server.engine.model_lock import ModelLock
from deltaserve_server.engine.pending_answers import PendingAnswers
from deltaserve_server.engine.shared_gradients import SharedGradients
from deltaserve_server.engine.staged_pushes import StagedPushes
from deltaserve_server.engine.version_subscribers import VersionSubscribers, Watcher
from deltaserve_server.memory import Budget, Range, Reservation, Staging, State, Store, Version, initial_state
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import (
    Answer,
    BumpVersion,
    Combine,
    Decision,
    Fold,
    Layout,
    Machine,
    Policy,
    Push,
    PushResult,
    Refuse,
    Refused,
    Session,
    Sync,
    Tensor,
    Update,
    UpdateSummary,
)
from deltaserve_server.model.state import MachineState, SessionState, Settings

_log = logging.getLogger(__name__)


class ModelEngine:
    """One served model: its lock, state machine, vectors, journal, and those who wait for it.

    Attributes:
        lock: `with engine.lock:` makes several calls one event. Reentrant; tells whether the model has ended.
        machine: The state machine; read it under `lock`.
        storage: The model's files; None if it is not durable.
        head: The model's lineage.
    """

    def __init__(
        self,
        machine: Machine,
        store: Store,
        reservation: Reservation,
        incarnation: str,
        schedule_tick: Callable[[float], None],
        storage: ModelStorage | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        observers: Observers = NO_OBSERVERS,
    ) -> None:
        self._commits = storage.commits if storage else Commits()
        self.lock = ModelLock(self._commits)
        self.machine = machine
        self.storage = storage
        self.head = storage.head if storage else Head.new()
        self._store = store
        self._reservations = [reservation]
        self._incarnation = incarnation
        self._schedule_tick = schedule_tick  # requests a call of `tick` no later than the given time
        self._clock = clock
        self._observers = observers
        self._failed = False  # a fault or a deletion, after which the state must not be saved
        self._published_version = machine.version  # the newest that is durable and was told to anybody
        self._events = ModelEvents(machine, observers, self._commits.on_durable, storage.last.number if storage else 0)
        self._staged = StagedPushes(store)
        self._answers = PendingAnswers(self._commits.on_durable)
        self._subscribers = VersionSubscribers()
        self._calls: Counter[bytes] = Counter()  # calls that wait, by session: they keep its lease
        self._shared = SharedGradients()

    @property
    def position(self) -> Position:
        """Where the model stands; read it under `lock`."""
        return self._position(self.machine.version)

    @property
    def journals(self) -> bool:
        """Whether the model has a journal."""
        return self._commits.journals

    @property
    def waiting(self) -> bool:
        """Whether any push waits for its round, or for its outcome to be durable."""
        return bool(self._answers)

    def open_session(
        self, worker: str, lease_seconds: float, tensor_count: int | None = None, group_count: int | None = None
    ) -> Session:
        """Opens a session for a worker; an older one of the same name is fenced."""
        with self.lock:
            self._check_journal()
            older = self.machine.sessions.named(worker)
            session, decisions = self.machine.open_session(
                worker, secrets.token_bytes(16), lease_seconds, self._clock.monotonic(), tensor_count, group_count
            )
            self._carry_out(decisions)
            self._commits.add(Opened(SessionState.of(session)))  # after the updates, in the order of what happened
            if older:
                self._events.session_left(older, "replaced")
            self._events.session_joined(session)
            return session

    def keep_session(self, session_id: bytes, epoch: int) -> Session:
        """Renews a lease."""
        with self.lock:
            return self.machine.keep_session(session_id, epoch, self._clock.monotonic())

    def close_session(self, session_id: bytes, epoch: int) -> None:
        """Ends a session at its worker's request."""
        with self.lock:
            self._check_journal()
            session = self.machine.sessions.find(session_id)
            decisions = self.machine.close_session(session_id, epoch, self._clock.monotonic())
            self._commits.add(Ended((session_id,)))
            self._carry_out(decisions)
            assert session
            self._events.session_left(session, "closed")

    @contextmanager
    def kept_alive(self, session: Session) -> Iterator[None]:
        """Renews a session's lease for as long as one of its calls waits."""
        with self.lock.mutex:
            self._calls[session.id] += 1
        try:
            yield
        finally:
            with self.lock.mutex:
                self._calls -= Counter([session.id])

    def tick(self) -> None:
        """Ends the sessions whose lease has run out and the rounds whose time is up."""
        if self.lock.ended:  # the timer may see a model for a moment after its end
            return
        with self.lock:
            now = self._clock.monotonic()
            for session_id in self._calls:  # first: a worker whose call waits here is alive
                self.machine.renew(session_id, now)
            self._check_journal()
            self._shared.retain({session.id for session in self.machine.sessions.live()})
            expired, decisions = self.machine.tick(now)
            if expired:
                self._commits.add(Ended(tuple(session.id for session in expired)))
            for session in expired:
                self._events.session_left(session, "expired")
            self._carry_out(decisions)

    def open_shared_memory(self, session: Session, budget: Budget) -> Handle:
        """Returns what a session's worker needs to map memory for its gradients; see `SharedGradients.open`."""
        with self.lock.read_lock:
            handle = self._shared.open(session.id, self.machine.layout.offsets[session.tensor_count], budget)
            self._store.use_shared_memory()  # the next versions can then be mapped too, for the answers
            return handle

    def shared_gradient(self, session_id: bytes) -> Vector | None:
        """Returns a session's shared memory; None if it has none."""
        return self._shared.get(session_id)

    def check(self, push: Push) -> Session:
        """Checks a push by its header, and renews the lease; may raise Refused. Must be called under `lock`."""
        return self.machine.check(push, self._clock.monotonic())

    def stage(self) -> Staging:
        """Returns a place for a push's values."""
        return self._store.stage()

    def staging_bytes(self, received_bytes: int) -> int:
        """Returns how much memory a push takes whose values arrive in that many bytes."""
        return self._store.staging_bytes(received_bytes)

    def push(self, push: Push, staging: Staging, reservation: Reservation) -> "Future[PushResult]":
        """Takes a push; the future has its result once its update is published and durable.

        A caller that gives up `reservation` holds `lock` until it has: leaving the lock may raise too.

        Args:
            push: The push, with fingerprint and norm.
            staging: Its values.
            reservation: Their memory. The engine releases it when it needs the values no longer; if this method
                raises, the caller does.

        Raises:
            Refused: The push is not accepted.
        """
        with self.lock:
            failpoint("push.staged")
            self._check_journal(1)  # while the push can still be refused: afterwards the update has to be written
            emit_accepted = self._events.pushed(push)
            decisions = self.machine.push(push, self._clock.monotonic())
            failpoint("push.accepted")
            if not decisions:  # the push waits, or has waited already
                pending = self._answers.get(push.key)
                if pending:  # an earlier call of the same push waits for the round
                    reservation.release()
                    return pending
            future = self._answers.expect(push.key)
            self._staged.add(push.key, staging, reservation)
            if emit_accepted:
                emit_accepted()
            self._carry_out(decisions)
            return future

    def acquire_version(self, *, applied: bool = False) -> tuple[Position, Version]:
        """Returns the current version for reading; the caller releases it.

        Args:
            applied: For the answer to a push that was applied. It is given even if the model has ended since, as long
                as no fault has ended it.

        Raises:
            Refused: The model has ended, or its journal cannot be written.
            BudgetExceeded: There is no memory to keep a version that is read.
        """
        with self.lock.mutex if applied else self.lock.read_lock:  # the mutex admits it to a model that has ended
            self._check_usable()
            version, position = self._store.current, self.position
            version.acquire()
        try:
            self.lock.flush()  # nobody may see weights that a crash could take back
        except Refused:
            version.release()
            raise
        return position, version

    @contextmanager
    def reading(self) -> Iterator[tuple[Position, Vector]]:
        """Gives the current version's weights, which do not change within the block."""
        position, version = self.acquire_version()
        try:
            yield position, version.weights
        finally:
            version.release()

    @contextmanager
    def watched(self) -> Iterator[Watcher]:
        """Gives a queue of the model's versions, beginning with the current one."""
        with self.lock.read_lock:
            first = Updated(model=self.machine.name, position=self.position, summary=None)
            watcher = self._subscribers.watch(first)
        try:
            self.lock.flush()
            yield watcher
        finally:
            self._subscribers.unwatch(watcher)

    @contextmanager
    def reached(self, version: int, limit: int) -> "Iterator[Future[None]]":
        """Gives a future that is done once the model reaches a version; raises Refused if `limit` callers wait."""
        future: Future[None] = Future()
        with self.lock.read_lock:
            reached = self.machine.version >= version
            if not reached:
                self._subscribers.wait(future, version, limit)
        if reached:
            self.lock.flush()
            future.set_result(None)
        try:
            yield future
        finally:
            self._subscribers.forget(future)

    def change(self, groups: tuple[Optimizer, ...], policy: Policy) -> int:
        """Changes hyperparameters and policy; returns the first version made with them."""
        with self.lock:
            self._check_journal(1)
            first_version, decisions = self.machine.change(groups, policy, self._clock.monotonic())
            # When a policy without rounds replaces a synchronous one, the open round does not close: each of its pushes
            # becomes an update.
            self._events.synchronous = isinstance(self.machine.policy, Sync)
            self._commits.add(Changed(Settings.of(groups, policy), waits=self.machine.next_settings is not None))
            self._carry_out(decisions)
            if self.storage:
                self.storage.request_snapshot()
            return first_version

    def state(self) -> State:
        """Returns a copy of weights and optimizer state. Must be called under `lock`."""
        return self._store.state()

    def put_state(self, state: State, update_counts: Sequence[int]) -> None:
        """Replaces weights and optimizer state."""
        with self.lock:
            self._check_journal(len(state.vectors))  # each takes as much room as a push
            # The journal still writes `state` while the next update changes the store's.
            own = state.copy() if self.journals else state
            self._store.put(own, self.machine.version + 1)
            self.machine.put_state(update_counts)
            self._commits.add(StatePut(tuple(update_counts)), state.pieces())
            self._publish(self.machine.version)
            if self.storage:
                self.storage.request_snapshot()

    def extend(
        self, tensors: Sequence[Tensor], groups: Sequence[Optimizer], weights: Vector, reservation: Reservation
    ) -> None:
        """Adds tensors and groups at the end of the layout."""
        with self.lock:
            self._check_journal()
            self.lock.check_room(1, weights.size, extension_entries(tensors, groups))
            self._store.extend(initial_state(weights, Layout(tuple(tensors)), (*self.machine.groups, *groups)))
            self.machine.extend(tensors, groups)
            self._commits.add(Extended(tuple(tensors), tuple(groups)), [(0, weights)])
            self._reservations.append(reservation)
            if self.storage:
                self.storage.request_snapshot()

    @contextmanager
    def inspected(self) -> Iterator[Position]:
        """Locks the model for a look, even if it has ended; gives the last position that is durable and published."""
        with self.lock.mutex:
            with suppress(StorageError):  # a list of models must not fail for one broken disk
                self._commits.flush()
            yield self._position(self._published_version)

    def end(self, refusal: Refused) -> None:
        """Ends the model: every call that waits and every later one gets `refusal`. `release` returns its memory."""
        with self.lock.mutex, self._commits.quiet():  # quiet: nobody else may set the futures that are failed here
            self.lock.ended = self.lock.ended or refusal  # the first reason is the true one
            self._answers.fail(refusal)
            self._subscribers.end(refusal)
            self._staged.clear()
            self._shared.clear()

    def lose(self, refusal: Refused) -> None:
        """Ends the model for good: its state is not saved any more."""
        with self.lock.mutex:
            self._failed = True
            self.end(refusal)

    def release(self) -> None:
        """Returns the model's memory."""
        for reservation in self._reservations:
            reservation.release()

    def version_bumped(self) -> None:
        """Journals the version bump that recovery made for waiting workers."""
        with self.lock:
            self._commits.add(VersionBumped(self.machine.version))

    def is_due(self) -> bool:
        """Returns whether it is time for a snapshot."""
        return self.storage is not None and not self.lock.ended and self.storage.due(self.machine.version)

    def save(self) -> Entry:
        """Takes a snapshot; returns when it is on disk. Raises Refused, BudgetExceeded or OSError if that fails."""
        if self.storage is None:
            raise Refused("NOT_DURABLE")
        entry = self.storage.save(self._checkpoint)
        self._events.snapshot_taken(entry)
        return entry

    def close(self) -> None:
        """Takes the last snapshot of a model that `end` has ended, and closes its files; raises as `save` does."""
        if self.storage:
            self._check_usable()
            self.storage.close(self._checkpoint)
            self._events.snapshot_taken(self.storage.last)

    def _checkpoint(self, rotate: Callable[[], None]) -> Checkpoint:
        """Returns the model as it is now; `rotate` starts the next journal at the same moment."""
        with self.lock.mutex:
            self._check_usable()
            frozen = self._store.freeze()  # no copy yet: the next update makes it, if the snapshot still reads
            rotate()
            return Checkpoint(MachineState.of(self.machine), frozen, self._commits.index)

    def _check_usable(self) -> None:
        """Raises the refusal that ended the model, if a fault or a deletion did."""
        if self._failed:
            assert self.lock.ended
            raise self.lock.ended.with_traceback(None)

    def _check_journal(self, pushes: int = 0) -> None:
        """Raises Refused STORAGE_UNAVAILABLE if the journal has no room for the updates that the event may cause."""
        machine = self.machine
        entries = len(machine.layout.tensors) + len(machine.groups)
        self.lock.check_room(pushes + len(self._staged), machine.layout.size, entries)

    def _position(self, version: int) -> Position:
        durable = self.storage.durable_version(version) if self.storage else None
        return Position(self._incarnation, version, durable)

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        try:
            for decision in decisions:
                match decision:
                    case Fold(key, factor):
                        self._staged.fold(key, factor)
                    case Combine(pushes, trim):
                        self._staged.combine(pushes, trim)
                    case Update():
                        self._update(decision)
                    case BumpVersion(version):
                        self._store.current.number = version
                        self._commits.add(VersionBumped(version))
                        self._publish(version)
                    case Answer(key, outcome) | Refuse(key, outcome):
                        self._staged.discard(key)  # of a duplicate, or of a push that was given up
                        self._answers.settle(key, outcome)
        except Exception:  # the decisions are half carried out: better no model than a wrong one
            incident = secrets.token_hex(8)
            _log.exception("incident %s: model %s has failed and is not served any more", incident, self.machine.name)
            self.lose(Refused("INTERNAL", incident=incident))
            raise Refused("INTERNAL", incident=incident) from None
        self._events.decided(decisions)
        due = self.machine.due()
        if due is not None:
            self._schedule_tick(due)

    def _update(self, update: Update) -> None:
        layout, summary = self.machine.layout, update.summary
        ranges = [Range(*part) for part in layout.ranges(update.absent, summary.hyperparameters, update.counts)]
        gradient = self._store.gradient(update.weight) if self.journals else None  # the update uses it up
        summary.norm = self._store.update(ranges, update.weight, summary.version)
        failpoint("push.published")
        used = self._staged.take_reduced()
        if gradient:
            record = UpdatedRecord(
                summary=summary, absent=update.absent, sources=update.sources, divisor=gradient.divisor
            )
            self._commits.add(record, gradient.pieces, partial(_release, used, gradient.done))
        else:
            self._commits.index += 1  # without a journal it only says that a snapshot is out of date
            _release(used)
        self._publish(summary.version, summary)
        self._events.round_closed(summary.version, len(summary.contributions))

    def _publish(self, version: int, summary: UpdateSummary | None = None) -> None:
        self._commits.on_durable(partial(self._published, version, summary))

    def _published(self, version: int, summary: UpdateSummary | None) -> None:
        self._published_version = version
        if self._subscribers or self._observers.wants(Updated):
            event = Updated(model=self.machine.name, position=self._position(version), summary=summary)
            self._subscribers.updated(event)
            self._observers.emit(event)


def _release(reservations: Sequence[Reservation], done: Callable[[], None] | None = None) -> None:
    for reservation in reservations:
        reservation.release()
    if done:
        done()
