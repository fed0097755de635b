"""Workers' standing with one model: ids, epochs, ranks, leases, sequence windows."""

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
"""How many results of a session are kept for duplicates."""

_REMEMBERED = 65_536
"""How many names' epochs, and how many fenced sessions, are remembered at most."""

_ENDED = 1024
"""How many sessions that have ended are kept, for those who ask what became of a push."""


@dataclass(slots=True)
class Record:
    """A push of the window: what it contained, and its result once its update is made."""

    fingerprint: int | None
    result: PushResult | None = None


@dataclass(slots=True)
class Session:
    """One worker's standing.

    Attributes:
        worker: The worker's name.
        id: 16 bytes, made by the server.
        epoch: How many sessions of this name there have been.
        rank: The lowest number that no other live session had when it came.
        tensor_count: How many tensors the layout had when it came.
        group_count: How many parameter groups the model had when it came.
        lease_seconds: How long it outlives its last call.
        expires: Time at which its lease runs out.
        first_version: Version on whose weights its first push is to be computed.
        member: Whether the open round waits for it.
        last_accepted: Sequence number of its last accepted push.
        last_applied: Sequence number of its last push that is part of an update.
        clock: How many steps it has made, counted from where the slowest stood when it came; of use to `Bounded` alone.
        window: By sequence number: the pushes that are remembered.
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
        """Whether a push of this session waits for its round."""
        return self.last_applied < self.last_accepted

    def renew(self, now: float) -> None:
        """Starts the lease anew."""
        self.expires = max(self.expires, now + self.lease_seconds)

    def expired(self, now: float) -> bool:
        """Whether the lease has run out."""
        return now >= self.expires

    def known(self, push: Push) -> bool:
        """Whether the push was accepted before, by its sequence number and, once they are here, its values.

        Raises:
            Refused: SEQUENCE_GAP, or SEQUENCE_REUSED for other content.
        """
        if push.sequence < 1:
            raise Refused("PUSH_INVALID", field="sequence", allowed=">= 1")
        if push.sequence > self.last_accepted + 1:
            raise Refused("SEQUENCE_GAP", expected=self.last_accepted + 1, got=push.sequence)
        if push.sequence == self.last_accepted + 1:
            return False
        record = self._recent(push.sequence)
        if record and push.fingerprint is not None and push.fingerprint != record.fingerprint:
            raise Refused("SEQUENCE_REUSED", sequence=push.sequence)
        return True

    def accept(self, sequence: int, fingerprint: int | None) -> None:
        """Takes note of a push that is to become part of an update."""
        self.last_accepted = sequence
        self.window[sequence] = Record(fingerprint)

    def apply(self, sequence: int, result: PushResult, now: float) -> None:
        """Takes note of an update that a push became part of."""
        self.last_applied = sequence
        self.window[sequence].result = result
        self.window.pop(sequence - WINDOW, None)  # not before: the push might have been given up
        self.renew(now)

    def give_up(self, sequence: int, now: float) -> None:
        """Takes back that the last push was accepted: it will not become part of an update, and its number is free."""
        self.last_accepted = sequence - 1
        del self.window[sequence]
        self.renew(now)

    def status(self, sequence: int, version: int, live: bool) -> PushStatus:
        """Returns where a push stands; `version` is the model's, `live` whether the session has not ended."""
        if sequence > self.last_accepted:
            return PushStatus("not accepted", final=not live)
        if sequence > self.last_applied:
            return PushStatus("waiting", final=False)
        return PushStatus("applied", final=True, result=self._first_result(sequence, version))

    def result(self, sequence: int, version: int) -> PushResult | None:
        """Returns what a known push gets as a duplicate, or None while it waits for its round."""
        return None if sequence > self.last_applied else self._first_result(sequence, version).again()

    def _first_result(self, sequence: int, version: int) -> PushResult:
        record = self._recent(sequence)
        return record.result if record and record.result else PushResult(version=version)

    def _recent(self, sequence: int) -> Record | None:
        """Returns the record of a push that is among the last accepted."""
        return self.window.get(sequence) if sequence > self.last_accepted - WINDOW else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """What a model remembers of sessions that live no longer.

    Attributes:
        epochs: By worker name: the last epoch.
        fenced: By session id: the worker whose newer session has fenced it.
        ended: Sessions that have ended, the newest last.
    """

    epochs: tuple[tuple[str, int], ...]
    fenced: tuple[tuple[bytes, str], ...]
    ended: tuple[Session, ...]


