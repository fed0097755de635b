"""Planted defects of the server, each of which the harness must find."""

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
from deltaserve_server.memory import Frozen
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import State
from deltaserve_server.model import Answer, Machine, Push, PushResult
from deltaserve_server.model.sessions import Session
from deltaserve_server.service.servicers.worker_service import WorkerServicer

_TITLE_BYTES = 64
"""Size of a journal's header."""


class _Mixed(Frozen):
    """A frozen state whose optimizer state is that of a later moment."""

    def __init__(self, frozen: Frozen, store: HostStore) -> None:
        self._frozen = frozen
        self._store = store

    def state(self) -> State:
        sleep(0.2)
        return State(self._frozen.state().weights, self._store.state().slots)

    def release(self) -> None:
        self._frozen.release()


def _forget_duplicates() -> None:
    """Treats a repeated last push as a new one."""
    known = Session.known

    def forgetful(session: Session, push: Push) -> bool:
        return known(session, push) and push.sequence != session.last_accepted

    Session.known = forgetful  # type: ignore[method-assign, assignment]


def _lose_pushes() -> None:
    """Answers every tenth push without applying it."""
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
    """Ignores the weights of pushes."""
    fold = HostStore.fold

    def plain(store: HostStore, staging: Any, factor: float) -> None:
        fold(store, staging, 1.0)

    HostStore.fold = plain  # type: ignore[method-assign, assignment]


def _tell_early() -> None:
    """Announces updates before their records are durable."""

    def tell(commits: Journaled, effect: Effect) -> None:
        effect()

    Journaled.on_durable = tell  # type: ignore[method-assign, assignment]


def _skip_records() -> None:
    """Leaves every fifth update out of the journal."""
    add, number = Journaled.add, count(1)

    def careless(commits: Journaled, event: Any, pieces: Any = (), done: Effect | None = None) -> None:
        if not isinstance(event, Updated) or next(number) % 5:
            add(commits, event, pieces, done)
        elif done:
            done()

    Journaled.add = careless  # type: ignore[method-assign, assignment]


def _forget_last_record() -> None:
    """Ignores the last record of the journal during recovery."""
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
    """Forgets the last push of every session during recovery."""
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
    """Writes snapshots with an optimizer state that is newer than the weights."""
    freeze = HostStore.freeze

    def mixing(store: HostStore) -> Frozen:
        return _Mixed(freeze(store), store)

    HostStore.freeze = mixing  # type: ignore[method-assign, assignment]


def _miscount_losses() -> None:
    """Reports one lost push too many to workers."""
    get = WorkerServicer.GetPush

    def wrong(servicer: WorkerServicer, request: Any, context: Any) -> rpc.GetPushResponse:
        answer = get(servicer, request, context)
        answer.last_applied_sequence = max(answer.last_applied_sequence - 1, 0)
        return answer

    WorkerServicer.GetPush = wrong  # type: ignore[method-assign, assignment]


def _promise_too_much() -> None:
    """Reports the current version as the durable one."""

    def current(storage: ModelStorage, version: int) -> int:
        return version

    ModelStorage.durable_version = current  # type: ignore[method-assign, assignment]


def _come_back_older() -> None:
    """Recovers from the snapshot before the last one."""
    recover = recovery.recover

    def older(folder: Any, *rest: Any, **options: Any) -> recovery.Recovered:
        numbers = folder.snapshots()
        folder.snapshots = lambda: numbers[:-1] or numbers
        return recover(folder, *rest, **options)

    recovery.recover = older


def _forget_counts() -> None:
    """Forgets at recovery how many updates each tensor has had."""
    recover = recovery.recover

    def forgetful(*given: Any, **options: Any) -> recovery.Recovered:
        recovered = recover(*given, **options)
        recovered.machine.update_counts = (0,) * len(recovered.machine.update_counts)
        return recovered

    recovery.recover = forgetful


DEFECTS: Mapping[str, Callable[[], None]] = {
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
    "forgets-counts": _forget_counts,
}
