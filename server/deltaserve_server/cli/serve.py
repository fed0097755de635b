"""`deltaserve serve`: a server in this process, until it is told to stop."""

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
    from deltaserve_server import Server, ServerConfig

log = logging.getLogger("deltaserve")

_LOOK_SECONDS = 0.5

_STATUS = {signal.SIGTERM: 0, signal.SIGINT: INTERRUPTED}
"""By signal: with what a server that stops for it ends."""


class Device(StrEnum):
    """Where models live."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Durability(StrEnum):
    """What survives the death of the server."""

    NONE = "none"
    SNAPSHOT = "snapshot"
    JOURNAL = "journal"
    FSYNC = "fsync"


class Level(StrEnum):
    """What is worth a line in the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


Bind = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        envvar="DELTASERVE_BIND",
        parser=parse_address,
        help="Where to listen. 0.0.0.0 means every address of this machine; port 0 chooses a free port. Or unix:PATH.",
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", envvar="DELTASERVE_DEVICE", help="Where models live; auto takes a GPU if there is one."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        envvar="DELTASERVE_THREADS",
        help="Threads for updates on the CPU.",
        show_default="one a core",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES",
        envvar="DELTASERVE_MEMORY_BYTES",
        parser=parse_bytes,
        help="For all models, versions and waiting pushes, as 8GiB.",
        show_default="80 % of the memory",
    ),
]
Message = Annotated[
    int,
    typer.Option(
        metavar="BYTES",
        envvar="DELTASERVE_MESSAGE_BYTES",
        parser=parse_bytes,
        help="Largest message.",
    ),
]
Models = Annotated[int, typer.Option(min=1, metavar="N", envvar="DELTASERVE_MODELS", help="Models at a time.")]
Sessions = Annotated[
    int, typer.Option(min=1, metavar="N", envvar="DELTASERVE_SESSIONS", help="Live sessions at a time.")
]
SharedMemory = Annotated[
    bool | None,
    typer.Option(
        "--shared-memory/--no-shared-memory",
        envvar="DELTASERVE_SHARED_MEMORY",
        help="Whether workers of the same user on this host may exchange vectors through memory.",
        show_default="if --bind is loopback or unix:PATH",
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="SECONDS",
        envvar="DELTASERVE_GRACE_SECONDS",
        help="How long rounds under way may go on after SIGTERM or Ctrl+C.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="DELTASERVE_DATA_DIR",
        parser=parse_folder,
        help="Where models are kept safe; one server, one directory.",
        show_default="nowhere",
    ),
]
DurabilityOption = Annotated[
    Durability | None,
    typer.Option(
        "--durability",
        envvar="DELTASERVE_DURABILITY",
        help="What survives the server's death: the last snapshot; with journal every acknowledged push; with fsync "
        "those also where the machine loses its power.",
        show_default="snapshot with --data-dir, else none",
    ),
]
SnapshotUpdates = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        envvar="DELTASERVE_SNAPSHOT_UPDATES",
        help="Take a snapshot of a model after so many updates.",
        show_default="never for that reason",
    ),
]
SnapshotSeconds = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="SECONDS",
        envvar="DELTASERVE_SNAPSHOT_SECONDS",
        help="And after so many seconds in which something happened; 0 means never for that reason.",
    ),
]
CopyTo = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="DELTASERVE_COPY_TO",
        help="Copy each snapshot to this folder too, any that fsspec knows: s3://bucket/path, file:///mnt/backup.",
        show_default="nowhere",
    ),
]
AcceptDataLoss = Annotated[
    bool,
    typer.Option("--accept-data-loss", help="Start also where a file in --data-dir is corrupt, with what is good."),
]
LogLevel = Annotated[Level, typer.Option("--log-level", envvar="DELTASERVE_LOG_LEVEL", help="What is logged.")]


