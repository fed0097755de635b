"""What happens to models, as values, and the one interface through which others learn of it.

An event of a model is emitted once it is durable: at once for a model without a journal, after its record is written
for a model with one. The journal itself is therefore no observer: it decides when observers hear of an event.

The fields `model`, `worker`, `epoch`, `rank` and `sequence` are what the contract calls so.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deltaserve_server.model import UpdateSummary

_log = logging.getLogger(__name__)

LeaveReason = Literal["closed", "expired", "replaced"]


class Position(NamedTuple):
    """Where a model stands.

    Attributes:
        incarnation: Identifies the server process.
        version: The model's current version.
        durable_version: The newest version that survives the server's death; None without a data directory.
    """

    incarnation: str
    version: int
    durable_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A model accepted a push. The push is part of an update already, or waits for its round.

    Attributes:
        norm: L2 norm of the gradient.
    """

    model: str
    worker: str
    epoch: int
    sequence: int
    norm: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Updated:
    """A model has a new version. Compared by identity: all watchers of a model share one event.

    Attributes:
        position: Where the model stands with this version.
        summary: The update that made the version; None if there was no update, as after PutState.
    """

    model: str
    position: Position
    summary: UpdateSummary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionJoined:
    """A worker opened a session."""

    model: str
    worker: str
    epoch: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLeft:
    """A session ended.

    Attributes:
        reason: "closed" by its worker, "expired" with its lease, or "replaced" by a newer session of its worker.
    """

    model: str
    worker: str
    epoch: int
    reason: LeaveReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundClosed:
    """A round of a synchronous model ended.

    Attributes:
        version: The version that the round made; None if the round failed.
        pushes: How many pushes the round had.
    """

    model: str
    version: int | None
    pushes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken:
    """A snapshot of a model is on disk.

    Attributes:
        number: Counts the model's snapshots.
        version: The model's version in the snapshot.
        bytes: The snapshot's size.
    """

    model: str
    number: int
    version: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelServed:
    """The server serves a model: a client created it, or it was recovered from the data directory."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDeleted:
    """A client deleted a model, and all its sessions ended. Events of pushes under way may still follow."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRefused:
    """The server refused a request.

    Attributes:
        method: Full name of the RPC, as in "deltaserve.v1.WorkerService.Step".
        reason: A name of `deltaserve.v1.ErrorReason` without its prefix.
    """

    method: str
    reason: str


class Observer:
    """Learns of events. A subclass overrides the methods of the events that it wants; the others cost nothing.

    A method must return quickly and must not call the engine: the caller holds locks. `pushed`, `updated`, the session
    events and `round_closed` run in the thread that makes the event durable. Without a journal that thread holds the
    model's lock; with one it holds the journal's write lock, and perhaps the model's too. `model_served` and
    `model_deleted` run under the catalog's lock, `snapshot_taken` in the thread that took the snapshot and `refused` in
    the thread of the call, both without a lock. Several threads may call a method at once. What a method raises is
    logged and goes no further.
    """

    def pushed(self, event: Pushed) -> None:
        """A model accepted a push."""

    def updated(self, event: Updated) -> None:
        """A model has a new version."""

    def session_joined(self, event: SessionJoined) -> None:
        """A worker opened a session."""

    def session_left(self, event: SessionLeft) -> None:
        """A session ended."""

    def round_closed(self, event: RoundClosed) -> None:
        """A round ended."""

    def snapshot_taken(self, event: SnapshotTaken) -> None:
        """A snapshot is on disk."""

    def model_served(self, event: ModelServed) -> None:
        """The server serves a model."""

    def model_deleted(self, event: ModelDeleted) -> None:
        """A model was deleted."""

    def refused(self, event: RequestRefused) -> None:
        """The server refused a request."""


_METHODS = {
    Pushed: Observer.pushed,
    Updated: Observer.updated,
    SessionJoined: Observer.session_joined,
    SessionLeft: Observer.session_left,
    RoundClosed: Observer.round_closed,
    SnapshotTaken: Observer.snapshot_taken,
    ModelServed: Observer.model_served,
    ModelDeleted: Observer.model_deleted,
    RequestRefused: Observer.refused,
}


class Observers:
    """Several observers as one; each event reaches them in order."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        # Only overridden methods: an event that nobody wants need not even be built.
        self._methods: dict[type, list[Callable[[Any], None]]] = {}
        for observer in observers:
            for kind, method in _METHODS.items():
                if getattr(type(observer), method.__name__) is not method:
                    self._methods.setdefault(kind, []).append(getattr(observer, method.__name__))

    def wants(self, kind: type) -> bool:
        """Returns whether anybody listens for a kind of event: if nobody does, the event need not be built."""
        return kind in self._methods

    def emit(self, event: object) -> None:
        """Passes an event to every observer that listens for its kind. Never raises."""
        for method in self._methods.get(type(event), ()):
            try:
                method(event)
            except Exception:  # an observer's fault must not cost an update
                _log.exception("an observer failed on %s", event)


class LogObserver(Observer):
    """Writes to the log what an operator wants to know of."""

    def session_left(self, event: SessionLeft) -> None:
        """Logs a lease that ran out: the worker may have died."""
        if event.reason == "expired":
            _log.warning("model %s: the lease of worker %s ran out", event.model, event.worker)


NO_OBSERVERS = Observers()
