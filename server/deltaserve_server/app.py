"""Puts the parts of a server together. No other module knows all of them."""

import logging
import platform
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from ctypes.util import find_library
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve.v1 import (
    errors_pb2,  # noqa: F401  reflection serves what is imported
    model_service_pb2,
    system_service_pb2,
    worker_service_pb2,
)
from deltaserve_server.config import (
    DEFAULT_BIND,
    MIB,
    Device,
    DeviceKind,
    ServerConfig,
    usable_memory_bytes,
    usable_threads,
)
from deltaserve_server.durability.copies import Copies
from deltaserve_server.durability.directory import DataDirectory
from deltaserve_server.durability.errors import DataDirectoryError
from deltaserve_server.durability.model_storage import Durability, Schedule
from deltaserve_server.engine.catalog import ModelCatalog
from deltaserve_server.engine.clock import SYSTEM_CLOCK, Clock
from deltaserve_server.engine.events import LogObserver, Observer, Observers
from deltaserve_server.engine.quotas import Quotas
from deltaserve_server.memory import Budget, MakeStore, State, Store, heap
from deltaserve_server.memory.host import HostStore
from deltaserve_server.service.method_handlers import handler
from deltaserve_server.service.servicers.health_service import HealthServicer
from deltaserve_server.service.servicers.model_service import ModelServicer
from deltaserve_server.service.servicers.reflection_service import ReflectionServicer
from deltaserve_server.service.servicers.system_service import SystemServicer
from deltaserve_server.service.servicers.worker_service import WorkerServicer

_log = logging.getLogger(__name__)

_kernels_loaded: set[tuple[object, ...]] = set()
"""The structures of optimizers whose kernels this process has begun to load."""

_FRAME_BYTES = 4 * MIB
_SPARE_THREADS = 32

_POLL_SECONDS = 0.02
_GRPC_GRACE_SECONDS = 0.5
_GIVE_UP_SECONDS = 3.0
"""How long a stop waits for gRPC's calls after they are cancelled, and for each pool of threads."""

_NOTICE_SECONDS = 10.0
"""How often a stop that takes long says so in the log."""