class Sessions:
    """The live sessions of one model, at most one a worker name."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, Session] = {}
        self._by_name: dict[str, Session] = {}
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._fenced: OrderedDict[bytes, str] = OrderedDict()
        self._ended: OrderedDict[bytes, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def image(self) -> "Remembered":
        """Returns what is to be written down beside the live sessions."""
        return Remembered(
            epochs=tuple(self._epochs.items()), fenced=tuple(self._fenced.items()), ended=tuple(self._ended.values())
        )

    def remember(self, remembered: "Remembered") -> None:
        """Takes over what was written down, before any session is added."""
        self._epochs = OrderedDict(remembered.epochs)
        self._fenced = OrderedDict(remembered.fenced)
        self._ended = OrderedDict((session.id, session) for session in remembered.ended)

    def live(self) -> list[Session]:
        """Returns the live sessions in order of worker names."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def named(self, worker: str) -> Session | None:
        """Returns the live session of a worker name."""
        return self._by_name.get(worker)

    def new_epoch(self, worker: str) -> int:
        """Returns an epoch one higher than the name's last."""
        epoch = self._epochs.pop(worker, 0) + 1
        _remember(self._epochs, worker, epoch)
        return epoch

    def free_rank(self) -> int:
        """Returns the lowest rank that no live session has."""
        taken = {session.rank for session in self._by_id.values()}
        return next(rank for rank in count() if rank not in taken)

    def add(self, session: Session) -> None:
        """Adds a session; an older one of the same name is fenced."""
        older = self._by_name.get(session.worker)
        if older:
            self.remove(older)
            _remember(self._fenced, older.id, older.worker)
        self._by_id[session.id] = self._by_name[session.worker] = session

    def restore(self, session: Session) -> None:
        """Adds a session that was opened before a restart."""
        self.add(session)
        _remember(self._epochs, session.worker, session.epoch)
        self._epochs.move_to_end(session.worker)

    def end(self, ids: Iterable[bytes]) -> None:
        """Ends sessions, those of them that live."""
        for session_id in ids:
            session = self._by_id.get(session_id)
            if session:
                self.remove(session)

    def remove(self, session: Session) -> None:
        """Ends a session."""
        del self._by_id[session.id], self._by_name[session.worker]
        _remember(self._ended, session.id, session, _ENDED)

    def get(self, session_id: bytes, epoch: int) -> Session:
        """Returns a live session.

        Raises:
            Refused: SESSION_FENCED, SESSION_UNKNOWN, or PUSH_INVALID for an epoch that is not the session's.
        """
        session = self._by_id.get(session_id)
        if session:
            if session.epoch != epoch:
                raise Refused("PUSH_INVALID", field="epoch", allowed=f"{session.epoch}, as OpenSession answered")
            return session
        worker = self._replaced(session_id)
        if worker is None:
            raise Refused("SESSION_UNKNOWN")
        raise Refused("SESSION_FENCED", worker=worker, epoch=epoch, current=self._epochs.get(worker, 0))

    def _replaced(self, session_id: bytes) -> str | None:
        """Returns the worker of a session that a newer one of its name has fenced, while it lived or after it ended."""
        ended = self._ended.get(session_id)
        if ended and self._epochs.get(ended.worker, 0) > ended.epoch:
            return ended.worker
        return self._fenced.get(session_id)

    def find(self, session_id: bytes) -> Session | None:
        """Returns a live session, whatever its epoch."""
        return self._by_id.get(session_id)

    def find_any(self, session_id: bytes) -> Session | None:
        """Returns a session that lives, or ended not too long ago."""
        return self._by_id.get(session_id) or self._ended.get(session_id)

    def ended_with(self, push: Push) -> Session | None:
        """Returns the session that had accepted a push before it ended, unless it was fenced; None without one."""
        session = self._ended.get(push.session_id)
        if session is None or session.epoch != push.epoch or self._replaced(session.id):
            return None
        return session if 1 <= push.sequence <= session.last_accepted else None

    def push_status(self, session_id: bytes, sequence: int, version: int) -> PushStatus:
        """Returns where a push stands, also one of a session that ended not too long ago.

        Raises:
            Refused: SESSION_UNKNOWN.
        """
        session = self.find_any(session_id)
        if session is None:
            raise Refused("SESSION_UNKNOWN")
        return session.status(sequence, version, live=session_id in self._by_id)


def _remember(table: OrderedDict[_K, _V], key: _K, value: _V, most: int = _REMEMBERED) -> None:
    table[key] = value
    while len(table) > most:
        table.popitem(last=False)