def serve(
    context: typer.Context,
    bind: Bind = "127.0.0.1:50051",
    device: DeviceOption = Device.AUTO,
    threads: Threads = None,
    memory_bytes: Memory = None,
    message_bytes: Message = "4MiB",  # type: ignore[assignment]  # typer parses defaults too
    models: Models = 64,
    sessions: Sessions = 256,
    shared_memory: SharedMemory = None,
    data_dir: DataDir = None,
    durability: DurabilityOption = None,
    snapshot_updates: SnapshotUpdates = None,
    snapshot_seconds: SnapshotSeconds = 60.0,
    copy_to: CopyTo = None,
    accept_data_loss: AcceptDataLoss = False,
    grace_seconds: Grace = 5.0,
    log_level: LogLevel = Level.INFO,
) -> None:
    """Start a server. It logs to the standard error stream; Ctrl+C or SIGTERM stop it in good order."""
    from deltaserve_server import Server, ServerConfig

    _start_log(log_level)
    _log_settings(context)
    signals = _Signals()
    config = _configured(
        ServerConfig,
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
    _check_bind(bind)
    server = _started(lambda: Server(config), signals.check)
    typer.echo(_welcome(server))
    sys.stdout.flush()
    number = signals.wait()
    then = "" if config.effective_durability == "none" else ", then last snapshots are written"
    log.info("%s: stopping; rounds go on for at most %g s%s", number.name, grace_seconds, then)
    kept = server.stop(grace_seconds=grace_seconds)
    status = _STATUS[number] if kept else 1
    _exit_if_stuck(server, status)
    raise typer.Exit(status)


def _exit_if_stuck(server: "Server | None", status: int) -> None:
    """Ends the process at once if a thread of the server hangs: the interpreter would wait for it."""
    if server and server.abandoned:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)


def _configured(kind: "type[ServerConfig]", **settings: Any) -> "ServerConfig":
    try:
        return kind(**settings)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _started(make: "Callable[[], Server]", check: Callable[[], None]) -> "Server":
    """Makes and starts a server; what stops it from starting is told in one line. `check` may end it meanwhile."""
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
    """Says why an address cannot be listened on: gRPC does not tell, and writes to the error stream by itself."""
    if bind.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as tried, suppress(OSError):
            if tried.connect_ex(bind.removeprefix("unix:")) == 0:  # gRPC would put its socket in the place of that one
                raise CommandError(f"cannot listen on {bind}: another server is there; choose another with --bind")
        return
    host, _, port = bind.rpartition(":")
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as error:
        reasons = {errno.EADDRINUSE: "the port is in use", errno.EADDRNOTAVAIL: "this machine has no such address"}
        reason = reasons.get(error.errno or 0, error.strerror)
        raise CommandError(f"cannot listen on {bind}: {reason}; choose another with --bind HOST:PORT") from error


def _welcome(server: "Server") -> str:
    from deltaserve import __version__

    device, host, port = server.device, server.config.bind.rpartition(":")[0], server.target.rpartition(":")[2]
    listens = server.target if server.target.startswith("unix:") else f"{host}:{port}"
    threads = f", {device.threads} thread{'s' * (device.threads != 1)}" if device.kind == "cpu" else ""
    config = server.config
    durability = config.effective_durability
    safe = [f"keeps    {durability} in {config.data_dir}"] if durability != "none" else []
    lines = [
        f"deltaserve {__version__} listens on {listens}",
        f"device   {device.kind}: {device.name}{threads}",
        *safe,
        f'connect  deltaserve.connect("{server.target}")',
        f"try      deltaserve train digits --workers 2 --target {server.target}",
    ]
    return "\n".join(lines)


class _Signals:
    """SIGTERM and SIGINT, taken over. The first one is to stop the server, a second one ends it at once."""

    def __init__(self) -> None:
        self._arrived: list[signal.Signals] = []
        self._wake: SimpleQueue[None] = SimpleQueue()  # which a handler may use, whatever it has interrupted
        for number in _STATUS:
            signal.signal(number, self._take)

    def check(self) -> None:
        """Ends the command where one has come, while the server does not serve yet."""
        if self._arrived:
            number = self._arrived[0]
            log.info("%s: stopping, before all models were read", number.name)
            raise typer.Exit(_STATUS[number])

    def wait(self) -> signal.Signals:
        """Waits for the first."""
        while not self._arrived:  # a signal that came while the process was stopped wakes any thread: look again
            with suppress(Empty):
                self._wake.get(timeout=_LOOK_SECONDS)
        return self._arrived[0]

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._arrived:
            os._exit(128 + number)
        self._arrived.append(signal.Signals(number))
        self._wake.put(None)


def _start_log(level: Level) -> None:
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _log_settings(context: typer.Context) -> None:
    """Logs each setting that was chosen, and who chose it: the flag beats the environment."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        value = context.params.get(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            log.info("%s = %s, from %s", parameter.name, value, parameter.opts[0])
        elif source is not None and source.name == "ENVIRONMENT":
            log.info("%s = %s, from %s", parameter.name, value, parameter.envvar)
