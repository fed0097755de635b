"""The public values: what a caller gives and gets. No protobuf type among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaserve.v1 import common_pb2, model_service_pb2, system_service_pb2, worker_service_pb2

Array = NDArray[np.float32]


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
    """Workers wait for each other: a round closes when every live one has pushed; the update takes the mean.

    Attributes:
        min_workers: A round needs at least this many pushes, >= 1.
    """

    min_workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Async:
    """Workers never wait: every push is an update at once."""


Policy = Sync | Async


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
class StepResult:
    """What became of a push.

    Attributes:
        version: The version that its update made.
        duplicate: An earlier attempt at this push had been applied already; this is its result.
        staleness: How many versions the weights had moved on between push and update; None when no longer known.
        contributors: How many pushes made the update; None when no longer known.
        hyperparameters: What the update used, by group.
    """

    version: int
    duplicate: bool
    staleness: int | None
    contributors: int | None
    hyperparameters: tuple[Hyperparameters, ...]


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
        uptime_seconds: Since it began to serve.
    """

    version: str
    incarnation: str
    device_kind: str
    device_name: str
    threads: int
    limits: Limits
    uptime_seconds: float


def to_policy(message: common_pb2.Policy) -> Policy:
    """Returns the policy of a message."""
    if message.WhichOneof("policy") == "sync":
        return Sync(min_workers=message.sync.min_workers)
    return Async()


def from_policy(policy: Policy) -> common_pb2.Policy:
    """Returns the message of a policy.

    Raises:
        TypeError: It is none.
    """
    if isinstance(policy, Sync):
        return common_pb2.Policy(sync=common_pb2.SyncPolicy(min_workers=policy.min_workers))
    if not isinstance(policy, Async):
        raise TypeError(f"policy: expected Sync(...) or Async(), got {policy!r}")
    message = common_pb2.Policy()
    getattr(message, "async").SetInParent()  # a keyword of Python
    return message


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


def to_step_result(message: worker_service_pb2.PushResult) -> StepResult:
    """Returns what became of a push."""
    return StepResult(
        version=message.version,
        duplicate=message.duplicate,
        staleness=message.staleness if message.HasField("staleness") else None,
        contributors=message.contributors if message.HasField("contributors") else None,
        hyperparameters=to_groups(message.hyperparameters),
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
        uptime_seconds=message.uptime_seconds,
    )


def durable_version(position: common_pb2.ModelPosition) -> int | None:
    """Returns a position's durable version."""
    return position.durable_version if position.HasField("durable_version") else None
