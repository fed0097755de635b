"""Tells the observers what happens to one model."""

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.engine.events import (
    LeaveReason,
    Observers,
    Pushed,
    RoundClosed,
    SessionJoined,
    SessionLeft,
    SnapshotTaken,
)
from deltaserve_server.model import Decision, Machine, Push, Refuse, Session, Sync


class ModelEvents:
    """Builds the events that somebody listens for, and emits them once they are durable.

    The caller holds the model's lock, except for `snapshot_taken`.

    Args:
        machine: The model's state machine.
        observers: Receive the events.
        on_durable: Calls a function once everything that happened so far is durable.
        snapshot: Number of the model's last snapshot, 0 if there is none.

    Attributes:
        synchronous: Whether updates close rounds from now on.
    """

    def __init__(
        self,
        machine: Machine,
        observers: Observers,
        on_durable: Callable[[Callable[[], None]], None],
        snapshot: int,
    ) -> None:
        self._machine = machine
        self._observers = observers
        self._on_durable = on_durable
        self.synchronous = isinstance(machine.policy, Sync)
        self._snapshot = snapshot
        self._lock = Lock()

    def session_joined(self, session: Session) -> None:
        """A worker opened a session."""
        if self._observers.wants(SessionJoined):
            name, worker = self._machine.name, session.worker
            self._emit(SessionJoined(model=name, worker=worker, epoch=session.epoch, rank=session.rank))

    def session_left(self, session: Session, reason: LeaveReason) -> None:
        """A session ended."""
        if self._observers.wants(SessionLeft):
            name, worker = self._machine.name, session.worker
            self._emit(SessionLeft(model=name, worker=worker, epoch=session.epoch, reason=reason))

    def pushed(self, push: Push) -> Callable[[], None] | None:
        """Returns what emits the event of a push, if the state machine accepts it; None if it had accepted it before.

        Must be called before the state machine has seen the push's values.
        """
        if not self._observers.wants(Pushed):
            return None
        # Afterwards a duplicate looks like the push itself.
        session = self._machine.sessions.find_any(push.session_id)
        if session is None or push.sequence <= session.last_accepted:
            return None
        name, worker = self._machine.name, session.worker
        event = Pushed(model=name, worker=worker, epoch=push.epoch, sequence=push.sequence, norm=push.norm)
        return partial(self._emit, event)

    def round_closed(self, version: int, pushes: int) -> None:
        """An update was made; with a synchronous policy it closes a round."""
        if self.synchronous and self._observers.wants(RoundClosed):
            self._emit(RoundClosed(model=self._machine.name, version=version, pushes=pushes))

    def decided(self, decisions: Sequence[Decision]) -> None:
        """The decisions of an event are carried out; some may have given a round up."""
        self.synchronous = isinstance(self._machine.policy, Sync)
        if decisions and self._observers.wants(RoundClosed):
            failed = [d for d in decisions if isinstance(d, Refuse) and d.refusal.reason == "ROUND_FAILED"]
            if failed:
                self._emit(RoundClosed(model=self._machine.name, version=None, pushes=len(failed)))

    def snapshot_taken(self, entry: Entry) -> None:
        """A snapshot is on disk; one snapshot may answer several requests, and is one event."""
        with self._lock:  # several threads may wait for the same snapshot
            new, self._snapshot = entry.number > self._snapshot, max(entry.number, self._snapshot)
        if new and self._observers.wants(SnapshotTaken):
            number, version, size = entry.number, entry.version, entry.bytes
            self._observers.emit(SnapshotTaken(model=self._machine.name, number=number, version=version, bytes=size))

    def _emit(self, event: object) -> None:
        self._on_durable(partial(self._observers.emit, event))
