"""Conversion between public values and protobuf messages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Literal

from deltaserve._common.policies import to_policy
from deltaserve._types import (
    Contribution,
    Hyperparameters,
    Limits,
    ModelEvent,
    ModelInfo,
    ModelSummary,
    PushStatus,
    ServerInfo,
    SessionInfo,
    SnapshotInfo,
    StepResult,
    TensorSpec,
)
from deltaserve.v1 import common_pb2, model_service_pb2, system_service_pb2, worker_service_pb2

_CONTRIBUTION = [field.name for field in fields(Contribution)]

_STATES: Mapping[int, Literal["waiting", "applied"]] = {
    worker_service_pb2.PUSH_STATE_WAITING: "waiting",
    worker_service_pb2.PUSH_STATE_APPLIED: "applied",
}


def from_groups(groups: Iterable[Hyperparameters]) -> list[common_pb2.Hyperparameters]:
    """Returns the messages of hyperparameters."""
    return [
        common_pb2.Hyperparameters(lr=g.lr, rho=g.rho, eps=g.eps, weight_decay=g.weight_decay, maximize=g.maximize)
        for g in groups
    ]


def to_groups(messages: Sequence[common_pb2.Hyperparameters]) -> tuple[Hyperparameters, ...]:
    """Returns the hyperparameters of messages whose fields are all set."""
    return tuple(
        Hyperparameters(lr=m.lr, rho=m.rho, eps=m.eps, weight_decay=m.weight_decay, maximize=m.maximize)
        for m in messages
    )


def from_tensors(specs: Sequence[TensorSpec]) -> list[common_pb2.TensorSpec]:
    """Returns the messages of a layout."""
    return [common_pb2.TensorSpec(name=spec.name, shape=spec.shape, group=spec.group) for spec in specs]


def to_tensors(config: common_pb2.ModelConfig) -> tuple[TensorSpec, ...]:
    """Returns the layout of a model's configuration."""
    return tuple(TensorSpec(spec.name, tuple(spec.shape), spec.group) for spec in config.tensors)


def to_model_info(message: model_service_pb2.GetModelResponse) -> ModelInfo:
    """Returns the answer to GetModel."""
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
    """Returns one entry of the answer to ListModels."""
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
    """Returns the description of a snapshot."""
    return SnapshotInfo(number=message.number, version=message.version, bytes=message.bytes, taken_at=message.taken_at)


def to_step_result(message: worker_service_pb2.PushResult) -> StepResult:
    """Returns the result of a push."""
    return StepResult(
        version=message.version,
        duplicate=message.duplicate,
        staleness=message.staleness if message.HasField("staleness") else None,
        contributors=message.contributors if message.HasField("contributors") else None,
        gradient_norm=message.gradient_norm if message.HasField("gradient_norm") else None,
        update_norm=message.update_norm if message.HasField("update_norm") else None,
        hyperparameters=to_groups(message.hyperparameters),
    )


def to_push_status(message: worker_service_pb2.GetPushResponse) -> PushStatus:
    """Returns the answer to GetPush."""
    return PushStatus(
        state=_STATES.get(message.state, "not accepted"),
        final=message.final,
        result=to_step_result(message.result) if message.HasField("result") else None,
    )


def to_model_event(message: model_service_pb2.WatchModelResponse) -> ModelEvent:
    """Returns one event of WatchModel."""
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
    """Returns the answer to GetServerInfo."""
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
    """Returns the durable version; None if no version is durable."""
    return position.durable_version if position.HasField("durable_version") else None
