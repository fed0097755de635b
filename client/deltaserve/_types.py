"""The public values: what a caller gives and gets. No protobuf type among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from deltaserve._common.element_types import Array
from deltaserve.v1 import common_pb2, model_service_pb2, system_service_pb2, worker_service_pb2


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

    def _to_proto(self) -> common_pb2.Hyperparameters:
        return common_pb2.Hyperparameters(
            lr=self.lr, rho=self.rho, eps=self.eps, weight_decay=self.weight_decay, maximize=self.maximize
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sync:
    """Workers wait for each other: a round closes, and makes an update, when every live one has pushed.

    Attributes:
        min_workers: A round needs at least this many pushes, >= 1.
        quorum: So many pushes are enough, once `grace_seconds` have passed; None means that all are awaited.
        grace_seconds: How long a round with a quorum still waits for the rest.
        round_timeout_seconds: How long a round lasts from its first push: then it closes with what it has, or fails
            below `min_workers`. None means without end.
        reduction: How the pushes become one gradient, element by element: "mean", weighted; "trimmed_mean", of which
            `trim` workers that push nonsense cannot move an element out of the others' range; "median".
        trim: Values that "trimmed_mean" leaves out at either end; `min_workers` is at least 2 * trim + 1.
        clip_norm: A push of a larger L2 norm is scaled down to this one; None means that none is.
    """

    min_workers: int = 1
    quorum: int | None = None
    grace_seconds: float = 0.0
    round_timeout_seconds: float | None = None
    reduction: Literal["mean", "trimmed_mean", "median"] = "mean"
    trim: int = 0
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Async:
    """Workers never wait: every push is an update at once.

    Attributes:
        max_staleness: A push computed on weights more versions old is refused; None means that none is.
        damping: Divide lr by 1 + the push's staleness (Zhang et al., 2016, arXiv:1511.05950).
    """

    max_staleness: int | None = None
    damping: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded:
    """Every push is an update at once, but a worker that is too far ahead waits (Ho et al., 2013).

    Attributes:
        slack: How many steps it may be ahead of the slowest live worker, >= 0.
    """

    slack: int = 0


Policy = Sync | Async | Bounded


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


def to_policy(message: common_pb2.Policy) -> Policy:
    """Returns the policy of a message."""
    which = message.WhichOneof("policy")
    given = {field.name: value for field, value in getattr(message, which).ListFields()} if which else {}
    if which == "sync":
        return Sync(**(given | {"reduction": _reduction(given["reduction"])}))
    return Bounded(**given) if which == "bounded" else Async(**given)


def from_policy(policy: Policy) -> common_pb2.Policy:
    """Returns the message of a policy.

    Raises:
        TypeError: It is none.
        ValueError: A setting is one that no message can hold.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: expected Sync(...), Async(...) or Bounded(...), got {policy!r}")
    message = common_pb2.Policy()
    part = getattr(message, type(policy).__name__.lower())
    part.SetInParent()
    for field in fields(policy):
        value = getattr(policy, field.name)
        if field.name == "reduction":
            part.reduction = _reduction_number(value)
        elif value is not None and value != field.default:
            try:
                setattr(part, field.name, value)
            except ValueError:
                raise ValueError(f"{field.name}: expected a whole number of at least 0, got {value!r}") from None
    return message


def _reduction(number: "common_pb2.Reduction.ValueType") -> str:
    return common_pb2.Reduction.Name(number).removeprefix("REDUCTION_").lower()


def _reduction_number(name: str) -> int:
    if name not in ("mean", "trimmed_mean", "median"):
        raise ValueError(f"reduction: expected mean, trimmed_mean or median, got {name!r}")
    return common_pb2.Reduction.Value(f"REDUCTION_{name.upper()}")


def to_groups(messages: Sequence[common_pb2.Hyperparameters]) -> tuple[Hyperparameters, ...]:
    """Returns the hyperparameters of messages in which every field is set."""
    return tuple(
        Hyperparameters(lr=m.lr, rho=m.rho, eps=m.eps, weight_decay=m.weight_decay, maximize=m.maximize)
        for m in messages
    )


