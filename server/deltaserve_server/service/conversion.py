"""Converts between protobuf messages and the values of model and engine. Checks whatever comes from the wire."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from math import isfinite, prod
from typing import Any

from google.protobuf.message import Message

from deltaserve._common.optimizers import Adadelta
from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2, worker_service_pb2
from deltaserve_server.durability.folder import Head
from deltaserve_server.engine.events import Position, Updated
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.model import (
    Async,
    Bounded,
    Layout,
    Machine,
    Policy,
    PushResult,
    Reduction,
    Refused,
    Sync,
    Tensor,
    first_difference,
)
from deltaserve_server.service import optimizers

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_NAME_ALLOWED = "1 to 128 characters of A-Z a-z 0-9 . _ -, the first a letter or a digit"
_TENSOR_NAME_LENGTH = 256
_SHOWN_LENGTH = 40
"""How many characters of a tensor's name a text shows."""

_ENCODED_EVENTS = 64
"""How many encoded events are kept for the other watchers of their model."""

_DIMENSIONS = 8
_ELEMENTS = 1 << 48
_WORKERS = 65_536
_SECONDS = 86_400

_REDUCTIONS: dict[int, Reduction] = {
    pb.REDUCTION_UNSPECIFIED: "mean",
    pb.REDUCTION_MEAN: "mean",
    pb.REDUCTION_TRIMMED_MEAN: "trimmed_mean",
    pb.REDUCTION_MEDIAN: "median",
}


def checked_name(field: str, name: str) -> str:
    """Returns the name of a model or a worker; raises Refused NAME_INVALID."""
    if not _NAME.fullmatch(name):
        raise Refused("NAME_INVALID", field=field, allowed=_NAME_ALLOWED)
    return name


def to_tensors(
    specs: Sequence[pb.TensorSpec], group_count: int, names: Iterable[str] = (), size: int = 0
) -> tuple[Tensor, ...]:
    """Returns the tensors of a layout, or of its extension.

    Args:
        specs: The tensors' messages.
        group_count: Number of parameter groups.
        names: Names of the tensors that precede these.
        size: Number of elements that precede these.

    Raises:
        Refused: NAME_INVALID, SHAPE_INVALID, DTYPE_UNSUPPORTED or HYPERPARAMETER_INVALID.
    """
    taken = set(names)
    tensors = []
    for spec in specs:
        tensors.append(_tensor(spec, group_count))
        size += tensors[-1].size
        if spec.name in taken:  # clients address tensors by name
            raise Refused("NAME_INVALID", field="tensors.name", allowed="no name twice")
        if size > _ELEMENTS:  # in the loop, before a further tensor is looked at
            raise _shape_refused(spec, f"at most {_ELEMENTS} elements in all")
        taken.add(spec.name)
    if not size:
        raise Refused("SHAPE_INVALID", tensor="(all)", shape="(none)", allowed="at least one element in all")
    return tuple(tensors)


def _tensor(spec: pb.TensorSpec, group_count: int) -> Tensor:
    if not 1 <= len(spec.name) <= _TENSOR_NAME_LENGTH or not spec.name.isprintable():
        allowed = f"1 to {_TENSOR_NAME_LENGTH} printable characters"
        raise Refused("NAME_INVALID", field="tensors.name", allowed=allowed)
    if len(spec.shape) > _DIMENSIONS:
        raise _shape_refused(spec, f"at most {_DIMENSIONS} dimensions")
    # Before the product, whose sign two negative lengths would hide.
    if any(length < 0 for length in spec.shape):
        raise _shape_refused(spec, "no negative dimension")
    # A zero among the dimensions must not hide that the others are beyond what a client can allocate.
    if prod(filter(None, spec.shape)) > _ELEMENTS:
        raise _shape_refused(spec, f"at most {_ELEMENTS} elements in all")
    if spec.data_type not in (pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_FLOAT32):
        raise Refused("DTYPE_UNSUPPORTED", tensor=spec.name, got=spec.data_type, allowed="DATA_TYPE_FLOAT32")
    if spec.group >= group_count:
        raise Refused("HYPERPARAMETER_INVALID", field="tensors.group", allowed=f"an index of {group_count} groups")
    return Tensor(spec.name, tuple(spec.shape), spec.group)


def _shape_refused(spec: pb.TensorSpec, allowed: str) -> Refused:
    shape = "x".join(map(str, spec.shape[: _DIMENSIONS + 1]))
    return Refused("SHAPE_INVALID", tensor=spec.name[:_TENSOR_NAME_LENGTH], shape=shape, allowed=allowed)


