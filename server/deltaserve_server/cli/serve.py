"""`deltaserve serve`: runs a server in this process until a signal stops it."""

import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve_server.cli.errors import INTERRUPTED, CommandError, UsageError
from deltaserve_server.cli.options import parse_address, parse_bytes, parse_folder

if TYPE_CHECKING:
    from deltaserve_server import Server

log = logging.getLogger("deltaserve")

_POLL_SECONDS = 0.5

_EXIT_STATUS = {signal.SIGTERM: 0, signal.SIGINT: INTERRUPTED}
"""The exit status of a server that was stopped by a signal. SIGTERM is how systemd and Kubernetes stop a service."""


class Device(StrEnum):
    """The kind of device that holds the models."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Durability(StrEnum):
    """What survives when the server process dies."""

    NONE = "none"
    SNAPSHOT = "snapshot"
    JOURNAL = "journal"
    FSYNC = "fsync"


class LogLevel(StrEnum):
    """The lowest level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


def _setting(variable: str, *flags: str, panel: str | None = None, **details: Any) -> Any:
    """Returns an option that an environment variable can set; the help of the command explains the variables' names."""
    return typer.Option(*flags, envvar=f"DELTASERVE_{variable}", show_envvar=False, rich_help_panel=panel, **details)


BindOption = Annotated[
    str,
    _setting(
        "BIND",
        metavar="HOST:PORT",
        parser=parse_address,
        help="Address to listen on, or unix:PATH. 0.0.0.0 means all addresses of this machine, port 0 a free port.",
    ),
]
DeviceOption = Annotated[
    Device, _setting("DEVICE", "--device", help="Device that holds the models; auto means a GPU if there is one.")
]
ThreadsOption = Annotated[
    int | None,
    _setting("THREADS", min=1, metavar="N", help="Threads for updates on the CPU.", show_default="one per core"),
]
GraceOption = Annotated[
    float,
    _setting("GRACE_SECONDS", min=0, metavar="SECONDS", help="How long a stopping server waits for open rounds."),
]
LogLevelOption = Annotated[
    LogLevel, _setting("LOG_LEVEL", "--log-level", metavar="LEVEL", help="debug, info or warning.")
]
SharedMemoryOption = Annotated[
    bool | None,
    _setting(
        "SHARED_MEMORY",
        "--shared-memory/--no-shared-memory",
        panel="Transport",
        help="Let workers of the same user on this host exchange vectors through shared memory.",
        show_default="yes if --bind is a loopback address or unix:PATH",
    ),
]

_LIMITS = "Limits"

MemoryOption = Annotated[
    int | None,
    _setting(
        "MEMORY_BYTES",
        panel=_LIMITS,
        metavar="BYTES",
        parser=parse_bytes,
        help="Memory for models, their versions and waiting pushes, as 8GiB.",
        show_default="80 % of the memory",
    ),
]
MessageOption = Annotated[
    int,
    _setting("MESSAGE_BYTES", panel=_LIMITS, metavar="BYTES", parser=parse_bytes, help="Largest size of a message."),
]
ModelsOption = Annotated[int, _setting("MODELS", panel=_LIMITS, min=1, metavar="N", help="Most models at a time.")]
SessionsOption = Annotated[
    int, _setting("SESSIONS", panel=_LIMITS, min=1, metavar="N", help="Most live sessions at a time.")
]

_DURABILITY = "Durability"

