"""The one owner of a model: runs its state machine and carries out what it decides, one event at a time.

It has no thread of its own. Whoever brings an event holds the model's lock until its decisions are carried out; a
handler of a sync gRPC server is never interrupted, so neither is an update.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic, sleep

from deltaserve._common.failpoints import failpoint
from deltaserve.v1 import common_pb2
from deltaserve_server.durability.commits import Commits, StorageError, extension_entries
from deltaserve_server.durability.folder import Head
from deltaserve_server.durability.model_storage import Checkpoint, ModelStorage
from deltaserve_server.durability.records import Changed, Ended, Extended, Opened, StatePut, Updated, VersionBumped
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.engine import watch
from deltaserve_server.engine.model_lock import ModelLock, ReadLock
from deltaserve_server.engine.shared_gradients import SharedGradients
from deltaserve_server.engine.version_subscribers import VersionSubscribers
from deltaserve_server.engine.watch import Watcher
from deltaserve_server.memory import (
    Budget,
    BudgetExceeded,
    Range,
    Reservation,
    Staging,
    State,
    Store,
    Version,
)
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import (
    Answer,
    BumpVersion,
    Combine,
    Decision,
    Fold,
    Hyperparameters,
    Key,
    Machine,
    Policy,
    Push,
    PushResult,
    Refuse,
    Refused,
    Session,
    Tensor,
    Update,
    UpdateSummary,
)
from deltaserve_server.model.state import MachineState, SessionState, Settings

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.05


class ModelEngine(ModelLock):
    """Owns one model.

    Args:
        machine: Its state machine.
        store: Its vectors.
        reservation: The memory that it holds.
        incarnation: Of the server process.
        alarm: Is told when `tick` is wanted.
        storage: Keeps it safe; None where nothing does.

    Attributes:
        machine: To be read under `lock` alone.
        lock: Held while an event is handled; `event` also tells whether the model is still there.
        storage: As above.
        head: Its lineage.
    """

    def __init__(
        self,
        machine: Machine,
        store: Store,
        reservation: Reservation,
        incarnation: str,
        alarm: Callable[[float], None],
        storage: ModelStorage | None = None,
    ) -> None:
        super().__init__(storage.commits if storage else Commits())
        self.machine = machine
        self.storage = storage
        self._lost = False
        self._told_version = machine.version
        self.head = storage.head if storage else Head.new()
        self._store = store
        self._reservations = [reservation]
        self._incarnation = incarnation
        self._alarm = alarm
        self._staged: dict[Key, tuple[Staging, Reservation]] = {}
        self._folded: list[Reservation] = []
        self._answers: dict[Key, Future[PushResult]] = {}
        self._untold: set[Future[PushResult]] = set()
        self._subscribers = VersionSubscribers()
        self._present: Counter[bytes] = Counter()
        self._shared = SharedGradients()

    @property
    def position(self) -> common_pb2.ModelPosition:
        """Where the model stands; to be looked at within `event`."""
        return self._at(self.machine.version)

    @property
    def journals(self) -> bool:
        """Whether what happens to it is written down."""
        return self._commits.journals

    @property
    def waiting(self) -> bool:
        """Whether some push waits for its round."""
        return bool(self._answers or self._untold)

    # --- sessions

    def open_session(
        self, worker: str, lease_seconds: float, tensor_count: int | None = None, group_count: int | None = None
    ) -> Session:
        """Gives a worker a standing."""
        with self.event():
            self._ready()
            session, decisions = self.machine.open_session(
                worker, secrets.token_bytes(16), lease_seconds, monotonic(), tensor_count, group_count
            )
            self._carry_out(decisions)
            self._commits.add(Opened(SessionState.of(session)))
            return session

    def keep_session(self, session_id: bytes, epoch: int) -> Session:
        """Renews a lease."""
        with self.event():
            return self.machine.keep_session(session_id, epoch, monotonic())

    def close_session(self, session_id: bytes, epoch: int) -> None:
        """Lets a worker leave."""
        with self.event():
            self._ready()
            decisions = self.machine.close_session(session_id, epoch, monotonic())
            self._commits.add(Ended((session_id,)))
            self._carry_out(decisions)

    def tick(self) -> None:
        """Does what is due: ends the sessions whose lease has run out, and rounds whose time is up."""
        if self._ended:
            return
        with self.event():
            for session_id in self._present:
                self.machine.renew(session_id, monotonic())
            self._ready()
            self._shared.keep({session.id for session in self.machine.sessions.live()})
            gone, decisions = self.machine.tick(monotonic())
            for session in gone:
                _log.warning("model %s: the lease of worker %s ran out", self.machine.name, session.worker)
            if gone:
                self._commits.add(Ended(tuple(session.id for session in gone)))
            self._carry_out(decisions)

    @contextmanager
    def present(self, session: Session) -> Iterator[None]:
        """Keeps a session alive while a call of it waits."""
        with self.lock:
            self._present[session.id] += 1
        try:
            yield
        finally:
            with self.lock:
                self._present -= Counter([session.id])

    # --- shared memory

    def share(self, session: Session, budget: Budget) -> Handle:
        """Gives a session memory for its gradients, as long as it lives; the same again if it has some.

        Raises:
            Refused: SHARED_MEMORY_UNAVAILABLE where the system has none.
            BudgetExceeded: There is no memory for it.
        """
        with ReadLock(self):
            handle = self._shared.share(session.id, self.machine.layout.offsets[session.tensor_count], budget)
            self._store.use_shared_memory()
            return handle

    def shared_memory(self, session_id: bytes) -> Vector | None:
        """Returns where a session's gradients lie; None if it shares no memory."""
        return self._shared.get(session_id)

    # --- pushes

    def check(self, push: Push) -> Session:
        """Looks at a push before its values have come."""
        with ReadLock(self):
            return self.machine.check(push, monotonic())

    def stage(self) -> Staging:
        """Returns a place for a push's values."""
        return self._store.stage()

    def staging_bytes(self, received_bytes: int) -> int:
        """Returns how much memory `stage` takes for a push whose values come in so many bytes."""
        return self._store.staging_bytes(received_bytes)

    def push(self, push: Push, staging: Staging, reservation: Reservation) -> "Future[PushResult]":
        """Takes a push whose values are staged; the future has its result when its update is published.

        To be called within `event`. The reservation is given back when the values are not needed any more; where this
        raises, by the caller.
        """
        with self.event():
            failpoint("push.staged")
            self._ready(1)
            decisions = self.machine.push(push, monotonic())
            failpoint("push.accepted")
            if not decisions and push.key in self._answers:  # it waits for its round since an earlier call
                reservation.release()
                return self._answers[push.key]
            future = self._answers.setdefault(push.key, Future())
            self._staged[push.key] = staging, reservation
            self._carry_out(decisions)
            return future

    # --- the model as a whole

    def change(self, groups: tuple[Hyperparameters, ...], policy: Policy) -> int:
        """Changes hyperparameters and policy; returns the first version that is made with them."""
        with self.event():
            self._ready(1)
            first_version, decisions = self.machine.change(groups, policy, monotonic())
            self._commits.add(Changed(Settings.of(groups, policy), waits=self.machine.next_settings is not None))
            self._carry_out(decisions)
            self._hurry()
            return first_version

    @contextmanager
    def watched(self) -> Iterator[Watcher]:
        """Gives what happens to the model meanwhile."""
        with ReadLock(self):
            watcher = self._subscribers.watch(watch.message(self.position, None))
        try:
            self._flush()
            yield watcher
        finally:
            with self.lock:
                self._subscribers.leave(watcher)

    # --- vectors

    @contextmanager
    def reading(
        self, answer_wanted: Callable[[], bool] | None = None
    ) -> Iterator[tuple[common_pb2.ModelPosition, Vector]]:
        """Gives the current version's weights and keeps them as they are meanwhile.

        Args:
            answer_wanted: Given for a push that was applied: it is answered also where the model has ended in good
                order since; where there is no memory for it, some is waited for as long as this says so.

        Raises:
            BudgetExceeded: There is no memory, and it is not waited for.
        """
        version, position = self._acquire(answer_wanted)
        try:
            yield position, version.weights
        finally:
            version.release()

    def reached(self, version: int, limit: int) -> "Future[None]":
        """Returns a future that is done when the model has reached a version.

        Raises:
            Refused: SESSION_LIMIT where `limit` of them wait already.
        """
        with ReadLock(self):
            if self.machine.version < version:
                return self._subscribers.wait(version, limit)
        self._flush()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def forget(self, future: "Future[None]") -> None:
        """Ends what `reached` began, for a caller who waits no longer."""
        with self.lock:
            self._subscribers.forget(future)

    def state(self) -> State:
        """Returns a copy of weights and optimizer state. To be called within `event`."""
        return self._store.state()

    def put_state(self, state: State, update_counts: Sequence[int]) -> None:
        """Replaces weights and optimizer state."""
        with self.event():
            self._ready(3)
            kept = state.copy() if self.journals else state
            self._store.put(kept, self.machine.version + 1)
            self.machine.put_state(update_counts)
            self._commits.add(
                StatePut(tuple(update_counts)),
                state.pieces(),
            )
            self._published(self.machine.version)
            self._hurry()

    def extend(
        self, tensors: Sequence[Tensor], groups: Sequence[Hyperparameters], weights: Vector, reservation: Reservation
    ) -> None:
        """Adds tensors and groups at the end of the layout."""
        with self.event():
            self._ready()
            self._check_room(1, weights.size, extension_entries(tensors, groups))
            self._store.extend(weights)
            self.machine.extend(tensors, groups)
            self._commits.add(Extended(tuple(tensors), tuple(groups)), [(0, weights)])
            self._reservations.append(reservation)
            self._hurry()

    def end(self, refusal: Refused) -> None:
        """Ends the model: whoever waits, and whoever comes, gets `refusal`. Its own memory stays until `release`."""
        with self.lock, self._commits.quiet():
            self._ended = self._ended or refusal
            for future in (*self._answers.values(), *self._untold):
                future.set_exception(refusal)
            self._subscribers.end(refusal)
            held = [reservation for _, reservation in self._staged.values()]
            for reservation in (*held, *self._folded):
                reservation.release()
            self._answers.clear()
            self._untold.clear()
            self._staged.clear()
            self._shared.clear()

    def lose(self, refusal: Refused) -> None:
        """Ends the model for good."""
        with self.lock:
            self._lost = True
            self.end(refusal)

    def release(self) -> None:
        """Gives the model's own memory back."""
        for reservation in self._reservations:
            reservation.release()

    def _at(self, version: int) -> common_pb2.ModelPosition:
        durable = self.storage.durable_version(version) if self.storage else None
        return common_pb2.ModelPosition(incarnation=self._incarnation, version=version, durable_version=durable)

    # --- what survives

    @contextmanager
    def standing(self) -> Iterator[common_pb2.ModelPosition]:
        """Owns the model for a look that is to be had also when it has ended; gives where it stands for sure."""
        with self.lock:
            with suppress(StorageError):
                self._commits.flush()
            yield self._at(self._told_version)

    def version_bumped(self) -> None:
        """Takes note of a version that the machine has made for those who wait for one, when it came back."""
        with self.event():
            self._commits.add(VersionBumped(self.machine.version))

    def save(self) -> Entry:
        """Takes a snapshot; returns when it is safe.

        Raises:
            Refused: NOT_DURABLE, or the model has ended.
            BudgetExceeded: There is no memory for it.
            OSError: It cannot be written.
        """
        if self.storage is None:
            raise Refused("NOT_DURABLE")
        return self.storage.save(self._cut)

    def is_due(self) -> bool:
        """Whether it is time for a snapshot."""
        return self.storage is not None and not self._ended and self.storage.due(self.machine.version)

    def finish(self) -> None:
        """Ends in good order, once `end` was called: whatever has happened is safe.

        Raises:
            Refused: A fault has ended the model before.
            BudgetExceeded: There is no memory for a last snapshot.
            OSError: It cannot be written.
        """
        if self.storage:
            self._check_whole()
            self.storage.close(self._cut)

    def _cut(self, switch: Callable[[], None]) -> Checkpoint:
        with self.lock:
            self._check_whole()
            frozen = self._store.freeze()
            switch()
            return Checkpoint(MachineState.of(self.machine), frozen, self._commits.index)

    def _check_whole(self) -> None:
        if self._lost:
            assert self._ended
            raise self._ended.with_traceback(None)

    def _hurry(self) -> None:
        if self.storage:
            self.storage.request_snapshot()

    def _ready(self, pushes: int = 0) -> None:
        """Raises Refused STORAGE_UNAVAILABLE where the updates that may follow could not be written down."""
        machine = self.machine
        entries = len(machine.layout.tensors) + len(machine.groups)
        self._check_room(pushes + len(self._staged), machine.layout.size, entries)

    # --- decisions

    def _acquire(self, answer_wanted: Callable[[], bool] | None) -> tuple[Version, common_pb2.ModelPosition]:
        while True:
            with self.lock if answer_wanted else ReadLock(self):
                self._check_whole()
                version, position = self._store.current, self.position
                try:
                    version.acquire()
                    break
                except BudgetExceeded:
                    if not (answer_wanted and answer_wanted()):
                        raise
            sleep(_RETRY_SECONDS)
        try:
            self._flush()
        except Refused:
            version.release()
            raise
        return version, position

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        try:
            for decision in decisions:
                match decision:
                    case Fold(key, factor):
                        self._fold(*self._staged.pop(key), factor)
                    case Combine():
                        self._combine(decision)
                    case Update():
                        self._update(decision)
                    case BumpVersion(version):
                        self._store.current.number = version
                        self._commits.add(VersionBumped(version))
                        self._published(version)
                    case Answer(key, result):
                        self._tell(key, result)
                    case Refuse(key, refusal):
                        self._tell(key, refusal)
        except Exception:
            incident = secrets.token_hex(8)
            _log.exception("incident %s: model %s is lost", incident, self.machine.name)
            self._lost = True
            self.end(Refused("INTERNAL", incident=incident))
            raise Refused("INTERNAL", incident=incident) from None
        due = self.machine.due()
        if due is not None:
            self._alarm(due)

    def _fold(self, staging: Staging, reservation: Reservation, factor: float) -> None:
        """Adds a push to the sum; what is in the sum is not held any longer, a first push that is alone still is."""
        self._folded.append(reservation)
        self._store.fold(staging, factor)
        if len(self._folded) > 1:
            for summed in self._folded:
                summed.release()

    def _combine(self, combine: Combine) -> None:
        pushes = [(*self._staged.pop(key), factor) for key, factor in combine.pushes]
        self._folded += [reservation for _, reservation, _ in pushes]
        self._store.combine([(staging, factor) for staging, _, factor in pushes], combine.trim)

    def _update(self, update: Update) -> None:
        layout, summary = self.machine.layout, update.summary
        ranges = [Range(start, stop, summary.hyperparameters[g]) for start, stop, g in layout.groups(update.absent)]
        gradient = self._store.gradient(update.weight) if self.journals else None
        summary.norm = self._store.update(ranges, update.weight, summary.version)
        failpoint("push.published")
        held, self._folded = self._folded, []
        if gradient:
            event = Updated(summary=summary, absent=update.absent, sources=update.sources, divisor=gradient.divisor)
            self._commits.add(event, gradient.pieces, partial(_release, held, gradient.done))
        else:
            self._commits.index += 1
            _release(held)
        self._published(summary.version, summary)

    def _tell(self, key: Key, outcome: PushResult | Refused) -> None:
        """Has whoever waits for a push told what became of it; who sends it again from now on waits for another."""
        future = self._close(key)
        self._untold.add(future)
        self._commits.on_durable(partial(self._told, future, outcome))

    def _told(self, future: "Future[PushResult]", outcome: PushResult | Refused) -> None:
        self._untold.discard(future)
        if future.done():
            return  # the model has ended meanwhile
        if isinstance(outcome, Refused):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _close(self, key: Key) -> "Future[PushResult]":
        """Returns what whoever waits for a push waits for."""
        staged = self._staged.pop(key, None)
        if staged:  # a duplicate, or given up: its values are not used
            staged[1].release()
        return self._answers.pop(key, None) or Future()

    def _published(self, version: int, summary: UpdateSummary | None = None) -> None:
        """Has those told who watch, and those woken who wait for the version."""
        message = watch.message(self._at(version), summary) if self._subscribers.watches else None
        self._commits.on_durable(partial(self._note, version))
        told = self._subscribers.told(version, message)
        if told:
            self._commits.on_durable(told)

    def _note(self, version: int) -> None:
        self._told_version = version


def _release(held: Sequence[Reservation], done: Callable[[], None] | None = None) -> None:
    for reservation in held:
        reservation.release()
    if done:
        done()