def to_policy(message: pb.Policy) -> Policy:
    """Returns the policy; raises Refused POLICY_INVALID."""
    match message.WhichOneof("policy"):
        case "sync":
            return _to_sync(message.sync)
        case "async":
            return Async(**_set_fields(getattr(message, "async")))  # `async` is a keyword of Python
        case "bounded":
            return Bounded(slack=message.bounded.slack)
        case _:
            raise Refused("POLICY_INVALID", field="policy", allowed="one of sync, async, bounded")


def _to_sync(message: pb.SyncPolicy) -> Sync:
    reduction = _REDUCTIONS.get(message.reduction)
    # An unknown reduction is reported below, by its own row.
    policy = Sync(**(_set_fields(message) | {"reduction": reduction or "mean"}))
    # One table, in the order in which errors are reported.
    trimmed = policy.reduction == "trimmed_mean"
    for field, fits, allowed in (
        ("min_workers", 1 <= policy.min_workers <= _WORKERS, f"1 to {_WORKERS}"),
        (
            "quorum",
            policy.quorum is None or policy.min_workers <= policy.quorum <= _WORKERS,
            f"min_workers ({policy.min_workers}) to {_WORKERS}",
        ),
        ("grace_seconds", 0 <= policy.grace_seconds <= _SECONDS, f"0 to {_SECONDS}"),
        ("grace_seconds", policy.quorum is not None or not policy.grace_seconds, "0 where there is no quorum"),
        ("round_timeout_seconds", _positive(policy.round_timeout_seconds, _SECONDS), f"> 0, up to {_SECONDS}"),
        ("reduction", reduction is not None, "REDUCTION_MEAN, REDUCTION_TRIMMED_MEAN or REDUCTION_MEDIAN"),
        ("trim", trimmed or not policy.trim, "only with REDUCTION_TRIMMED_MEAN"),
        ("trim", not trimmed or policy.trim >= 1, "1 or more with REDUCTION_TRIMMED_MEAN"),
        ("trim", 2 * policy.trim < policy.min_workers, f"less than half of min_workers ({policy.min_workers})"),
        ("clip_norm", _positive(policy.clip_norm), "> 0 and finite"),
    ):
        if not fits:
            raise Refused("POLICY_INVALID", field=f"policy.sync.{field}", allowed=allowed)
    return policy


