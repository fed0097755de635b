"""Puts the parts of a server together; the only place that knows all of them."""

import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

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
from deltaserve_server.memory import Budget, Store, heap
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector
from deltaserve_server.service.rpc import handler
from deltaserve_server.service.servicers.model_service import ModelServicer
from deltaserve_server.service.servicers.system_service import SystemServicer
from deltaserve_server.service.servicers.worker_service import WorkerServicer

_log = logging.getLogger(__name__)

_FRAME_BYTES = 4 * MIB
_SPARE_THREADS = 32


class Server:
    """A parameter server; a context manager that starts and stops it.

    Args:
        config: Its settings.

    Raises:
        OSError: From `start`, where the address cannot be bound.
        RuntimeError: The device that is asked for is not there.
        ValueError: The place for copies cannot be used.
        DataDirectoryError: The data directory cannot be used; from `start`, where a model in it does not come back.

    Example:
        >>> with Server(ServerConfig(bind="127.0.0.1:0")) as server:
        ...     server.target.startswith("127.0.0.1:")
        True
    """

    _owns_process = True

    def __init__(self, config: ServerConfig | None = None) -> None:
        self.config = config or ServerConfig()
        self.incarnation = secrets.token_hex(16)
        self._health = health.HealthServicer()
        threads = self.config.threads or usable_threads()
        executor = ThreadPoolExecutor(threads, "update")
        place = _on_gpu() if _wants_gpu(self.config.device) else _on_cpu(executor, threads)
        self.device = place.device
        memory_bytes = self.config.memory_bytes or place.memory_bytes
        self._catalog = ModelCatalog(
            self.config,
            memory_bytes,
            self.incarnation,
            place.make_store,
            self._health,
            executor,
            threads,
            *_safe_place(self.config),
        )
        # Twice: a worker may retry while the server has not yet seen that its first call is gone.
        workers = 2 * self.config.sessions + self.config.watchers + _SPARE_THREADS
        self._grpc = grpc.server(ThreadPoolExecutor(workers, "rpc"), options=_options(self.config))
        self._add_services()
        self._target: str | None = None
        self._stopping = threading.Lock()

    @property
    def target(self) -> str:
        """HOST:PORT, or unix:PATH, for clients on this machine."""
        if self._target is None:
            raise RuntimeError("the server was not started")
        return self._target

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Binds, brings back what is in the data directory, and serves.

        Meanwhile whoever asks for a model that is still to come is told so.

        Args:
            check: Is called again and again while models are read. What it raises ends the server in good order, and
                is raised from here; nothing is lost by that.

        Raises:
            OSError: The address cannot be bound.
            DataDirectoryError: A model does not come back.
        """
        if self._owns_process:
            heap.keep_freed()
        bind = self.config.bind
        try:
            port = self._grpc.add_insecure_port(bind)
        except RuntimeError:
            port = 0
        if not port:
            self._catalog.stop()
            raise OSError(f"cannot listen on {bind}: is another server there, or is the address not this machine's?")
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._grpc.start()
        # Before models are read, and not after: to make their updates again takes the kernels too.
        threading.Thread(target=_load_kernels, name="kernels", daemon=True).start()
        try:
            self._catalog.restore(check, accept_data_loss=self.config.accept_data_loss)
        except BaseException as error:
            kept = self._catalog.stop()
            self._grpc.stop(0).wait()
            if kept or isinstance(error, DataDirectoryError):
                raise
            raise DataDirectoryError("a model that was served already has no last snapshot, as the log says") from error
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        host = bind.rpartition(":")[0]
        listens = bind if bind.startswith("unix:") else f"{host}:{port}"
        self._target = f"localhost:{port}" if host in ("0.0.0.0", "[::]") else listens  # noqa: S104
        _log.info("serving on %s, incarnation %s", listens, self.incarnation)

    def wait(self) -> None:
        """Returns when the server has stopped."""
        self._grpc.wait_for_termination()

    def stop(self, grace_seconds: float = 5.0) -> bool:
        """Refuses new pushes, lets rounds that wait go on for at most `grace_seconds`, then stops.

        Returns:
            Whether each model that is to be kept has its last snapshot; the log says what is in the way of it.
        """
        with self._stopping:
            deadline = monotonic() + grace_seconds
            self._health.enter_graceful_shutdown()  # every service and every model: NOT_SERVING
            self._catalog.drain()
            while self._catalog.waiting() and monotonic() < deadline:
                sleep(0.02)
            kept = self._catalog.stop()
            self._grpc.stop(max(deadline - monotonic(), 0.5)).wait()
            _log.info("stopped")
            return kept

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(grace_seconds=0)

    def _add_services(self) -> None:
        servicers = {
            model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]: ModelServicer(self._catalog),
            worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"]: WorkerServicer(self._catalog),
            system_service_pb2.DESCRIPTOR.services_by_name["SystemService"]: SystemServicer(self._catalog, self.device),
        }
        self._grpc.add_generic_rpc_handlers([handler(service, servicer) for service, servicer in servicers.items()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self._services = [service.full_name for service in servicers]
        reflection.enable_server_reflection([*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc)

    def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for name in ("", *self._services):
            self._health.set(name, status)


class LocalServer(Server):
    """A server in this process on a free loopback port, for notebooks, tests and short runs.

    Args:
        config: Its settings; `bind` is replaced by a free port where it is the default.

    Example:
        >>> import deltaserve
        >>> with LocalServer() as server, deltaserve.connect(server.target) as client:
        ...     client.models()
        []
    """

    _owns_process = False

    def __init__(self, config: ServerConfig | None = None) -> None:
        config = config or ServerConfig(device="cpu")
        super().__init__(replace(config, bind="127.0.0.1:0") if config.bind == DEFAULT_BIND else config)


def _safe_place(config: ServerConfig) -> tuple[DataDirectory | None, Copies | None]:
    """Returns where models are kept safe, and where their snapshots are copied to."""
    if config.data_dir is None or config.keeps == "none":
        return None, None
    schedule = Schedule(
        durability=Durability(config.keeps), updates=config.snapshot_updates, seconds=config.snapshot_seconds
    )
    directory = DataDirectory(config.data_dir, schedule)
    try:
        return directory, Copies(config.copy_to) if config.copy_to else None
    except BaseException:
        directory.close()
        raise


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    silent = round(config.keepalive_seconds * 1000)
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.max_frame_size", _FRAME_BYTES),
        ("grpc.experimental.tcp_read_chunk_size", _FRAME_BYTES),
        ("grpc.keepalive_time_ms", silent),
        ("grpc.keepalive_timeout_ms", silent // 2),
        ("grpc.http2.ping_timeout_ms", silent // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where models live: what GetServerInfo tells of it, its usable memory, and what makes a model's store there."""

    device: Device
    memory_bytes: int
    make_store: Callable[[Vector, Budget], Store]