DataDirOption = Annotated[
    Path | None,
    _setting(
        "DATA_DIR",
        panel=_DURABILITY,
        metavar="DIR",
        parser=parse_folder,
        help="Directory for snapshots and journals; only one server may use it.",
        show_default="none: models are in memory only",
    ),
]
DurabilityOption = Annotated[
    Durability | None,
    _setting(
        "DURABILITY",
        "--durability",
        panel=_DURABILITY,
        metavar="MODE",
        help="What survives if the server dies. none: nothing. snapshot: the last snapshot. journal: every "
        "acknowledged push. fsync: every acknowledged push, even if the power fails.",
        show_default="snapshot with --data-dir, else none",
    ),
]
SnapshotUpdatesOption = Annotated[
    int | None,
    _setting(
        "SNAPSHOT_UPDATES",
        panel=_DURABILITY,
        min=1,
        metavar="N",
        help="Take a snapshot of a model every N updates.",
        show_default="by time only",
    ),
]
SnapshotSecondsOption = Annotated[
    float,
    _setting(
        "SNAPSHOT_SECONDS",
        panel=_DURABILITY,
        min=0,
        metavar="SECONDS",
        help="Take a snapshot of a changed model at this interval; 0 means by --snapshot-updates only.",
    ),
]
CopyToOption = Annotated[
    str | None,
    _setting(
        "COPY_TO",
        panel=_DURABILITY,
        metavar="URL",
        help="Also copy snapshots to this folder, at any URL that fsspec supports: s3://bucket/path, file:///mnt/x.",
        show_default="no copies",
    ),
]
# No environment variable: the option is for one start, and must not stay in a service's configuration.
AcceptDataLossOption = Annotated[
    bool,
    typer.Option(
        "--accept-data-loss",
        rich_help_panel=_DURABILITY,
        help="Start even if a file in --data-dir is corrupt, with the data that is intact.",
    ),
]


