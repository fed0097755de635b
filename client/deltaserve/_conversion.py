"""Conversion between public values and protobuf messages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from deltaserve._common.optimizer_messages import from_message, to_message
from deltaserve._common.optimizers import OPTIMIZERS, Optimizer
from deltaserve._common.policies import to_policy
from deltaserve._errors import Error
from deltaserve._types import (
    Contribution,
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
from deltaserve._version import __version__
from deltaserve.v1 import common_pb2, model_service_pb2, optimizers_pb2, system_service_pb2, worker_service_pb2

T = TypeVar("T")

_STATES: Mapping[int, Literal["waiting", "applied"]] = {
    worker_service_pb2.PUSH_STATE_WAITING: "waiting",
    worker_service_pb2.PUSH_STATE_APPLIED: "applied",
}


def from_groups(groups: Iterable[Optimizer]) -> list[optimizers_pb2.Optimizer]:
    """Returns the messages of parameter groups.

    Raises:
        TypeError: A group is not an optimizer, or a hyperparameter is not a number.
    """
    return [to_message(group) for group in groups]


def to_groups(messages: Iterable[optimizers_pb2.Optimizer]) -> tuple[Optimizer, ...]:
    """Returns the parameter groups of messages whose fields are all set.

    Raises:
        Error: The server is newer than this client, and uses an optimizer that the client does not have.
    """
    return tuple(_to_group(message) for message in messages)


def _to_group(message: optimizers_pb2.Optimizer) -> Optimizer:
    optimizer = from_message(message)
    if optimizer is None:
        unknown = UnknownFieldSet(message)
        number = unknown[0].field_number if len(unknown) else "none"
        raise Error(
            f"deltaserve {__version__} does not know the model's optimizer, which a newer version does: expected "
            f"{', '.join(OPTIMIZERS)}, got field {number} of deltaserve.v1.Optimizer"
        )
    return optimizer


def from_tensors(specs: Sequence[TensorSpec]) -> list[common_pb2.TensorSpec]:
    """Returns the messages of a layout."""
    return [common_pb2.TensorSpec(name=spec.name, shape=spec.shape, group=spec.group) for spec in specs]


def to_tensors(config: common_pb2.ModelConfig) -> tuple[TensorSpec, ...]:
    """Returns the layout of a model's configuration."""
    return tuple(TensorSpec(spec.name, tuple(spec.shape), spec.group) for spec in config.tensors)


def to_model_info(message: model_service_pb2.GetModelResponse) -> ModelInfo:
    """Converts the response of GetModel."""
    return ModelInfo(
        name=message.config.name,
        tensors=to_tensors(message.config),
        groups=to_groups(message.config.groups),
        policy=to_policy(message.config.policy),
        version=message.position.version,
        durable_version=_optional(message.position, "durable_version"),
        sessions=tuple(_same_fields(SessionInfo, session) for session in message.sessions),
    )


def to_model_summary(message: model_service_pb2.ModelSummary) -> ModelSummary:
    """Returns one entry of the answer to ListModels."""
    return ModelSummary(
        name=message.name,
        element_count=message.element_count,
        tensor_count=message.tensor_count,
        session_count=message.session_count,
        optimizer=message.optimizer,
        policy=to_policy(message.policy),
        version=message.position.version,
        durable_version=_optional(message.position, "durable_version"),
    )


def to_snapshot(message: model_service_pb2.Snapshot) -> SnapshotInfo:
    """Converts a Snapshot message."""
    return _same_fields(SnapshotInfo, message)


def to_step_result(message: worker_service_pb2.PushResult) -> StepResult:
    """Returns the result of a push."""
    return StepResult(
        version=message.version,
        duplicate=message.duplicate,
        **{name: _optional(message, name) for name in ("staleness", "contributors", "gradient_norm", "update_norm")},
        hyperparameters=to_groups(message.hyperparameters),
    )


def to_push_status(message: worker_service_pb2.GetPushResponse) -> PushStatus:
    """Converts the response of GetPush."""
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
        contributions=tuple(_same_fields(Contribution, contribution) for contribution in update.contributions),
        hyperparameters=to_groups(update.hyperparameters),
        update_norm=update.update_norm if message.HasField("update") else None,  # an imported state makes a version too
        missed=message.missed,
    )


def to_server_info(message: system_service_pb2.GetServerInfoResponse) -> ServerInfo:
    """Converts the response of GetServerInfo."""
    return ServerInfo(
        version=message.version,
        incarnation=message.incarnation,
        device_kind=message.device.kind,
        device_name=message.device.name,
        threads=message.device.threads,
        limits=_same_fields(Limits, message.limits),
        durability=common_pb2.Durability.Name(message.durability).removeprefix("DURABILITY_").lower(),
        optimizers=tuple(message.optimizers),
        uptime_seconds=message.uptime_seconds,
    )


def _same_fields(kind: Callable[..., T], message: Message) -> T:
    """Converts a message whose fields have the names and types of the public value's."""
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def _optional(message: Message, field: str) -> Any:
    """Returns a field; None if it is not set."""
    return getattr(message, field) if message.HasField(field) else None