def _set_fields(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def _positive(value: float | None, most: float = float("inf")) -> bool:
    return value is None or (isfinite(value) and 0 < value <= most)


def to_machine(config: pb.ModelConfig) -> Machine:
    """Returns the state machine of a new model; raises Refused for the first fault of the config."""
    name = checked_name("name", config.name)
    groups = optimizers.to_groups(config.groups) or (Adadelta(),)
    optimizers.check_alike(groups)
    layout = Layout(to_tensors(config.tensors, len(groups)))
    policy = to_policy(config.policy) if config.HasField("policy") else Async()
    return Machine(name, layout, groups, policy)


def from_machine(machine: Machine, pending: bool = False) -> pb.ModelConfig:
    """Returns a model's config with all defaults filled in; `pending` means after the change that waits for a round."""
    groups, policy = machine.configuration() if pending else (machine.groups, machine.policy)
    return pb.ModelConfig(
        name=machine.name,
        tensors=[
            pb.TensorSpec(name=t.name, shape=t.shape, group=t.group, data_type=pb.DATA_TYPE_FLOAT32)
            for t in machine.layout.tensors
        ],
        groups=optimizers.from_groups(groups),
        policy=from_policy(policy),
    )


def from_policy(policy: Policy) -> pb.Policy:
    """Returns the message for a policy."""
    match policy:
        case Sync():
            # Without 0, which is UNSPECIFIED and reads as the mean too.
            numbers = {value: key for key, value in _REDUCTIONS.items() if key}
            given = {field.name: getattr(policy, field.name) for field in fields(policy)}
            return pb.Policy(sync=pb.SyncPolicy(**(given | {"reduction": numbers[policy.reduction]})))
        case Bounded():
            return pb.Policy(bounded=pb.BoundedPolicy(slack=policy.slack))
        case Async():
            message = pb.AsyncPolicy(max_staleness=policy.max_staleness, damping=policy.damping)
            keyword: dict[str, Any] = {"async": message}
            return pb.Policy(**keyword)


def from_position(position: Position) -> pb.ModelPosition:
    """Returns the message for a model's position."""
    incarnation, version, durable_version = position
    return pb.ModelPosition(incarnation=incarnation, version=version, durable_version=durable_version)


def from_ancestors(head: Head) -> list[worker_service_pb2.Ancestor]:
    """Returns the messages for the lineages before a model's present one."""
    return [worker_service_pb2.Ancestor(lineage=a.lineage, version=a.version, lossy=a.lossy) for a in head.ancestors]


def from_result(result: PushResult) -> worker_service_pb2.PushResult:
    """Returns the message for a push's result."""
    contribution, summary = result.contribution, result.summary
    if contribution is None or summary is None:  # a duplicate from beyond the window
        return worker_service_pb2.PushResult(version=result.version, duplicate=result.duplicate)
    return worker_service_pb2.PushResult(
        version=result.version,
        duplicate=result.duplicate,
        staleness=contribution.staleness,
        contributors=len(summary.contributions),
        hyperparameters=optimizers.from_groups(summary.hyperparameters),
        gradient_norm=contribution.norm,
        update_norm=summary.norm,
    )


def from_handle(handle: Handle) -> worker_service_pb2.SharedMemory:
    """Returns the message that tells a worker how to map shared memory."""
    return worker_service_pb2.SharedMemory(
        process_id=handle.process_id, file_descriptor=handle.descriptor, name=handle.name, bytes=handle.size_bytes
    )


def encode_event(event: Updated, missed: int) -> bytes:
    """Returns an encoded WatchModelResponse for a new version; the watcher has missed `missed` events before it."""
    encoded = _encode_event(event)
    # Concatenated encodings decode as one message with the fields of both.
    return model_service_pb2.WatchModelResponse(missed=missed).SerializeToString() + encoded if missed else encoded


@lru_cache(_ENCODED_EVENTS)
def _encode_event(event: Updated) -> bytes:
    """Encodes an event once for all watchers of its model."""
    position, summary, update = from_position(event.position), event.summary, None
    if summary:
        contributions = [
            model_service_pb2.Contribution(
                worker=contribution.worker,
                epoch=contribution.epoch,
                sequence=contribution.sequence,
                staleness=contribution.staleness,
                weight=contribution.weight,
                gradient_norm=contribution.norm,
            )
            for contribution in summary.contributions
        ]
        update = model_service_pb2.UpdateEvent(
            contributions=contributions,
            hyperparameters=optimizers.from_groups(summary.hyperparameters),
            update_norm=summary.norm,
        )
    return model_service_pb2.WatchModelResponse(position=position, update=update).SerializeToString()


def check_same(existing: Machine, wanted: Machine) -> None:
    """Raises Refused OPTIMIZER_MISMATCH or MODEL_MISMATCH unless a model is the one that CreateModel asks for.

    Hyperparameters and policy may be those of now, or those that the model was created with: another client may have
    changed them since.
    """
    optimizers.check_matches(existing.name, existing.groups[0], wanted.groups)
    found = _difference(existing, wanted)
    if found:
        raise Refused("MODEL_MISMATCH", model=existing.name, difference=found)


def _difference(existing: Machine, wanted: Machine) -> str | None:
    ours, theirs, count = existing.layout.tensors, wanted.layout.tensors, len(existing.groups)
    if (len(theirs), len(wanted.groups)) in existing.earlier_sizes:  # the model before an extension, which may follow
        ours, count = ours[: len(theirs)], len(wanted.groups)
    created_groups, created_policy = existing.initial_settings[0][:count], existing.initial_settings[1]
    groups = wanted.groups if wanted.groups == created_groups else existing.groups[:count]
    policy = wanted.policy if wanted.policy == created_policy else existing.policy
    for index, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            return f"tensor {index} is {_describe(left)}, not {_describe(right)}"
    if len(ours) != len(theirs):
        return f"it has {len(ours)} tensors, not {len(theirs)}"
    if len(groups) != len(wanted.groups):
        return f"it has {len(groups)} parameter groups, not {len(wanted.groups)}"
    for index, (left_group, right_group) in enumerate(zip(groups, wanted.groups, strict=True)):
        found = first_difference(left_group, right_group)
        if found:
            return f"{found[0]} of group {index} is {found[1]}, not {found[2]}"
    return _policy_difference(policy, wanted.policy)


def _policy_difference(ours: Policy, theirs: Policy) -> str | None:
    if type(ours) is not type(theirs):
        return f"its policy is {type(ours).__name__.lower()}, not {type(theirs).__name__.lower()}"
    found = first_difference(ours, theirs)
    return f"{found[0]} of its policy is {found[1]}, not {found[2]}" if found else None


def _describe(tensor: Tensor) -> str:
    name = tensor.name if len(tensor.name) <= _SHOWN_LENGTH else f"{tensor.name[:_SHOWN_LENGTH]}..."
    return f"{name} {list(tensor.shape)} in group {tensor.group}"
