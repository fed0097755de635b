"""Sessions of workers: ids, epochs, ranks, leases, and the sequence numbers that make a push count exactly once."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from deltaserve_server.model.push import Push, PushResult, PushStatus
from deltaserve_server.model.refused import Refused

_K = TypeVar("_K")
_V = TypeVar("_V")

WINDOW = 8
"""How many results a session keeps for duplicates."""

_MAX_NAMES = 65_536
"""How many worker names' epochs, and how many fenced sessions, a model keeps."""

_MAX_ENDED = 1024
"""How many ended sessions a model keeps, for workers that ask what became of a push."""


@dataclass(slots=True)
class Record:
    """An accepted push in the window of its session.

    Attributes:
        fingerprint: Fingerprint of its values.
        result: Its result; None while it waits for its update, or where the result is no longer known.
    """

    fingerprint: int | None
    result: PushResult | None = None


@dataclass(slots=True)
class Session:
    """One worker's session with one model.

    Its pushes are numbered 1, 2, 3, ... At most one of them is accepted and not applied yet.

    Attributes:
        worker: The worker's name.
        id: 16 bytes, chosen by the server.
        epoch: How many sessions of this name the model has had. A higher epoch fences a lower one.
        rank: The lowest number that no other live session had when this one opened.
        tensor_count: How many tensors the layout had when it opened.
        group_count: How many parameter groups the model had when it opened.
        lease_seconds: How long it outlives its last call.
        expires: When its lease runs out.
        first_version: Version of the weights to compute its first push on.
        member: Whether it belongs to the open round.
        last_accepted: Sequence number of its last accepted push.
        last_applied: Sequence number of its last push that is part of an update.
        clock: How many steps it has made, counted from the slowest session when it opened. Only `Bounded` counts.
        window: Its last accepted pushes by sequence number.
    """

    worker: str
    id: bytes
    epoch: int
    rank: int
    tensor_count: int
    group_count: int
    lease_seconds: float
    expires: float
    first_version: int
    member: bool = True
    last_accepted: int = 0
    last_applied: int = 0
    clock: int = 0
    window: dict[int, Record] = field(default_factory=dict)

    @property
    def waiting(self) -> bool:
        """Whether one of its pushes waits for a round to close."""
        return self.last_applied < self.last_accepted

    def renew(self, now: float) -> None:
        """Restarts the lease. It never becomes shorter: calls may arrive out of order."""
        self.expires = max(self.expires, now + self.lease_seconds)

    def expired(self, now: float) -> bool:
        """Returns whether the lease has run out."""
        return now >= self.expires

    def known(self, push: Push) -> bool:
        """Returns whether the push was accepted before.

        Its sequence number decides. Within the window, its values must also be those of the first time.

        Raises:
            Refused: SEQUENCE_GAP; SEQUENCE_REUSED for other values; PUSH_INVALID for a number below 1.
        """
        if push.sequence < 1:
            raise Refused("PUSH_INVALID", field="sequence", allowed=">= 1")
        # The push before may be lost or still on its way; accepting this one would make that loss final.
        if push.sequence > self.last_accepted + 1:
            raise Refused("SEQUENCE_GAP", expected=self.last_accepted + 1, got=push.sequence)
        if push.sequence == self.last_accepted + 1:
            return False
        # A worker that reuses a number for another gradient would lose it without notice.
        record = self._in_window(push.sequence)
        if record and push.fingerprint is not None and push.fingerprint != record.fingerprint:
            raise Refused("SEQUENCE_REUSED", sequence=push.sequence)
        return True

    def accept(self, sequence: int, fingerprint: int | None) -> None:
        """Records that a push will become part of an update."""
        self.last_accepted = sequence
        self.window[sequence] = Record(fingerprint)

    def apply(self, sequence: int, result: PushResult, now: float) -> None:
        """Records that an accepted push became part of an update."""
        self.last_applied = sequence
        self.window[sequence].result = result
        # `accept` must not drop it: `give_up` moves the window back by one.
        self.window.pop(sequence - WINDOW, None)
        self.renew(now)

    def give_up(self, sequence: int, now: float) -> None:
        """Takes back that the last push was accepted. Its sequence number is free again."""
        self.last_accepted = sequence - 1
        del self.window[sequence]
        self.renew(now)

    def status(self, sequence: int, version: int, live: bool) -> PushStatus:
        """Returns what became of a push; `live` says whether the session has not ended."""
        if sequence > self.last_accepted:
            return PushStatus("not accepted", final=not live)
        result = self.result(sequence, version)
        return PushStatus("applied", final=True, result=result) if result else PushStatus("waiting", final=False)

    def result(self, sequence: int, version: int) -> PushResult | None:
        """Returns the result of an accepted push; None while it waits for its round."""
        if sequence > self.last_applied:
            return None
        record = self._in_window(sequence)
        return record.result if record and record.result else PushResult(version=version)

    def _in_window(self, sequence: int) -> Record | None:
        # While a push waits, the window holds one record more, for the case that the push is given up.
        return self.window.get(sequence) if sequence > self.last_accepted - WINDOW else None