def from_tensors(specs: Sequence[TensorSpec]) -> list[common_pb2.TensorSpec]:
    """Returns the messages of a layout."""
    return [common_pb2.TensorSpec(name=spec.name, shape=spec.shape, group=spec.group) for spec in specs]


def to_tensors(config: common_pb2.ModelConfig) -> tuple[TensorSpec, ...]:
    """Returns a config's layout."""
    return tuple(TensorSpec(spec.name, tuple(spec.shape), spec.group) for spec in config.tensors)


def to_model_info(message: model_service_pb2.GetModelResponse) -> ModelInfo:
    """Returns what GetModel answered."""
    return ModelInfo(
        name=message.config.name,
        tensors=to_tensors(message.config),
        groups=to_groups(message.config.groups),
        policy=to_policy(message.config.policy),
        version=message.position.version,
        durable_version=durable_version(message.position),
        sessions=tuple(
            SessionInfo(
                worker=session.worker,
                epoch=session.epoch,
                rank=session.rank,
                last_sequence=session.last_sequence,
                lease_left_seconds=session.lease_left_seconds,
                waiting=session.waiting,
            )
            for session in message.sessions
        ),
    )


def to_model_summary(message: model_service_pb2.ModelSummary) -> ModelSummary:
    """Returns one line of what ListModels answered."""
    return ModelSummary(
        name=message.name,
        element_count=message.element_count,
        tensor_count=message.tensor_count,
        session_count=message.session_count,
        policy=to_policy(message.policy),
        version=message.position.version,
        durable_version=durable_version(message.position),
    )


def to_snapshot(message: model_service_pb2.Snapshot) -> SnapshotInfo:
    """Returns a snapshot's line."""
    return SnapshotInfo(number=message.number, version=message.version, bytes=message.bytes, taken_at=message.taken_at)


def to_step_result(message: worker_service_pb2.PushResult) -> StepResult:
    """Returns what became of a push."""
    return StepResult(
        version=message.version,
        duplicate=message.duplicate,
        staleness=message.staleness if message.HasField("staleness") else None,
        contributors=message.contributors if message.HasField("contributors") else None,
        gradient_norm=message.gradient_norm if message.HasField("gradient_norm") else None,
        update_norm=message.update_norm if message.HasField("update_norm") else None,
        hyperparameters=to_groups(message.hyperparameters),
    )


_STATES: Mapping[int, Literal["waiting", "applied"]] = {
    worker_service_pb2.PUSH_STATE_WAITING: "waiting",
    worker_service_pb2.PUSH_STATE_APPLIED: "applied",
}


def to_push_status(message: worker_service_pb2.GetPushResponse) -> PushStatus:
    """Returns what GetPush answered."""
    return PushStatus(
        state=_STATES.get(message.state, "not accepted"),
        final=message.final,
        result=to_step_result(message.result) if message.HasField("result") else None,
    )


_CONTRIBUTION = [field.name for field in fields(Contribution)]


def to_model_event(message: model_service_pb2.WatchModelResponse) -> ModelEvent:
    """Returns a message of WatchModel."""
    update = message.update
    return ModelEvent(
        version=message.position.version,
        contributions=tuple(
            Contribution(**{name: getattr(one, name) for name in _CONTRIBUTION}) for one in update.contributions
        ),
        hyperparameters=to_groups(update.hyperparameters),
        update_norm=update.update_norm if message.HasField("update") else None,
        missed=message.missed,
    )


def to_server_info(message: system_service_pb2.GetServerInfoResponse) -> ServerInfo:
    """Returns what GetServerInfo answered."""
    limits = message.limits
    return ServerInfo(
        version=message.version,
        incarnation=message.incarnation,
        device_kind=message.device.kind,
        device_name=message.device.name,
        threads=message.device.threads,
        limits=Limits(**{field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields}),
        durability=common_pb2.Durability.Name(message.durability).removeprefix("DURABILITY_").lower(),
        uptime_seconds=message.uptime_seconds,
    )


def durable_version(position: common_pb2.ModelPosition) -> int | None:
    """Returns a position's durable version."""
    return position.durable_version if position.HasField("durable_version") else None