def _on_cpu(executor: ThreadPoolExecutor, threads: int) -> _Place:
    device = Device(kind="cpu", name=_processor(), threads=threads)
    return _Place(
        device, usable_memory_bytes(), lambda weights, budget: HostStore(weights, 0, budget, executor, threads)
    )


def _on_gpu() -> _Place:
    """Raises RuntimeError where there is no GPU, or no torch."""
    try:
        from deltaserve_server.memory.device import DeviceStore, device_memory_bytes, device_name
    except ModuleNotFoundError as error:
        raise RuntimeError(f"device cuda: {error.name} is not installed: pip install 'deltaserve[cuda]'") from None
    device = Device(kind="cuda", name=device_name(), threads=0)
    memory_bytes = min(usable_memory_bytes(), device_memory_bytes())
    return _Place(device, memory_bytes, lambda weights, budget: DeviceStore(weights, 0, budget))


def _wants_gpu(asked: DeviceKind) -> bool:
    """Whether models are to live on a GPU; without an NVIDIA driver torch is not even imported to find out."""
    if asked != "auto":
        return asked == "cuda"
    if not (find_spec("torch") and find_spec("triton") and find_library("cuda")):
        return False
    import torch

    return torch.cuda.is_available()


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def _load_kernels() -> None:
    """Compiles or loads the CPU kernels, which takes longer than all the rest, while the server already serves."""
    started = monotonic()
    from deltaserve_server.adadelta import cpu, values  # noqa: F401

    _log.info("kernels ready after %.1f s", monotonic() - started)
