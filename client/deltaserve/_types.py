"""The values of the public interface, free of protobuf types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deltaserve._common.element_types import Array
from deltaserve._common.policies import Policy as Policy
from deltaserve._common.policies import from_policy as from_policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Adadelta's hyperparameters (Zeiler, 2012), with the names and defaults of `torch.optim.Adadelta`.

    Attributes:
        lr: Factor of the update, >= 0.
        rho: Decay of both leaky averages, in [0, 1].
        eps: Added to both averages before their square root, > 0.
        weight_decay: L2 penalty, >= 0.
        maximize: Ascend instead of descend.
    """

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    maximize: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model: its name, its shape, and the index of its parameter group."""

    name: str
    shape: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One worker's standing with a model, as in the proto's message of this name."""

    worker: str
    epoch: int
    rank: int
    last_sequence: int
    lease_left_seconds: float
    waiting: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A model without its numbers.

    Attributes:
        name: The model's name.
        tensors: Its layout.
        groups: Its hyperparameters by parameter group.
        policy: When a push becomes an update.
        version: How many updates it has had.
        durable_version: The newest version that would survive the death of the server; None if none would.
        sessions: Live sessions by rank.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    groups: tuple[Hyperparameters, ...]
    policy: Policy
    version: int
    durable_version: int | None
    sessions: tuple[SessionInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """A model in a line."""

    name: str
    element_count: int
    tensor_count: int
    session_count: int
    policy: Policy
    version: int
    durable_version: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """A model's numbers, all of one version.

    Attributes:
        version: The version.
        weights: Parameters by tensor name, float32.
        square_avg: The leaky average of squared gradients, likewise; None where it was not asked for.
        acc_delta: The leaky average of squared updates, likewise; None where it was not asked for.
        update_counts: By tensor name: how many updates its state has had, which torch calls `step`.
    """

    version: int
    weights: Mapping[str, Array]
    square_avg: Mapping[str, Array] | None
    acc_delta: Mapping[str, Array] | None
    update_counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotInfo:
    """A model's image on the server's disk.

    Attributes:
        number: Counts the model's snapshots.
        version: The version that it holds.
        bytes: Its size.
        taken_at: When, in seconds since 1970-01-01 00:00 UTC.
    """

    number: int
    version: int
    bytes: int
    taken_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What became of a push.

    Attributes:
        version: The version that its update made.
        duplicate: An earlier attempt at this push had been applied already; this is its result.
        staleness: How many versions the weights had moved on between push and update; None when no longer known.
        contributors: How many pushes made the update; None when no longer known.
        gradient_norm: L2 norm of the push's gradient, before any clipping; None when no longer known.
        update_norm: L2 norm of the change of the weights; None when no longer known.
        hyperparameters: What the update used, by group; lr after damping.
    """

    version: int
    duplicate: bool
    staleness: int | None
    contributors: int | None
    gradient_norm: float | None
    update_norm: float | None
    hyperparameters: tuple[Hyperparameters, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PushStatus:
    """Where a push stands.

    Attributes:
        state: "waiting" is for its round; "not accepted" also where it has not come yet.
        final: Whether that will not change any more.
        result: Of a push that was applied; else None.
    """

    state: Literal["not accepted", "waiting", "applied"]
    final: bool
    result: StepResult | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """One push in an update, as in the proto's message of this name."""

    worker: str
    epoch: int
    sequence: int
    staleness: int
    weight: float
    gradient_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEvent:
    """A version that a model has reached.

    Attributes:
        version: The version.
        contributions: The pushes of its update, by worker name; empty where no update made it, and in the first event
            after a connection was made.
        hyperparameters: What the update used, by group; lr after damping. Empty likewise.
        update_norm: L2 norm of the change of the weights; None likewise.
        missed: How many events before this one were left out, because they were not taken in time.
    """

    version: int
    contributions: tuple[Contribution, ...]
    hyperparameters: tuple[Hyperparameters, ...]
    update_norm: float | None
    missed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a server accepts, as in the proto's message of this name."""

    message_bytes: int
    models: int
    sessions: int
    memory_bytes: int
    memory_available_bytes: int
    staged_bytes: int
    lease_seconds_min: float
    lease_seconds_max: float
    lease_seconds_default: float
    watchers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """A server's version, device and limits.

    Attributes:
        version: Of deltaserve.
        incarnation: 32 hexadecimal digits, another for each start of the server.
        device_kind: "cpu" or "cuda".
        device_name: The device's own name.
        threads: Threads that an update runs on; 0 on a GPU.
        limits: What it accepts.
        durability: What survives its death: "none", "snapshot", "journal" or "fsync".
        uptime_seconds: Since it began to serve.
    """

    version: str
    incarnation: str
    device_kind: str
    device_name: str
    threads: int
    limits: Limits
    durability: str
    uptime_seconds: float
