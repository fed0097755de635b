"""How a server is set up."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DeviceKind = Literal["auto", "cpu", "cuda"]

DurabilityKind = Literal["none", "snapshot", "journal", "fsync"]

MIB = 1 << 20

_LEASE_SECONDS = 1e9
"""Longer than any lease is of use."""

_LOOPBACK = "127.", "localhost:", "[::1]:"

DEFAULT_BIND = "127.0.0.1:50051"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What holds the vectors.

    Attributes:
        kind: "cpu" or "cuda".
        name: The device's own name.
        threads: Threads that an update runs on; 0 on a GPU.
    """

    kind: str
    name: str
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """A server's settings.

    Attributes:
        bind: HOST:PORT to listen on; port 0 chooses a free one. Or unix:PATH, a socket of this host.
        device: Where models live; "auto" takes a GPU where torch finds one.
        threads: Threads for updates on the CPU; None means one a core.
        memory_bytes: For all models, their versions and pushes that wait; None means 80 % of the machine's memory, or
            of what its control group allows.
        staged_bytes: For pushes that have not yet become an update; None means half of `memory_bytes`.
        message_bytes: Largest message; gRPC's own default, which every client accepts.
        models: Models at a time.
        sessions: Live sessions at a time, over all models.
        watchers: Calls of WatchModel at a time, over all models.
        lease_seconds: The lease of a session that does not ask for one.
        lease_seconds_min: Shortest lease.
        lease_seconds_max: Longest lease.
        keepalive_seconds: How long a connection may be silent before it is pinged; the answer may take half as long.
        shared_memory: Whether workers on this host that run as the same user may exchange vectors through memory that
            the server shares with them; None means if `bind` is a loopback address or a Unix socket.
        data_dir: Where models are kept safe; None means nowhere.
        durability: What survives the death of the server: "none"; "snapshot", each model as of its last snapshot;
            "journal", every acknowledged push; "fsync", those also where the machine loses its power. None means
            "snapshot" where there is a `data_dir`.
        snapshot_updates: A snapshot is taken after so many updates of a model; None means not for that reason.
        snapshot_seconds: And after so many seconds in which something happened to it; None likewise.
        copy_to: An fsspec URL of a folder that each snapshot is copied to, as s3://bucket/path; None means none.
        accept_data_loss: Start also where a file in `data_dir` is corrupt, with what is good.
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
        if self.data_dir is not None and self.keeps == "none":
            raise ValueError("with durability none nothing is kept: leave out the data directory, or choose another")
        if self.data_dir is None:
            asked = {
                f"durability {self.durability}": self.keeps != "none",
                "snapshot_updates": self.snapshot_updates is not None,
                "copy_to": self.copy_to is not None,
                "accept_data_loss": self.accept_data_loss,
            }
            for name in (name for name, given in asked.items() if given):
                raise ValueError(f"{name}: there is no data directory; say where, as in --data-dir DIR")

    @property
    def keeps(self) -> DurabilityKind:
        """What `durability` comes to."""
        if self.durability is not None:
            return self.durability
        return "none" if self.data_dir is None else "snapshot"

    @property
    def shares_memory(self) -> bool:
        """What `shared_memory` comes to."""
        if self.shared_memory is not None:
            return self.shared_memory
        return self._unix or self.bind.startswith(_LOOPBACK)

    @property
    def _unix(self) -> bool:
        return self.bind.startswith("unix:") and len(self.bind) > len("unix:")


def usable_memory_bytes() -> int:
    """Returns 80 % of the memory that this process may use."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [machine, *map(_limit, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))]
    return min(limit for limit in limits if limit) * 4 // 5


def usable_threads() -> int:
    """Returns how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limit(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
