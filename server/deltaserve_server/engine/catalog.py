"""All models of a server, and what it may hold."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, nullcontext
from time import monotonic

from grpc_health.v1 import health, health_pb2

from deltaserve_server.config import ServerConfig
from deltaserve_server.durability import recovery
from deltaserve_server.durability.copies import Copies
from deltaserve_server.durability.directory import DataDirectory, Prepared
from deltaserve_server.durability.errors import CorruptError, DataDirectoryError, disk_full_advice
from deltaserve_server.durability.model_storage import Durability, ModelStorage
from deltaserve_server.durability.recovery import Expected
from deltaserve_server.durability.snapshot import Entry, Progress
from deltaserve_server.engine.deadline_timer import DeadlineTimer
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.engine.model_lock import storage_refused
from deltaserve_server.engine.recovery_progress import RecoveryProgress
from deltaserve_server.engine.snapshot_scheduler import SnapshotScheduler
from deltaserve_server.engine.watch import Watcher
from deltaserve_server.memory import Budget, BudgetExceeded, Reservation, State, Store
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector, zeros_like
from deltaserve_server.model import Machine, Refused, Session

_log = logging.getLogger(__name__)

_SERVICES = "deltaserve.v1."
"""What the full names of our services begin with."""

_DRAIN_RETRY_SECONDS = 1.0
_COPIES_SECONDS = 5.0

MakeStore = Callable[[Vector, Budget], Store]


class ModelCatalog:
    """The server's models by name.

    Args:
        config: The server's limits.
        memory_bytes: What it may hold in all.
        incarnation: Of the server process.
        make_store: Makes the place for a new model's vectors.
        health_servicer: Is told of each model.
        executor: Has threads for work that is shared.
        threads: How many work at most, a handler's own among them.
        directory: Where models are kept safe; None means nowhere.
        copies: Where their snapshots are copied to; None likewise.

    Attributes:
        memory: Bytes for everything.
        staged: Bytes for pushes that have not yet become an update; part of `memory`.
        executor: As above, like the next.
        threads: Likewise.
    """

    def __init__(
        self,
        config: ServerConfig,
        memory_bytes: int,
        incarnation: str,
        make_store: MakeStore,
        health_servicer: health.HealthServicer,
        executor: Executor,
        threads: int,
        directory: DataDirectory | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.executor = executor
        self.threads = threads
        self.config = config
        self.incarnation = incarnation
        self.memory = Budget(memory_bytes)
        self.staged = Budget(config.staged_bytes or memory_bytes // 2, parent=self.memory)
        self._make_store = make_store
        self._health = health_servicer
        self._models: dict[str, ModelEngine] = {}
        self._directory = directory
        self._copies = copies
        expected = self._expected()
        self._recovery = RecoveryProgress({name: one.bytes for name, one in expected.items()})
        self._promised = {name: self._promise(one.elements) for name, one in expected.items()}
        self._lock = threading.Lock()
        self._opening, self._lock_opening = 0, threading.Lock()
        self._draining = False
        self._watchers = threading.BoundedSemaphore(config.watchers)
        self._stopped = False
        self._kept = True
        self._timer = DeadlineTimer(self.all, config.models)
        self._snapshots = SnapshotScheduler(self.all, self._saved) if directory else None

    def get(self, name: str) -> ModelEngine:
        """Returns a model.

        Raises:
            Refused: MODEL_NOT_FOUND or RECOVERING.
        """
        engine = self.find(name)
        if engine is None:
            raise Refused("MODEL_NOT_FOUND", model=name[:128])
        return engine

    def find(self, name: str) -> ModelEngine | None:
        """Returns a model, or None.

        Raises:
            Refused: RECOVERING.
        """
        coming = name in self._recovery  # asked first: it may be there the moment after
        engine = self._models.get(name)
        if engine is None and coming:
            raise self._recovery.refusal(name)
        return engine

    def whole(self) -> list[ModelEngine]:
        """Returns all models by name, for whoever takes one that is not among them for none.

        Raises:
            Refused: RECOVERING.
        """
        coming = self._recovery.coming
        if coming is not None:
            raise self._recovery.refusal(coming)
        return self.all()

    def reserve_model(self, elements: int) -> Reservation:
        """Takes the memory that a model, or an extension, of so many elements needs; raises BudgetExceeded."""
        return self.memory.reserve(self._model_bytes(elements))

    def _model_bytes(self, elements: int) -> int:
        """Returns what a model needs: weights, the next, one older that is read, both averages, and a round's sum.

        While a snapshot of it is written, both averages are there twice.
        """
        return (8 if self._directory else 6) * ELEMENT_BYTES * elements

    def all(self) -> list[ModelEngine]:
        """Returns all models by name."""
        # Without the lock, which is held while the disk makes or removes a model; this copies in one step.
        return sorted(self._models.values(), key=lambda engine: engine.machine.name)

    def check_room(self) -> None:
        """Raises Refused MODEL_LIMIT or DRAINING where no further model is taken."""
        self.check_open()
        if len(self._models) + len(self._recovery) >= self.config.models:
            raise Refused("MODEL_LIMIT", limit=self.config.models)

    def check_open(self) -> None:
        """Raises Refused DRAINING where the server is about to stop."""
        if self._draining:
            raise Refused("DRAINING", _DRAIN_RETRY_SECONDS)

    def add(self, machine: Machine, receive: Callable[[], Vector]) -> tuple[ModelEngine, bool]:
        """Creates a model once `receive` has its weights; returns it, and whether it is new.

        Another caller may have created one of this name meanwhile: then that is returned.
        """
        self.check_room()
        with ExitStack() as undo:
            reservation = self.reserve_model(machine.layout.size)
            undo.callback(reservation.release)
            weights = receive()
            prepared = self._prepare(machine, weights)
            if prepared:
                undo.callback(prepared.discard)
            with self._lock:
                held = self._models.get(machine.name)
                if held is not None:
                    return held, False
                self.check_room()
                store = self._make_store(weights, self.memory)
                storage = self._keep(prepared, machine.name) if prepared else None
                engine = ModelEngine(machine, store, reservation, self.incarnation, self._timer.want, storage)
                self._add(engine)
                undo.pop_all()
        _log.info("model %s created: %d elements", machine.name, machine.layout.size)
        return engine, True

    def restore(self, check: Callable[[], None], *, accept_data_loss: bool) -> None:
        """Brings back all models of the data directory, one after the other; each is there as soon as it is.

        Args:
            check: Is called again and again; what it raises ends this, and leaves what a crash would leave.
            accept_data_loss: Whether to go on where a file is corrupt.

        Raises:
            DataDirectoryError: A model does not come back; the text says why, and what to do.
        """
        directory = self._directory
        if directory is None:
            return

        def progress(count: int) -> None:
            self._recovery.progress(count)
            check()

        for name, promised in self._promised.items():
            check()
            began = monotonic()
            try:
                engine = self._restored(directory, name, promised, progress, accept_data_loss)
            except CorruptError as error:
                promised.release()
                if not accept_data_loss:
                    why = "start with --accept-data-loss to go on with what is good, or restore a copy of the file"
                    raise DataDirectoryError(f"corrupt: {error}; {why}") from error
                _log.error("model %s is set aside, as %s: %s", name, directory.set_aside(name), error)
            else:
                with self._lock:
                    self._add(engine)
                version, seconds = engine.machine.version, monotonic() - began
                _log.info("model %s came back at version %d, after %.1f s", name, version, seconds)
            self._recovery.came(name)

    def save(self, engine: ModelEngine) -> Entry:
        """Takes a snapshot of a model.

        Raises:
            Refused: NOT_DURABLE or STORAGE_UNAVAILABLE, or the model has ended.
        """
        try:
            entry = engine.save()
        except OSError as error:
            raise storage_refused(error) from error
        self._saved(engine)
        return entry

    def entries(self, engine: ModelEngine) -> list[Entry]:
        """Returns the snapshots of a model that are kept.

        Raises:
            Refused: NOT_DURABLE, MODEL_NOT_FOUND or STORAGE_UNAVAILABLE.
        """
        if engine.storage is None:
            raise Refused("NOT_DURABLE")
        try:
            return engine.storage.entries
        except OSError as error:
            name = engine.machine.name
            with self._lock:  # whoever deletes the model has done so by then, or has failed
                if self._models.get(name) is not engine:
                    raise Refused("MODEL_NOT_FOUND", model=name) from None
            raise storage_refused(error) from error

    def delete(self, name: str) -> ModelEngine:
        """Forgets a model.

        Raises:
            Refused: MODEL_NOT_FOUND.
        """
        engine, gone = self.get(name), Refused("MODEL_NOT_FOUND", model=name)
        # Without the lock it may wait for a snapshot: that one must not be written into a new model of this name.
        with engine.storage.ending() if engine.storage else nullcontext():
            with self._lock:
                if self._models.get(name) is not engine:
                    raise gone
                self._remove(name)
                del self._models[name]
                self._tell_health(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            engine.lose(gone)
        engine.release()
        _log.info("model %s deleted", name)
        return engine

    def open_session(
        self, name: str, worker: str, lease_seconds: float, tensor_count: int | None, group_count: int | None
    ) -> Session:
        """Gives a worker a standing with a model.

        Raises:
            Refused: SESSION_LIMIT, DRAINING or MODEL_NOT_FOUND.
        """
        self.check_open()
        engine = self.get(name)
        with self._session_room(replaces=engine.machine.sessions.named(worker) is not None):
            return engine.open_session(worker, lease_seconds, tensor_count, group_count)

    @contextmanager
    def _session_room(self, *, replaces: bool) -> Iterator[None]:
        """Keeps room for a session that is being opened; raises Refused SESSION_LIMIT where there is none.

        No lock is held meanwhile: to open one may take as long as its model's disk does.
        """
        with self._lock_opening:
            live = sum(len(held.machine.sessions) for held in self.all()) + self._opening
            if live >= self.config.sessions and not replaces:
                raise Refused("SESSION_LIMIT", limit=self.config.sessions)
            self._opening += not replaces
        try:
            yield
        finally:
            with self._lock_opening:
                self._opening -= not replaces

    def share(self, name: str, session_id: bytes, epoch: int, local: bool) -> Handle:
        """Gives a session memory for its gradients that its worker can map.

        Args:
            name: The model.
            session_id: Of the session.
            epoch: Its epoch.
            local: Whether the caller is on this host.

        Raises:
            Refused: SHARED_MEMORY_UNAVAILABLE, or for the session.
        """
        engine = self.get(name)
        session = engine.keep_session(session_id, epoch)
        if not self.config.shares_memory:
            raise Refused("SHARED_MEMORY_UNAVAILABLE", why="the server does not offer it")
        if not local:
            raise Refused("SHARED_MEMORY_UNAVAILABLE", why="the server is on another host")
        return engine.share(session, self.memory)

    @contextmanager
    def watched(self, name: str) -> Iterator[Watcher]:
        """Gives what happens to a model meanwhile.

        Raises:
            Refused: WATCHER_LIMIT or MODEL_NOT_FOUND.
        """
        engine = self.get(name)
        if not self._watchers.acquire(blocking=False):
            raise Refused("WATCHER_LIMIT", limit=self.config.watchers)
        try:
            with engine.watched() as watcher:
                yield watcher
        finally:
            self._watchers.release()

    def drain(self) -> None:
        """Refuses new work from now on; pushes that wait for their round go on."""
        self._draining = True

    def waiting(self) -> bool:
        """Whether some push waits for its round."""
        return any(engine.waiting for engine in self.all())

    def stop(self) -> bool:
        """Ends every model, once; returns whether each that is to be kept has its last snapshot."""
        self._draining = True
        if self._stopped:
            return self._kept
        self._stopped = True
        self._timer.stop()
        for engine in self.all():
            engine.end(Refused("DRAINING", _DRAIN_RETRY_SECONDS))
        if self._snapshots:
            self._snapshots.stop()
        for engine in self.all():
            self._finish(engine)
        if self._copies:
            self._copies.close(_COPIES_SECONDS)
        if self._directory:
            self._directory.close()
        return self._kept

    def _finish(self, engine: ModelEngine) -> None:
        try:
            engine.finish()
        except (OSError, BudgetExceeded, Refused) as error:
            self._kept, storage = False, engine.storage
            assert storage
            after = f"what came after version {storage.last.version}"
            rest = f"the journal has {after}" if storage.commits.journals else f"{after} is lost"
            _log.error("model %s: there is no last snapshot, %s: %s", engine.machine.name, rest, error)
        else:
            self._saved(engine)

    # --- the data directory

    def _expected(self) -> dict[str, Expected]:
        directory = self._directory
        if directory is None:
            return {}
        return {name: Expected.of(directory.folder(name)) for name in directory.names()}

    def _promise(self, elements: int) -> Reservation:
        """Takes the memory of a model that is still to come, lest others have it by then."""
        try:
            return self.reserve_model(elements)
        except BudgetExceeded:  # which is said when it comes
            return self.reserve_model(0)

    def _prepare(self, machine: Machine, weights: Vector) -> Prepared | None:
        """Writes a new model down, not yet under its name; raises Refused STORAGE_UNAVAILABLE."""
        if self._directory is None:
            return None
        try:
            return self._directory.prepare(machine, State(weights, zeros_like(weights), zeros_like(weights)))
        except OSError as error:
            raise storage_refused(error) from error

    def _remove(self, name: str) -> None:
        if self._directory:
            try:
                self._directory.remove(name)
            except OSError as error:
                raise storage_refused(error) from error

    def _keep(self, prepared: Prepared, name: str) -> ModelStorage:
        """Gives what is written down its name; raises Refused STORAGE_UNAVAILABLE."""
        assert self._directory
        try:
            return self._directory.add(prepared, name)
        except OSError as error:
            raise storage_refused(error) from error

    def _restored(
        self,
        directory: DataDirectory,
        name: str,
        reservation: Reservation,
        progress: Progress,
        accept_data_loss: bool,
    ) -> ModelEngine:
        folder = directory.folder(name)
        try:
            came = recovery.recover(
                folder,
                lambda weights: self._make_store(weights, self.memory),
                progress,
                accept_data_loss=accept_data_loss,
                sync=directory.durability is Durability.FSYNC,
            )
            if reservation.size != self._model_bytes(came.machine.layout.size):  # its journal has extended it
                reservation.release()
                reservation = self.reserve_model(came.machine.layout.size)
            storage = directory.storage(name, came.stored)
        except BudgetExceeded as error:
            text = f"model {name} takes {error.needed} bytes of memory, {error.available} are left: see --memory-bytes"
            raise DataDirectoryError(text) from error
        except OSError as error:
            path, advice = error.filename or folder.files.folder, disk_full_advice(error, directory.path)
            raise DataDirectoryError(f"model {name}: {path}: {error.strerror}{advice}") from error
        engine = ModelEngine(came.machine, came.store, reservation, self.incarnation, self._timer.want, storage)
        try:
            if came.version_bumped:
                engine.version_bumped()
        except Refused as error:
            raise DataDirectoryError(f"model {name}: {error.metadata.get('why')}") from error
        return engine

    def _add(self, engine: ModelEngine) -> None:
        self._models[engine.machine.name] = engine
        self._tell_health(engine.machine.name, health_pb2.HealthCheckResponse.SERVING)

    def _saved(self, engine: ModelEngine) -> None:
        if self._copies and engine.storage:
            self._copies.offer(engine.machine.name, engine.storage.folder)

    def _tell_health(self, name: str, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        if not name.startswith(_SERVICES):  # a model of a service's name must not speak for the service
            self._health.set(name, status)