class Server:
    """A parameter server; a context manager that starts and stops it.

    Args:
        config: The server's settings.
        clock: What leases, rounds and snapshots run on.
        observers: Receive the events of all models.
        credentials: The server's certificates; None means that connections are not encrypted.

    Raises:
        OSError: From `start`: the address cannot be bound.
        RuntimeError: The device is not there.
        ValueError: The folder for copies cannot be used.
        DataDirectoryError: The data directory cannot be used. From `start`: a model in it cannot be recovered.

    Attributes:
        config: The server's settings.
        incarnation: Identifies this server process.
        device: The device that holds the models' vectors.
        abandoned: What `stop` has waited for in vain. A process that goes on may be unable to exit by itself.

    Example:
        >>> with Server(ServerConfig(bind="127.0.0.1:0")) as server:
        ...     server.target.startswith("127.0.0.1:")
        True
    """

    _owns_process = True

    def __init__(
        self,
        config: ServerConfig | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        observers: Iterable[Observer] = (),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.config = self._complete(config)
        self.incarnation = secrets.token_hex(16)
        self.abandoned: list[str] = []
        self._credentials = credentials
        self._threads = self.config.threads or usable_threads()
        # One pool for all models: more threads than cores would only take turns.
        self._executor = ThreadPoolExecutor(self._threads, "update")
        self.device, memory_bytes, make_store = _place(self.config.device, self._executor, self._threads)
        self._health = HealthServicer()
        # Health first: a client that hears of a model may ask for its health at once.
        self._observers = Observers([self._health, LogObserver(), *observers])
        self._catalog = ModelCatalog(
            self.config,
            Quotas(self.config, self.config.memory_bytes or memory_bytes),
            self.incarnation,
            make_store,
            *_durable_place(self.config, clock),
            clock=clock,
            observers=self._observers,
        )
        # Twice the sessions: a worker may retry before the server has noticed that its first call is gone.
        workers = 2 * self.config.sessions + self.config.watchers + _SPARE_THREADS
        self._calls = ThreadPoolExecutor(workers, "rpc")
        self._grpc = grpc.server(self._calls, options=_options(self.config))
        self._services = self._add_services()
        self._target: str | None = None
        self._stopping = threading.Lock()
        self._saved: Future[bool] | None = None
        self._stopped = threading.Event()

    @staticmethod
    def _complete(config: ServerConfig | None) -> ServerConfig:
        """Returns the settings to use for those that were given."""
        return config or ServerConfig()

    @property
    def target(self) -> str:
        """HOST:PORT, or unix:PATH, for clients on this machine."""
        if self._target is None:
            raise RuntimeError("the server was not started")
        return self._target

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Listens, recovers the models of the data directory, and serves.

        Clients that ask for a model which is not recovered yet are told to wait.

        Args:
            check: Called again and again during recovery. An exception of it stops the server without loss and is
                raised from here.

        Raises:
            OSError: The address cannot be bound.
            DataDirectoryError: A model cannot be recovered.
        """
        if self._owns_process:  # a notebook's heap is none of a server's business
            heap.keep_freed()
        try:
            listens = _bind(self._grpc, self.config.bind, self._credentials)
        except OSError:
            self._catalog.stop()
            self._stopped.set()
            raise
        self._health.set_services(self._services, serving=False)
        self._grpc.start()  # before the recovery, so that clients hear how long it takes
        # Before the recovery, which needs the kernels too: it applies journaled updates again.
        _load_kernels(Adadelta())
        try:
            self._catalog.restore(check)
        except BaseException as error:
            try:
                saved = self._stop_models()
            finally:
                self._stop_grpc(0.0)
            if saved or isinstance(error, DataDirectoryError):
                raise
            raise DataDirectoryError(
                "the last snapshot of a model that was served already failed, see the log"
            ) from error
        self._health.set_services(self._services, serving=True)
        host, _, port = listens.rpartition(":")
        self._target = f"localhost:{port}" if host in ("0.0.0.0", "[::]") else listens  # noqa: S104
        _log.info("serving on %s, incarnation %s", listens, self.incarnation)

    def wait(self) -> None:
        """Returns when the server has stopped."""
        self._stopped.wait()

    def stop(self, grace_seconds: float = 5.0) -> bool:
        """Refuses new pushes, lets rounds that wait go on for at most `grace_seconds`, then stops.

        Last snapshots have no time limit; the log says so every ten seconds. Every other wait has one: `abandoned` and
        the log say what the server has given up.

        Returns:
            Whether every durable model has its last snapshot; the log says why one has not.
        """
        # In real time, whatever the models' clock is: a process that is told to stop has to end.
        with self._stopping:  # a second caller waits for the first, and gets the same answer
            deadline = monotonic() + grace_seconds
            self._health.enter_graceful_shutdown()  # the status of every service and model becomes NOT_SERVING
            self._catalog.quotas.draining = True
            # Rounds that are open may still close; their workers get their answers before the models end.
            while any(engine.waiting for engine in self._catalog.all()) and monotonic() < deadline:
                sleep(_POLL_SECONDS)
            try:
                return self._stop_models()
            finally:
                self._stop_grpc(max(deadline - monotonic(), _GRPC_GRACE_SECONDS))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(grace_seconds=0)

    def _stop_models(self) -> bool:
        """Ends the models; returns whether each durable one has its last snapshot."""
        if self._saved is None:  # else an earlier call was interrupted: its thread goes on
            self._saved = Future()
            # In a thread of its own: the main thread can then take a second signal even while the disk hangs.
            threading.Thread(target=self._save_models, args=[self._saved], name="stop", daemon=True).start()
        while not wait([self._saved], _NOTICE_SECONDS).done:
            _log.warning("still stopping: models and their last snapshots take long; a second signal gives them up")
        return self._saved.result()

    def _save_models(self, saved: "Future[bool]") -> None:
        try:
            saved.set_result(self._catalog.stop())
        except BaseException as error:  # raised in the thread that called stop
            saved.set_exception(error)

    def _stop_grpc(self, grace_seconds: float) -> None:
        if self._stopped.is_set():  # a second call of stop
            return
        if not self._grpc.stop(grace_seconds).wait(grace_seconds + _GIVE_UP_SECONDS):
            self.abandoned.append("calls that did not end when they were cancelled")
        # Without this the interpreter would wait for these threads when it exits, and without a limit.
        for what, executor in (("calls", self._calls), ("updates", self._executor)):
            thread = threading.Thread(target=executor.shutdown, daemon=True)
            thread.start()
            thread.join(_GIVE_UP_SECONDS)
            if thread.is_alive():
                self.abandoned.append(f"threads of {what}")
        for what in self.abandoned:
            _log.error("stopping: gave up waiting for %s", what)
        _log.info("stopped")
        self._stopped.set()

    def _add_services(self) -> list[str]:
        """Adds the services to gRPC's server; returns the names whose health is the server's own."""
        servicers = {
            model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]: ModelServicer(self._catalog),
            worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"]: WorkerServicer(
                self._catalog, self._executor, self._threads
            ),
            system_service_pb2.DESCRIPTOR.services_by_name["SystemService"]: SystemServicer(self._catalog, self.device),
        }
        handlers = [handler(service, servicer, self._observers) for service, servicer in servicers.items()]
        names = [service.full_name for service in servicers]
        reflected = ReflectionServicer([*names, health.SERVICE_NAME, reflection.SERVICE_NAME])
        descriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
        handlers.append(handler(descriptor, reflected, self._observers, chunked=False))
        self._grpc.add_generic_rpc_handlers(handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        return ["", *names]


class LocalServer(Server):
    """A server in this process on a free loopback port, for notebooks, tests and short runs.

    The arguments are those of `Server`. The default device is the CPU, and a free port replaces the default `bind`.

    Example:
        >>> import deltaserve
        >>> with LocalServer() as server, deltaserve.connect(server.target) as client:
        ...     client.models()
        []
    """

    _owns_process = False

    @staticmethod
    def _complete(config: ServerConfig | None) -> ServerConfig:
        config = config or ServerConfig(device="cpu")
        return replace(config, bind="127.0.0.1:0") if config.bind == DEFAULT_BIND else config


def _durable_place(config: ServerConfig, clock: Clock) -> tuple[DataDirectory | None, Copies | None]:
    """Returns the data directory, and what copies its snapshots elsewhere."""
    if config.data_dir is None or config.effective_durability == "none":
        return None, None
    schedule = Schedule(
        durability=Durability(config.effective_durability),
        updates=config.snapshot_updates,
        seconds=config.snapshot_seconds,
    )
    directory = DataDirectory(config.data_dir, schedule, clock)
    try:
        return directory, Copies(config.copy_to) if config.copy_to else None
    except BaseException:
        directory.close()
        raise


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    # A peer that is gone without a word is noticed by pings, which must not be taken for an attack.
    silent = round(config.keepalive_seconds * 1000)
    return [
        ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
        ("grpc.max_receive_message_length", config.message_bytes),
        ("grpc.max_send_message_length", -1),  # chunks keep answers within every client's limit
        ("grpc.http2.max_frame_size", _FRAME_BYTES),  # one frame for a chunk: fewer wake-ups for large vectors
        ("grpc.experimental.tcp_read_chunk_size", _FRAME_BYTES),
        ("grpc.keepalive_time_ms", silent),
        ("grpc.keepalive_timeout_ms", silent // 2),
        ("grpc.http2.ping_timeout_ms", silent // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ]


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """Makes a server listen on an address; returns it with the port that was chosen.

    Raises:
        OSError: The address cannot be bound.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:  # gRPC raises, or returns 0, depending on its version
        port = 0
    if not port:
        reason = "another server may use it, or it is not an address of this machine"
        raise OSError(f"cannot listen on {address}: {reason}")
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _place(kind: DeviceKind, executor: ThreadPoolExecutor, threads: int) -> tuple[Device, int, MakeStore]:
    """Returns the device where models live, the memory that they may use, and what makes their stores.

    Raises:
        RuntimeError: There is no GPU, or no torch.
    """
    memory_bytes = usable_memory_bytes()
    if not _wants_gpu(kind):
        device = Device(kind="cpu", name=_processor(), threads=threads)

        def make_store(state: State, optimizer: Optimizer, budget: Budget) -> Store:
            _load_kernels(optimizer)
            return HostStore(state, 0, budget, executor, threads)

        return device, memory_bytes, make_store
    try:
        from deltaserve_server.memory.device import DeviceStore, device_memory_bytes, device_name
    except ModuleNotFoundError as error:
        raise RuntimeError(f"device cuda: {error.name} is not installed: pip install 'deltaserve[cuda]'") from None
    device = Device(kind="cuda", name=device_name(), threads=0)
    memory_bytes = min(memory_bytes, device_memory_bytes())
    return device, memory_bytes, lambda state, _, budget: DeviceStore(state, 0, budget)


def _wants_gpu(kind: DeviceKind) -> bool:
    """Returns whether models live on a GPU. Importing torch takes seconds: without an NVIDIA driver it is not tried."""
    if kind != "auto":
        return kind == "cuda"
    if not (find_spec("torch") and find_spec("triton") and find_library("cuda")):
        return False
    import torch

    return torch.cuda.is_available()


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load_kernels(optimizer: Optimizer) -> None:
    """Compiles or loads an optimizer's CPU kernels, in the background: this takes longer than a server's start."""
    if optimizer.structure in _kernels_loaded:
        return
    _kernels_loaded.add(optimizer.structure)

    def load() -> None:
        started = monotonic()
        from deltaserve_server.optimizers import cpu, values  # noqa: F401

        cpu.prepare(optimizer)
        _log.info("kernels of %s ready after %.1f s", optimizer.kind, monotonic() - started)

    threading.Thread(target=load, name="kernels", daemon=True).start()
