"""The values of the public interface, free of protobuf types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deltaserve._common.element_types import Array
from deltaserve._common.optimizers import Optimizer
from deltaserve._common.policies import Policy


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model: its name, its shape, and the index of its parameter group."""

    name: str
    shape: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """A worker's session with a model.

    Attributes:
        worker: The worker's name.
        epoch: Counts the sessions of this worker name, from 1.
        rank: The lowest number that no other live session had when this one was opened.
        last_sequence: The number of its last accepted push; 0 before the first.
        lease_left_seconds: Time until the session ends without a call.
        waiting: Whether a push of it waits for its round or for slower workers.
    """

    worker: str
    epoch: int
    rank: int
    last_sequence: int
    lease_left_seconds: float
    waiting: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A description of a model, without its weights.

    Attributes:
        name: The model's name.
        tensors: The layout.
        groups: The optimizer by parameter group: of one kind, each with its hyperparameters.
        policy: When a push becomes an update.
        version: The number of its updates.
        durable_version: The newest version that survives the death of the server; None if none does.
        sessions: The live sessions by rank.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    groups: tuple[Optimizer, ...]
    policy: Policy
    version: int
    durable_version: int | None
    sessions: tuple[SessionInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """A model in one line of a list.

    Attributes:
        name: The model's name.
        element_count: The number of elements of all its tensors.
        tensor_count: The number of its tensors.
        session_count: The number of its live sessions.
        optimizer: The kind of its optimizer, such as "adadelta".
        policy: When a push becomes an update.
        version: The number of its updates.
        durable_version: The newest version that survives the death of the server; None if none does.
    """

    name: str
    element_count: int
    tensor_count: int
    session_count: int
    optimizer: str
    policy: Policy
    version: int
    durable_version: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """A model's weights and optimizer state, all of one version.

    Attributes:
        version: The version.
        weights: The parameters by tensor name, float32.
        slots: The optimizer state by the name that torch has for it and by tensor name, float32, such as
            `slots["square_avg"]["w"]`. From `pull_state`, None means that it was not requested; for `put_state`, the
            state before the first update.
        update_counts: The number of updates of a tensor's state, which torch calls `step`, by tensor name.
    """

    version: int
    weights: Mapping[str, Array]
    slots: Mapping[str, Mapping[str, Array]] | None
    update_counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotInfo:
    """A snapshot of a model on the server's disk.

    Attributes:
        number: Counts the model's snapshots, from 1.
        version: The model's version in it.
        bytes: The size of its files.
        taken_at: When it was taken, in seconds since 1970-01-01 00:00 UTC.
    """

    number: int
    version: int
    bytes: int
    taken_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of a push.

    Attributes:
        version: The version that its update made.
        duplicate: Whether an earlier attempt at this push had been applied; this is its result.
        staleness: Versions between the weights that the gradient was computed on and the update; None if the server no
            longer knows.
        contributors: The number of pushes in the update; None if the server no longer knows.
        gradient_norm: The L2 norm of the push's gradient before clipping; None if the server no longer knows.
        update_norm: The L2 norm of the change of the weights; None if the server no longer knows.
        hyperparameters: The optimizer of the update by group; lr after damping.
    """

    version: int
    duplicate: bool
    staleness: int | None
    contributors: int | None
    gradient_norm: float | None
    update_norm: float | None
    hyperparameters: tuple[Optimizer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PushStatus:
    """The state of a push.

    Attributes:
        state: "waiting" means for its round; "not accepted" includes a push that has not arrived yet.
        final: Whether the state cannot change any more.
        result: The result of a push that was applied; else None.
    """

    state: Literal["not accepted", "waiting", "applied"]
    final: bool
    result: StepResult | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """A push in an update.

    Attributes:
        worker: The worker's name.
        epoch: The epoch of the worker's session.
        sequence: The push's number in the session.
        staleness: Versions between the weights that the gradient was computed on and the update.
        weight: The push's weight in the mean of its round.
        gradient_norm: The L2 norm of its gradient before clipping.
    """

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
        contributions: The pushes of its update, by worker name. Empty if no update made the version, and in the first
            event of a connection.
        hyperparameters: The optimizer of the update by group; lr after damping. Empty if `contributions` is.
        update_norm: The L2 norm of the change of the weights; None if `contributions` is empty.
        missed: The number of events before this one that were dropped because the reader was too slow.
    """

    version: int
    contributions: tuple[Contribution, ...]
    hyperparameters: tuple[Optimizer, ...]
    update_norm: float | None
    missed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a server.

    Attributes:
        message_bytes: The largest message.
        models: The largest number of models.
        sessions: The largest number of sessions of all models.
        memory_bytes: The memory budget.
        memory_available_bytes: What is left of the memory budget.
        staged_bytes: The largest total of pushes that are arriving.
        lease_seconds_min: The shortest lease.
        lease_seconds_max: The longest lease.
        lease_seconds_default: The lease of a session that asks for none.
        watchers: The largest number of `Model.watch` loops.
    """

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
        version: The version of deltaserve.
        incarnation: 32 hexadecimal digits, different for each start of the server.
        device_kind: "cpu" or "cuda".
        device_name: The device's name.
        threads: The number of threads of an update; 0 on a GPU.
        limits: The limits of the server.
        durability: What survives the server's death: "none", "snapshot", "journal" or "fsync".
        optimizers: The kinds of optimizers that it has.
        uptime_seconds: Time since it began to serve.
    """

    version: str
    incarnation: str
    device_kind: str
    device_name: str
    threads: int
    limits: Limits
    durability: str
    optimizers: tuple[str, ...]
    uptime_seconds: float
