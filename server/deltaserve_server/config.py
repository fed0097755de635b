"""The settings of a server."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DeviceKind = Literal["auto", "cpu", "cuda"]

DurabilityKind = Literal["none", "snapshot", "journal", "fsync"]

MIB = 1 << 20

_LEASE_SECONDS = 1e9
"""The longest lease that a server may be told to give."""

_LOOPBACK = "127.", "localhost:", "[::1]:"

DEFAULT_BIND = "127.0.0.1:50051"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The device that holds the models' vectors.

    Attributes:
        kind: "cpu" or "cuda".
        name: The name of the processor or GPU.
        threads: How many threads an update runs on; 0 on a GPU.
    """

    kind: str
    name: str
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """A server's settings.

    Attributes:
        bind: HOST:PORT to listen on, where port 0 chooses a free port; or unix:PATH, a socket of this host.
        device: Where models live; "auto" takes a GPU if torch finds one.
        threads: Threads for updates on the CPU; None means one a core.
        memory_bytes: Memory for models, their versions and pushes that wait; None means 80 % of the memory of the
            machine, or of its control group.
        staged_bytes: Memory for pushes that are not part of an update yet; None means half of `memory_bytes`.
        message_bytes: Size of the largest message. The default is gRPC's own, which every client accepts.
        models: How many models there may be.
        sessions: How many live sessions all models may have.
        watchers: How many WatchModel calls all models may have.
        lease_seconds: The lease of a session that does not ask for one.
        lease_seconds_min: The shortest lease that a session may ask for.
        lease_seconds_max: The longest lease that a session may ask for.
        keepalive_seconds: The server pings a connection that is silent for this long, and closes it if no answer
            comes within half of it.
        shared_memory: Whether workers of this host and user may exchange vectors through shared memory; None means
            yes if `bind` is a loopback address or a Unix socket.
        data_dir: The folder where models are durable; None means nowhere.
        durability: What survives the death of the server: "none"; "snapshot", each model as of its last snapshot;
            "journal", every acknowledged push; "fsync", every acknowledged push even if the machine loses power. None
            means "snapshot" with a `data_dir`, "none" without.
        snapshot_updates: A snapshot is due after this many updates of a model; None means it is not.
        snapshot_seconds: A snapshot is due this long after the last one if the model has changed; None means it is
            not.
        copy_to: An fsspec URL of a folder that each snapshot is copied to, as s3://bucket/path; None means nowhere.
        accept_data_loss: Whether to start with what is good if a file in `data_dir` is corrupt.
    """

    bind: str = DEFAULT_BIND
    device: DeviceKind = "auto"
    threads: int | None = None
    memory_bytes: int | None = None
    staged_bytes: int | None = None
    message_bytes: int = 4 * MIB
    models: int = 64
    sessions: int = 256
    watchers: int = 64
    lease_seconds: float = 30.0
    lease_seconds_min: float = 1.0
    lease_seconds_max: float = 3600.0
    keepalive_seconds: float = 20.0
    shared_memory: bool | None = None
    data_dir: Path | None = None
    durability: DurabilityKind | None = None
    snapshot_updates: int | None = None
    snapshot_seconds: float | None = 60.0
    copy_to: str | None = None
    accept_data_loss: bool = False

    def __post_init__(self) -> None:
        host, separator, port = self.bind.rpartition(":")
        if not self._unix and (not separator or not host or not port.isdecimal() or int(port) > 65_535):
            raise ValueError(f"bind: expected HOST:PORT or unix:PATH, got {self.bind!r}")
        # Errors name the setting as the keyword argument and the flag do.
        counts = "threads", "memory_bytes", "staged_bytes", "message_bytes", "models", "sessions", "watchers"
        for name in (*counts, "snapshot_updates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < self.lease_seconds_min <= self.lease_seconds <= self.lease_seconds_max <= _LEASE_SECONDS:
            bounds = f"0 < lease_seconds_min <= lease_seconds <= lease_seconds_max <= {_LEASE_SECONDS:g}"
            raise ValueError(f"lease_seconds: expected {bounds}")
        if self.keepalive_seconds <= 0:
            raise ValueError(f"keepalive_seconds: expected more than 0, got {self.keepalive_seconds}")
        if self.snapshot_seconds is not None and self.snapshot_seconds <= 0:
            raise ValueError(f"snapshot_seconds: expected more than 0, got {self.snapshot_seconds}")
        if self.data_dir is not None and self.effective_durability == "none":
            raise ValueError(
                "durability: expected snapshot, journal or fsync with a data directory, got none; "
                "choose one of them, or leave out the data directory"
            )
        if self.data_dir is None:  # a setting without effect is a mistake, and may cost somebody's model
            given = {
                f"durability {self.durability}": self.effective_durability != "none",
                "snapshot_updates": self.snapshot_updates is not None,
                "copy_to": self.copy_to is not None,
                "accept_data_loss": self.accept_data_loss,
            }
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"{name}: needs a data directory; name one, as in --data-dir DIR")

    @property
    def effective_durability(self) -> DurabilityKind:
        """`durability`, or its default."""
        if self.durability is not None:
            return self.durability
        return "none" if self.data_dir is None else "snapshot"

    @property
    def offers_shared_memory(self) -> bool:
        """`shared_memory`, or its default."""
        if self.shared_memory is not None:
            return self.shared_memory
        return self._unix or self.bind.startswith(_LOOPBACK)

    @property
    def _unix(self) -> bool:
        return self.bind.startswith("unix:") and len(self.bind) > len("unix:")


def usable_memory_bytes() -> int:
    """Returns 80 % of the memory that this process may use."""
    # Both versions of control groups; a container's limit is lower than the machine's memory.
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes":
        with suppress(OSError, ValueError):  # no such control group, or "max"
            limits.append(int(Path(path).read_text()))
    return min(filter(None, limits)) * 4 // 5


def usable_threads() -> int:
    """Returns how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
