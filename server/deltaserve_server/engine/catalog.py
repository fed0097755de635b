"""The models of a server, by name: creation, recovery, deletion, and the end of all of them."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from deltaserve_server.config import ServerConfig
from deltaserve_server.durability import recovery
from deltaserve_server.durability.copies import Copies
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.errors import CorruptError, DataDirectoryError, disk_full_advice
from deltaserve_server.durability.model_storage import Durability, ModelStorage
from deltaserve_server.durability.recovery import Expected
from deltaserve_server.durability.snapshot import Entry, Progress
from deltaserve_server.engine.clock import Clock
from deltaserve_server.engine.events import ModelDeleted, ModelServed, Observers
from deltaserve_server.engine.lease_timer import LeaseTimer
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.engine.model_lock import storage_refused
from deltaserve_server.engine.quotas import DRAIN_RETRY_SECONDS, Quotas
from deltaserve_server.engine.recovery_progress import RecoveryProgress
from deltaserve_server.engine.snapshot_scheduler import SnapshotScheduler
from deltaserve_server.memory import BudgetExceeded, MakeStore, Reservation, Store, initial_state
from deltaserve_server.memory.store import Vector
from deltaserve_server.model import Machine, Refused, Session

_log = logging.getLogger(__name__)

_COPIES_SECONDS = 5.0
"""How long the end of a server waits for copies of snapshots that are under way."""


class ModelCatalog:
    """The server's models by name. They are durable if there is a data directory."""

    def __init__(
        self,
        config: ServerConfig,
        quotas: Quotas,
        incarnation: str,
        make_store: MakeStore,
        directory: DataDirectory | None,
        copies: Copies | None,
        *,
        clock: Clock,
        observers: Observers,
    ) -> None:
        self.config = config
        self.quotas = quotas
        self.incarnation = incarnation
        self.clock = clock
        self._make_store = make_store
        self._directory = directory
        self._copies = copies
        self._observers = observers
        self._models: dict[str, ModelEngine] = {}
        expected = {name: Expected.of(directory.folder(name)) for name in directory.names()} if directory else {}
        self._recovery = RecoveryProgress({name: model.bytes for name, model in expected.items()}, clock)
        # Now, before clients can create models: recovered models come first.
        self._promised = {name: self._promise(model.elements, model.slots) for name, model in expected.items()}
        self._lock = threading.Lock()
        self._stopped = False
        self._all_saved = True
        self._leases = LeaseTimer(self.all, config.models, clock)
        self._snapshots = SnapshotScheduler(self.all, self._take_snapshot, clock) if directory else None

    def get(self, name: str) -> ModelEngine:
        """Returns a model; raises Refused MODEL_NOT_FOUND or RECOVERING."""
        engine = self.find(name)
        if engine is None:
            raise Refused("MODEL_NOT_FOUND", model=name[:128])
        return engine

    def find(self, name: str) -> ModelEngine | None:
        """Returns a model, None if there is none; raises Refused RECOVERING."""
        recovering = name in self._recovery  # before the look-up: it may be recovered in between
        engine = self._models.get(name)
        if engine is None and recovering:
            raise self._recovery.refusal(name)
        return engine

    def all(self) -> list[ModelEngine]:
        """Returns the models that are served, by name."""
        # Without the lock, which is held while the disk creates or removes a model; sorted() copies in one step.
        return sorted(self._models.values(), key=lambda engine: engine.machine.name)

    def complete(self) -> list[ModelEngine]:
        """Returns the models by name; raises Refused RECOVERING while one is not recovered yet."""
        pending = self._recovery.next
        if pending is not None:
            raise self._recovery.refusal(pending)
        return self.all()

    def check_room(self) -> None:
        """Raises Refused MODEL_LIMIT or DRAINING if the server takes no further model."""
        self.quotas.check_open()
        if len(self._models) + len(self._recovery) >= self.config.models:
            raise Refused("MODEL_LIMIT", limit=self.config.models)

    def add(self, machine: Machine, receive: Callable[[], Vector]) -> tuple[ModelEngine, bool]:
        """Creates a model.

        Args:
            machine: The new model.
            receive: Returns its weights. Called once their memory is reserved.

        Returns:
            The model, and whether it is new: another caller may have created it while the weights arrived.
        """
        self.check_room()
        with ExitStack() as undo:
            reservation = self.quotas.reserve_model(machine.layout.size, len(machine.slots))
            undo.callback(reservation.release)
            weights = receive()  # without the lock: a client may send for minutes
            state = initial_state(weights, machine.layout, machine.groups)
            prepared, storage = None, None
            if self._directory:
                with _refused_by_disk():  # under a temporary name
                    prepared = self._directory.prepare(machine, state)
                undo.callback(prepared.discard)
            with self._lock:
                existing = self._models.get(machine.name)  # another caller may have been quicker
                if existing is not None:
                    return existing, False
                self.check_room()  # again: other callers may have filled the server since
                store = self._make_store(state, machine.groups[0], self.quotas.memory)
                if self._directory and prepared:
                    with _refused_by_disk():
                        storage = self._directory.add(prepared, machine.name)
                engine = self._engine(machine, store, reservation, storage)
                self._publish(engine)
                undo.pop_all()
        _log.info("model %s created: %d elements", machine.name, machine.layout.size)
        return engine, True

    def delete(self, name: str) -> ModelEngine:
        """Deletes a model and its files; raises Refused MODEL_NOT_FOUND or STORAGE_UNAVAILABLE."""
        engine, gone = self.get(name), Refused("MODEL_NOT_FOUND", model=name)
        # Waits, without the lock, for a snapshot under way: it must not be written into a new model of this name.
        with engine.storage.ending() if engine.storage else nullcontext():
            with self._lock:
                if self._models.get(name) is not engine:
                    raise gone
                if self._directory:
                    with _refused_by_disk():
                        self._directory.remove(name)
                del self._models[name]
                self._observers.emit(ModelDeleted(model=name))  # under the lock: before a new model of this name
            engine.lose(gone)  # after it is out of the catalog, so that no new call finds an ended model
        engine.release()
        _log.info("model %s deleted", name)
        return engine

    def open_session(
        self, name: str, worker: str, lease_seconds: float, tensor_count: int | None, group_count: int | None
    ) -> Session:
        """Opens a session with a model; see `ModelEngine.open_session`.

        Raises:
            Refused: SESSION_LIMIT, DRAINING or MODEL_NOT_FOUND.
        """
        self.quotas.check_open()
        engine = self.get(name)
        replaces = engine.machine.sessions.named(worker) is not None
        with self.quotas.session(lambda: sum(len(engine.machine.sessions) for engine in self.all()), replaces=replaces):
            return engine.open_session(worker, lease_seconds, tensor_count, group_count)

    def save(self, engine: ModelEngine) -> Entry:
        """Takes a snapshot of a model.

        Raises:
            Refused: NOT_DURABLE or STORAGE_UNAVAILABLE, or the model has ended.
        """
        with _refused_by_disk():
            return self._take_snapshot(engine)

    def entries(self, engine: ModelEngine) -> list[Entry]:
        """Returns the snapshots of a model; raises Refused NOT_DURABLE, MODEL_NOT_FOUND or STORAGE_UNAVAILABLE."""
        if engine.storage is None:
            raise Refused("NOT_DURABLE")
        try:
            return engine.storage.entries
        except OSError as error:
            name = engine.machine.name
            with self._lock:  # waits for a deletion under way, which explains the error
                if self._models.get(name) is not engine:
                    raise Refused("MODEL_NOT_FOUND", model=name) from None
            raise storage_refused(error) from error

    def _take_snapshot(self, engine: ModelEngine) -> Entry:
        entry = engine.save()
        self._offer_copy(engine)
        return entry

    def _offer_copy(self, engine: ModelEngine) -> None:
        if self._copies and engine.storage:
            self._copies.offer(engine.machine.name, engine.storage.folder)

    def stop(self) -> bool:
        """Ends every model, once. It takes as long as the last snapshots do.

        Returns:
            Whether every durable model has its last snapshot.
        """
        self.quotas.draining = True
        if self._stopped:
            return self._all_saved
        self._stopped = True
        self._leases.stop()  # first, so that no lease ends while models do
        with self._lock:  # a model that is being created is in the list, or is refused
            engines = self.all()
        for engine in engines:
            engine.end(Refused("DRAINING", DRAIN_RETRY_SECONDS))
        if self._snapshots:
            self._snapshots.stop()
        # After all have ended, so that no model waits for another's disk with its workers.
        for engine in engines:
            self._close(engine)
        if self._copies:
            self._copies.close(_COPIES_SECONDS)
        if self._directory:
            self._directory.close()
        return self._all_saved

    def _close(self, engine: ModelEngine) -> None:
        try:
            engine.close()
        except Exception as error:  # any: the other models still need their last snapshots
            self._all_saved, storage = False, engine.storage
            assert storage
            later = f"what came after version {storage.last.version}"
            rest = f"the journal has {later}" if storage.commits.journals else f"{later} is lost"
            name, trace = engine.machine.name, not isinstance(error, OSError | BudgetExceeded | Refused)
            _log.error("model %s: the last snapshot failed, %s: %s", name, rest, error, exc_info=trace)
        else:
            self._offer_copy(engine)

    def restore(self, check: Callable[[], None]) -> None:
        """Recovers the models of the data directory one after the other, and serves each at once.

        Args:
            check: Called again and again. An exception of it ends the recovery and leaves the files as a crash would.

        Raises:
            DataDirectoryError: A model cannot be recovered; the text says why, and what to do.
        """
        directory = self._directory
        if directory is None:
            return

        def progress(count: int) -> None:
            self._recovery.add(count)
            check()

        for name, promised in self._promised.items():
            check()
            began = self.clock.monotonic()
            try:
                engine = self._recover(directory, name, promised, progress)
            except CorruptError as error:
                promised.release()
                if not self.config.accept_data_loss:
                    advice = "start with --accept-data-loss to go on with what is good, or restore a copy of the file"
                    raise DataDirectoryError(f"corrupt: {error}; {advice}") from error
                _log.error("model %s: corrupt, set aside as %s: %s", name, directory.set_aside(name), error)
            else:
                version, seconds = engine.machine.version, self.clock.monotonic() - began
                _log.info("model %s recovered at version %d in %.1f s", name, version, seconds)
            self._recovery.done(name)  # after it is served: a client must not hear MODEL_NOT_FOUND in between

    def _recover(
        self, directory: DataDirectory, name: str, reservation: Reservation, progress: Progress
    ) -> ModelEngine:
        folder = directory.folder(name)
        try:
            recovered = recovery.recover(
                folder,
                lambda state, optimizer: self._make_store(state, optimizer, self.quotas.memory),
                progress,
                accept_data_loss=self.config.accept_data_loss,
                sync=directory.durability is Durability.FSYNC,
                clock=self.clock,
            )
            elements, slots = recovered.machine.layout.size, len(recovered.machine.slots)
            if reservation.size != self.quotas.model_bytes(elements, slots):  # the journal has extended the model
                reservation.release()
                reservation = self.quotas.reserve_model(elements, slots)
            storage = directory.storage(name, recovered.stored)
        except BudgetExceeded as error:
            text = f"model {name} needs {error.needed} bytes of memory, {error.available} are left: see --memory-bytes"
            raise DataDirectoryError(text) from error
        except OSError as error:
            path, advice = error.filename or folder.files.folder, disk_full_advice(error, directory.path)
            raise DataDirectoryError(f"model {name}: {path}: {error.strerror}{advice}") from error
        engine = self._engine(recovered.machine, recovered.store, reservation, storage)
        try:
            if recovered.version_bumped:  # only now is there a journal to write it to
                engine.version_bumped()
        except Refused as error:
            raise DataDirectoryError(f"model {name}: {error.metadata.get('why')}") from error
        with self._lock:
            self._publish(engine)
        return engine

    def _promise(self, elements: int, slots: int) -> Reservation:
        """Reserves the memory of a model that is not recovered yet, before new models take it."""
        try:
            return self.quotas.reserve_model(elements, slots)
        except BudgetExceeded:  # the recovery reports it when it reaches this model
            return self.quotas.reserve_model(0, 0)

    def _engine(
        self, machine: Machine, store: Store, reservation: Reservation, storage: ModelStorage | None
    ) -> ModelEngine:
        schedule, clock, observers = self._leases.schedule, self.clock, self._observers
        return ModelEngine(
            machine, store, reservation, self.incarnation, schedule, storage, clock=clock, observers=observers
        )

    def _publish(self, engine: ModelEngine) -> None:
        """Serves a model. Must be called under the lock."""
        self._models[engine.machine.name] = engine
        self._observers.emit(ModelServed(model=engine.machine.name))


@contextmanager
def _refused_by_disk() -> Iterator[None]:
    """Turns an OSError into Refused STORAGE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        raise storage_refused(error) from error
