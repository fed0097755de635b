"""Defects of a server, each of which the harness has to find."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server.durability import recovery
from deltaserve_server.durability.commits import Effect, Journaled
from deltaserve_server.durability.journal import JournalReader
from deltaserve_server.durability.model_storage import ModelStorage
from deltaserve_server.durability.records import Record, Updated
from deltaserve_server.memory.host import HostStore, _HostFrozen
from deltaserve_server.memory.store import State
from deltaserve_server.model import Answer, Machine, Push, PushResult
from deltaserve_server.model.sessions import Session
from deltaserve_server.service.servicers.worker_service import WorkerServicer

_TITLE_BYTES = 64
"""What a journal begins with."""


def _forget_duplicates() -> None:
    """The last push, sent again, is taken for a new one."""
    known = Session.known

    def forgetful(session: Session, push: Push) -> bool:
        return known(session, push) and push.sequence != session.last_accepted

    Session.known = forgetful  # type: ignore[method-assign, assignment]


def _lose_pushes() -> None:
    """Now and then a push is answered, and in no update."""
    push, number = Machine.push, count()

    def careless(machine: Machine, given: Push, now: float) -> Any:
        session = machine.check(given, now)
        if next(number) % 10 or session.known(given):
            return push(machine, given, now)
        session.accept(given.sequence, given.fingerprint)
        result = PushResult(version=machine.version)
        session.apply(given.sequence, result, monotonic())
        return [Answer(given.key, result)]

    Machine.push = careless  # type: ignore[method-assign, assignment]


def _forget_weights() -> None:
    """A push's own weight does not count in the sum."""
    fold = HostStore.fold

    def plain(store: HostStore, staging: Any, factor: float) -> None:
        fold(store, staging, 1.0)

    HostStore.fold = plain  # type: ignore[method-assign, assignment]


def _tell_early() -> None:
    """Everybody is told before records are written."""

    def tell(commits: Journaled, effect: Effect) -> None:
        effect()

    Journaled.on_durable = tell  # type: ignore[method-assign, assignment]


def _skip_records() -> None:
    """Now and then an update is not written down."""
    add, number = Journaled.add, count(1)

    def careless(commits: Journaled, event: Any, pieces: Any = (), done: Effect | None = None) -> None:
        if not isinstance(event, Updated) or next(number) % 5:
            add(commits, event, pieces, done)
        elif done:
            done()

    Journaled.add = careless  # type: ignore[method-assign, assignment]


def _forget_last_record() -> None:
    """A server that comes back leaves out the last thing that its journals hold."""
    records = JournalReader.records

    def forgetful(reading: JournalReader) -> Iterator[Record]:
        mine = Path(reading.where)
        is_last = mine.name == max(path.name for path in mine.parent.glob("journal-*"))
        ends, held = [_TITLE_BYTES], None
        for record in records(reading):
            if held:
                yield held
            held = record
            ends.append(reading.size)
        if held and is_last:
            reading.size = ends[-2]
        elif held:
            yield held

    JournalReader.records = forgetful  # type: ignore[method-assign, assignment]


def _forget_sessions() -> None:
    """A server that comes back knows of every session all but its last push."""
    resume = Machine.resume

    def forgetful(machine: Machine, now: float) -> bool:
        for session in machine.sessions.live():
            if session.last_applied:
                del session.window[session.last_applied]
                session.last_applied -= 1
                session.last_accepted = session.last_applied
        return resume(machine, now)

    Machine.resume = forgetful  # type: ignore[method-assign, assignment]


def _mix_snapshots() -> None:
    """A snapshot has the averages of a moment that is later than that of the weights."""
    state = _HostFrozen.state

    def late(frozen: _HostFrozen) -> State:
        sleep(0.2)
        taken, now = state(frozen), frozen._store.state()
        return State(taken.weights, now.square_avg, taken.acc_delta)

    _HostFrozen.state = late  # type: ignore[method-assign, assignment]


def _miscount_losses() -> None:
    """Workers are told of one push too many that is lost."""
    get = WorkerServicer.GetPush

    def wrong(servicer: WorkerServicer, request: Any, context: Any) -> rpc.GetPushResponse:
        answer = get(servicer, request, context)
        answer.last_applied_sequence = max(answer.last_applied_sequence - 1, 0)
        return answer

    WorkerServicer.GetPush = wrong  # type: ignore[method-assign, assignment]


def _promise_too_much() -> None:
    """The version that is told to be durable is that of now."""

    def promising(storage: ModelStorage, told: int) -> int:
        return told

    ModelStorage.durable_version = promising  # type: ignore[method-assign, assignment]


def _come_back_older() -> None:
    """A server that comes back takes the snapshot before the last."""
    newest = recovery._read_newest_snapshot

    def older(folder: Any, *rest: Any) -> Any:
        numbers = folder.snapshots()
        folder.snapshots = lambda: numbers[:-1] or numbers
        return newest(folder, *rest)

    recovery._read_newest_snapshot = older  # type: ignore[assignment]


PLANTS: Mapping[str, Callable[[], None]] = {
    "none": lambda: None,
    "doubles": _forget_duplicates,
    "loses": _lose_pushes,
    "other-bits": _forget_weights,
    "tells-early": _tell_early,
    "skips-records": _skip_records,
    "forgets-last-record": _forget_last_record,
    "forgets-sessions": _forget_sessions,
    "mixes-snapshots": _mix_snapshots,
    "miscounts-losses": _miscount_losses,
    "promises-too-much": _promise_too_much,
    "comes-back-older": _come_back_older,
}