class Sessions:
    """The live sessions of one model, at most one for a worker name, and a bounded history of the ended ones.

    Ended sessions are kept because a worker may come back after its lease with a push whose answer it never got: the
    history still knows whether that push counted.

    Attributes:
        epochs: By worker name: the last epoch.
        fenced: By session id: the worker whose newer session fenced it.
        ended: Ended sessions by id, the newest last.
    """

    def __init__(self) -> None:
        self._by_id: dict[bytes, Session] = {}
        self._by_name: dict[str, Session] = {}
        self.epochs: OrderedDict[str, int] = OrderedDict()
        self.fenced: OrderedDict[bytes, str] = OrderedDict()
        self.ended: OrderedDict[bytes, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    # --- live sessions

    def live(self) -> list[Session]:
        """Returns the live sessions in the order of worker names."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def late(self) -> list[Session]:
        """Returns the live sessions that opened too late for the open round."""
        return [session for session in self.live() if not session.member]

    def slowest_clock(self) -> int:
        """Returns the clock of the live session that has made the fewest steps; 0 without sessions."""
        return min((session.clock for session in self._by_id.values()), default=0)

    def named(self, worker: str) -> Session | None:
        """Returns the live session of a worker name."""
        return self._by_name.get(worker)

    def find(self, session_id: bytes) -> Session | None:
        """Returns a live session."""
        return self._by_id.get(session_id)

    def get(self, session_id: bytes, epoch: int) -> Session:
        """Returns a live session, for a call that must have one.

        Raises:
            Refused: SESSION_FENCED, SESSION_UNKNOWN, or PUSH_INVALID for an epoch that is not the session's.
        """
        session = self._by_id.get(session_id)
        if session:
            if session.epoch != epoch:
                raise Refused("PUSH_INVALID", field="epoch", allowed=f"{session.epoch}, as OpenSession answered")
            return session
        worker = self._fenced_worker(session_id)
        if worker is None:
            raise Refused("SESSION_UNKNOWN")
        raise Refused("SESSION_FENCED", worker=worker, epoch=epoch, current=self.epochs.get(worker, 0))

    # --- opening and ending

    def new_epoch(self, worker: str) -> int:
        """Returns an epoch for a new session: one more than the name's last."""
        epoch = self.epochs.pop(worker, 0) + 1  # popped, so that the limit drops the names unused for longest
        _keep(self.epochs, worker, epoch, _MAX_NAMES)
        return epoch

    def free_rank(self) -> int:
        """Returns the lowest rank that no live session has."""
        taken = {session.rank for session in self._by_id.values()}
        return next(rank for rank in count() if rank not in taken)

    def add(self, session: Session) -> None:
        """Adds a session and fences an older one of the same name."""
        older = self._by_name.get(session.worker)
        if older:
            self.remove(older)
            _keep(self.fenced, older.id, older.worker, _MAX_NAMES)
        self._by_id[session.id] = self._by_name[session.worker] = session

    def remove(self, session: Session, history: int = _MAX_ENDED) -> None:
        """Ends a live session; `history` limits how many ended ones are kept."""
        del self._by_id[session.id], self._by_name[session.worker]
        _keep(self.ended, session.id, session, history)

    def end(self, ids: Iterable[bytes]) -> None:
        """Ends the sessions that are live among these."""
        for session_id in ids:
            session = self._by_id.get(session_id)
            if session:
                self.remove(session)

    # --- ended sessions

    def find_any(self, session_id: bytes) -> Session | None:
        """Returns a session that is live, or that the history still has."""
        return self._by_id.get(session_id) or self.ended.get(session_id)

    def ended_with(self, push: Push) -> Session | None:
        """Returns the ended session that had accepted a push; None if there is none, or if it was fenced."""
        session = self.ended.get(push.session_id)
        # A fenced worker must learn that it was fenced, not go on with duplicates.
        if session is None or session.epoch != push.epoch or self._fenced_worker(session.id):
            return None
        return session if 1 <= push.sequence <= session.last_accepted else None

    def _fenced_worker(self, session_id: bytes) -> str | None:
        """Returns the worker of a session that a newer one of the same name fenced, before or after it ended."""
        # The epoch tells it even where the session ended first, and was never replaced as a live one.
        ended = self.ended.get(session_id)
        if ended and self.epochs.get(ended.worker, 0) > ended.epoch:
            return ended.worker
        return self.fenced.get(session_id)

    def restore(self, session: Session) -> None:
        """Adds a session that opened before a restart, and its epoch."""
        self.add(session)
        _keep(self.epochs, session.worker, session.epoch, _MAX_NAMES)
        self.epochs.move_to_end(session.worker)


def _keep(table: OrderedDict[_K, _V], key: _K, value: _V, limit: int) -> None:
    """Adds an entry; drops the oldest one if the table is over the limit."""
    table[key] = value
    if len(table) > limit:
        table.popitem(last=False)