def serve(
    context: typer.Context,
    bind: BindOption = "127.0.0.1:50051",
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    memory_bytes: MemoryOption = None,
    message_bytes: MessageOption = "4MiB",  # type: ignore[assignment]  # typer parses defaults too
    models: ModelsOption = 64,
    sessions: SessionsOption = 256,
    shared_memory: SharedMemoryOption = None,
    data_dir: DataDirOption = None,
    durability: DurabilityOption = None,
    snapshot_updates: SnapshotUpdatesOption = None,
    snapshot_seconds: SnapshotSecondsOption = 60.0,
    copy_to: CopyToOption = None,
    accept_data_loss: AcceptDataLossOption = False,
    grace_seconds: GraceOption = 5.0,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Start a server, which logs to standard error.

    Ctrl+C or SIGTERM stops it after open rounds and last snapshots.
    A second signal ends it at once.

    Environment variables set options too: DELTASERVE_BIND sets --bind.
    """
    from deltaserve_server import Server, ServerConfig

    try:
        config = ServerConfig(
            bind=bind,
            device=device.value,
            threads=threads,
            memory_bytes=memory_bytes,
            message_bytes=message_bytes,
            models=models,
            sessions=sessions,
            shared_memory=shared_memory,
            data_dir=data_dir,
            durability=durability.value if durability else None,
            snapshot_updates=snapshot_updates,
            snapshot_seconds=snapshot_seconds or None,
            copy_to=copy_to,
            accept_data_loss=accept_data_loss,
        )
    except ValueError as error:  # settings that contradict each other, which typer cannot check
        raise UsageError(str(error)) from error
    _check_bind(bind)
    _start_log(log_level, context)
    signals = _StopSignals()  # before the start: recovery of large models takes long, and must end at a signal
    server = _start(lambda: Server(config), signals.check)
    typer.echo(_welcome(server))
    sys.stdout.flush()  # a script that waits for these lines reads them from a pipe
    number = signals.wait()
    then = "" if config.effective_durability == "none" else ", then takes last snapshots"
    log.info("%s: stopping; waits at most %g s for open rounds%s", number.name, grace_seconds, then)
    # Without its last snapshot a model may come back older: whoever stops the server must see that.
    saved = server.stop(grace_seconds=grace_seconds)
    status = _EXIT_STATUS[number] if saved else 1
    _exit_if_stuck(server, status)
    raise typer.Exit(status)


def _exit_if_stuck(server: "Server | None", status: int) -> None:
    """Ends the process at once if a thread of the server hangs: the interpreter would wait for it."""
    if server and server.abandoned:
        logging.shutdown()  # os._exit flushes nothing
        sys.stdout.flush()
        os._exit(status)


def _start(make: "Callable[[], Server]", check: Callable[[], None]) -> "Server":
    """Makes and starts a server, and reports in one line what prevents it; `check` may end the command meanwhile."""
    from deltaserve_server.durability.errors import DataDirectoryError

    server: Server | None = None
    try:
        server = make()
        server.start(check)
    except typer.Exit as end:  # a RuntimeError too
        _exit_if_stuck(server, end.exit_code)
        raise
    except (OSError, RuntimeError, ValueError, DataDirectoryError) as error:
        if server and server.abandoned:
            log.error("%s", error)
            _exit_if_stuck(server, 1)
        raise CommandError(str(error)) from error
    return server


def _check_bind(bind: str) -> None:
    """Raises CommandError with the reason if the address cannot be bound, which gRPC only writes to standard error."""
    if bind.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            if probe.connect_ex(bind.removeprefix("unix:")) == 0:  # gRPC would replace the other server's socket
                raise CommandError(f"cannot listen on {bind}: another server uses it; choose another path with --bind")
        return
    host, _, port = bind.rpartition(":")
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: an earlier server's connections that still time out do not keep the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()  # fails where bind does not: another socket with SO_REUSEADDR may be bound to the port too
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "the port is in use",
            errno.EADDRNOTAVAIL: "the address does not belong to this machine",
        }
        reason = reasons.get(error.errno or 0, error.strerror)
        raise CommandError(f"cannot listen on {bind}: {reason}; choose another with --bind HOST:PORT") from error


def _welcome(server: "Server") -> str:
    from deltaserve import __version__

    device, host, port = server.device, server.config.bind.rpartition(":")[0], server.target.rpartition(":")[2]
    # Port 0 has become a port. The host stays as given: 0.0.0.0 says more than the target's localhost.
    address = server.target if server.target.startswith("unix:") else f"{host}:{port}"
    threads = f", {device.threads} thread{'s' * (device.threads != 1)}" if device.kind == "cpu" else ""
    config = server.config
    durability = config.effective_durability
    lines = [
        f"deltaserve {__version__} listens on {address}",
        f"device   {device.kind}: {device.name}{threads}",
        *([f"durable  {durability} in {config.data_dir}"] if durability != "none" else []),
        f'connect  deltaserve.connect("{server.target}")',
        f"try      deltaserve train digits --workers 2 --target {server.target}",
    ]
    return "\n".join(lines)


class _StopSignals:
    """Handles SIGTERM and SIGINT: the first one asks the server to stop, a second one ends the process at once."""

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._wake: SimpleQueue[None] = SimpleQueue()  # unlike a lock, safe in a handler wherever it interrupts
        for number in _EXIT_STATUS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Ends the command if a signal arrived before the server serves."""
        if self._received:
            number = self._received[0]
            log.info("%s: stopping before all models are recovered", number.name)
            raise typer.Exit(_EXIT_STATUS[number])

    def wait(self) -> signal.Signals:
        """Waits for the first signal and returns it."""
        while not self._received:  # another thread may receive the signal, which does not wake this one: poll
            with suppress(Empty):
                self._wake.get(timeout=_POLL_SECONDS)
        return self._received[0]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)  # not sys.exit, which waits for threads: the user has waited long enough
        self._received.append(signal.Signals(number))
        self._wake.put(None)


def _start_log(level: LogLevel, context: typer.Context) -> None:
    """Starts the log with each setting that is not a default: from a flag, which wins, or from the environment."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime  # the Z in the format says UTC
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)  # an import may have set up the log
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        value = context.params.get(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            log.info("%s = %s, from %s", parameter.name, value, parameter.opts[0])
        elif source is not None and source.name == "ENVIRONMENT":
            log.info("%s = %s, from %s", parameter.name, value, parameter.envvar)
