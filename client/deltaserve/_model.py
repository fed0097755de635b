"""A model on a server."""

import os
import re
import secrets
import socket
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.element_types import ELEMENT_TYPES, Array, ElementType, WireType, named
from deltaserve._common.flat_vector import FlatVector, contiguous
from deltaserve._common.optimizers import Optimizer
from deltaserve._common.policies import Policy, from_policy, to_policy
from deltaserve._connection import Connection
from deltaserve._conversion import (
    from_groups,
    from_tensors,
    to_groups,
    to_model_event,
    to_model_info,
    to_snapshot,
    to_tensors,
)
from deltaserve._transport.protocol import TransportName, check_transport
from deltaserve._types import ModelEvent, ModelInfo, ModelState, SnapshotInfo, TensorSpec
from deltaserve._worker import Worker
from deltaserve.v1 import model_service_pb2


class Model:
    """A model on a server. Made by `Client.create_model` and `Client.model`.

    Attributes:
        name: The model's name.
        tensors: The layout.
        groups: The optimizer by parameter group: of one kind, each with its hyperparameters.
        policy: When a push becomes an update.
        created: Whether `Client.create_model` created it, and did not join an existing one.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        tensors: tuple[TensorSpec, ...],
        groups: tuple[Optimizer, ...],
        policy: Policy,
        created: bool,
    ) -> None:
        self._connection = connection
        self.name = name
        self.tensors = tensors
        self.groups = groups
        self.policy = policy
        self.created = created

    def info(self) -> ModelInfo:
        """Returns the model's present version, sessions and layout."""
        return to_model_info(self._connection.call("GetModel", model_service_pb2.GetModelRequest(model=self.name)))

    def worker(
        self,
        name: str | None = None,
        *,
        lease_seconds: float | None = None,
        transport: TransportName = "auto",
        wire: WireType = "float32",
    ) -> Worker:
        """Opens a session and returns the worker. An older session of the same name ends.

        Args:
            name: The worker's name, in the charset of model names, unique among the workers. None generates one.
            lease_seconds: How long the session outlives the worker's last call; None means the server's default.
            transport: "auto" uses shared memory if the server runs on this host as the same user and allows it,
                "stream" never does, "shared" raises an error if shared memory cannot be used.
            wire: The type of elements in messages, in both directions: "float32", "bfloat16" or "float16". Weights and
                state are float32 on the server in any case, and in shared memory.

        Raises:
            ValueError: There is no transport or type of this name.
            RequestError: The name or the lease is not allowed, the model is gone, or the server refuses shared memory
                under transport="shared".
            OSError: Shared memory cannot be opened under transport="shared".
            UnavailableError: The server has reached its limit of sessions.
        """
        check_transport(transport)
        return self._worker(name, lease_seconds, transport, named(wire, ELEMENT_TYPES))

    def _worker(
        self, name: str | None, lease_seconds: float | None, transport: TransportName, wire: ElementType
    ) -> Worker:
        name = name or worker_name()
        groups = len(self.groups)
        return Worker(self._connection, self.name, name, lease_seconds, self.tensors, groups, transport, wire)

    def pull_state(self, optimizer_state: bool = True) -> ModelState:
        """Returns the model's weights and state, all of one version.

        Args:
            optimizer_state: Whether to include `slots`.
        """
        request = model_service_pb2.PullStateRequest(model=self.name, optimizer_state=optimizer_state)

        def start(attempt: int, seconds: float) -> Any:
            return self._connection.stub("PullState")(request.SerializeToString(), timeout=seconds)

        return self._connection.receive("PullState", start, partial(_take_state, optimizer_state=optimizer_state))

    def put_state(self, state: ModelState) -> None:
        """Replaces the model's weights and state, for all its workers. This makes a new version.

        Args:
            state: A state as from `pull_state`. Without `slots`, the optimizer state becomes that before the first
                update, and its `update_counts` do not count.

        Raises:
            TypeError: A part of the state is not a mapping, or a tensor does not consist of real numbers.
            ValueError: A slot, a tensor or an update count is missing or unknown, or a tensor has another shape.
            RequestError: A value is not finite, or an average or a sum of squares is negative.
            UnavailableError: The state may be in place; `info().version` tells. It is not sent again, because workers
                may have gone on from it.
        """
        slots = [slot.name for slot in self.groups[0].slots]
        if state.slots is not None and state.slots.keys() != set(slots):
            raise ValueError(f"slots: expected {', '.join(slots) or 'none'}, got {', '.join(state.slots) or 'none'}")
        vectors = [self._arrays(state.weights, "weights"), *self._slots(state.slots)]
        counts: list[int] = []
        if state.slots is not None:  # counts that are 0 by mistake would let Adam begin anew with an old state
            self._check_names(state.update_counts, "update_counts")
            counts = [state.update_counts[spec.name] for spec in self.tensors]
        header = model_service_pb2.PutStateHeader(model=self.name, update_counts=counts, slots=slots)
        kind = model_service_pb2.PutStateRequest
        self._connection.send("PutState", lambda: vector_messages(kind, header, vectors), repeats_uncertain=False)

    def update(self, *, groups: Sequence[Optimizer] | None = None, policy: Policy | None = None) -> int:
        """Changes the hyperparameters, the policy or both, for all workers, from the next update on.

        Pushes that carry their own hyperparameters, such as those of `RemoteAdadelta`, still use those.

        Args:
            groups: The model's optimizer with new hyperparameters, for every parameter group; None changes none.
            policy: The new policy; None keeps the present one.

        Returns:
            The first version made with the change. It is the version after the next if pushes of the open round are
            already reduced in a way that the new policy does not use.

        Raises:
            RequestError: A setting is out of range.
            ConflictError: `groups` has another optimizer than the model, or differs in what a model fixes.
        """
        request = model_service_pb2.UpdateModelRequest(
            model=self.name,
            groups=from_groups(groups or ()),
            policy=None if policy is None else from_policy(policy),
        )
        answer = self._connection.call("UpdateModel", request)
        self.groups, self.policy = to_groups(answer.config.groups), to_policy(answer.config.policy)
        return int(answer.first_version)

    def watch(self) -> Generator[ModelEvent, None, None]:
        """Yields the present version, then an event for every new version, until the loop ends.

        A slow reader misses events and learns how many. A broken connection is opened again.

        Raises:
            RequestError: The model is gone.
            UnavailableError: The server did not answer within the timeout, or has reached its limit of watchers.
        """
        request = model_service_pb2.WatchModelRequest(model=self.name)
        last = -1
        for message in self._connection.stream("WatchModel", request):
            event = to_model_event(message)
            if event.version == last:  # the connection was opened again, and nothing has happened meanwhile
                continue
            if 0 <= last < event.version:
                event = replace(event, missed=event.version - last - 1)
            last = event.version
            yield event

    def extend(
        self,
        tensors: Mapping[str, ArrayLike],
        *,
        groups: Sequence[Optimizer] = (),
        group_of: Mapping[str, int] | None = None,
    ) -> bool:
        """Adds tensors at the end of the layout. Open workers go on without them.

        Args:
            tensors: Initial weights by tensor name, converted to float32.
            groups: Parameter groups to add, with the model's optimizer.
            group_of: Index of a tensor's group among all groups, by tensor name; 0 for tensors that it leaves out.

        Returns:
            False if the model already had exactly these tensors.

        Raises:
            ValueError: `group_of` names a tensor that `tensors` lacks.
            ConflictError: The layout has changed in another way, or a group has another optimizer.
            RequestError: A name or a shape is not allowed.
        """
        arrays = {key: contiguous(value) for key, value in tensors.items()}
        specs = tensor_specs(arrays, group_of)
        header = model_service_pb2.ExtendModelHeader(
            model=self.name,
            tensor_count=len(self.tensors),
            group_count=len(self.groups),
            tensors=from_tensors(specs),
            groups=from_groups(groups),
        )
        kind, start = model_service_pb2.ExtendModelRequest, sum(prod(spec.shape) for spec in self.tensors)
        weights = [list(arrays.values())]
        answer = self._connection.send("ExtendModel", lambda: vector_messages(kind, header, weights, start))
        extended, all_groups = bool(answer.extended), self.groups + tuple(groups)
        # No call from here on, so no interrupt comes between: `RemoteAdadelta` takes a group back if this call fails.
        self.tensors, self.groups = self.tensors + specs, all_groups
        return extended

    def save_snapshot(self) -> SnapshotInfo:
        """Takes a snapshot of the model; returns when it is durable on the server's disk.

        Raises:
            RequestError: The server has no data directory.
            UnavailableError: The snapshot cannot be written.
        """
        request = model_service_pb2.SaveSnapshotRequest(model=self.name)
        return to_snapshot(self._connection.call("SaveSnapshot", request).snapshot)

    def snapshots(self) -> list[SnapshotInfo]:
        """Returns the snapshots that the server keeps, oldest first.

        Raises:
            RequestError: The server has no data directory.
        """
        request = model_service_pb2.ListSnapshotsRequest(model=self.name)
        return [to_snapshot(snapshot) for snapshot in self._connection.call("ListSnapshots", request).snapshots]

    def delete(self) -> None:
        """Deletes the model; its workers' next calls fail."""
        self._connection.call("DeleteModel", model_service_pb2.DeleteModelRequest(model=self.name))

    def _slots(self, slots: Mapping[str, Mapping[str, Array]] | None) -> Iterator[list[Array]]:
        """Yields each vector of optimizer state; None means the state before the first update."""
        for index, slot in enumerate(self.groups[0].slots):
            if slots is not None:
                yield self._arrays(slots[slot.name], slot.name)
            else:
                initial = [self.groups[spec.group].slots[index].initial for spec in self.tensors]
                yield [_filled(spec.shape, value) for spec, value in zip(self.tensors, initial, strict=True)]

    def _arrays(self, values: Mapping[str, Array], what: str) -> list[Array]:
        self._check_names(values, what)
        arrays = []
        for spec in self.tensors:
            try:
                arrays.append(contiguous(values[spec.name]))
            except TypeError as error:
                raise TypeError(f"{what}: tensor {spec.name}: {error}") from None
            if arrays[-1].shape != spec.shape:
                raise ValueError(f"{what}: tensor {spec.name} has shape {arrays[-1].shape}, not {spec.shape}")
        return arrays

    def _check_names(self, values: Mapping[str, Any], what: str) -> None:
        """Raises TypeError or ValueError unless `values` has an entry for each tensor, and no other."""
        if not isinstance(values, Mapping):
            raise TypeError(f"{what}: expected a mapping by tensor name, got {values!r}")
        names = {spec.name for spec in self.tensors}
        if unknown := values.keys() - names:
            raise ValueError(f"{what}: the model has no tensor named {min(unknown)}")
        if missing := names - values.keys():
            raise ValueError(f"{what}: tensor {min(missing)} is missing")


def _filled(shape: tuple[int, ...], value: float) -> Array:
    array = np.zeros(shape, np.float32)
    if value:  # zeros are not written, so that they take no memory
        array.fill(value)
    return array


def tensor_specs(arrays: Mapping[str, Array], group_of: Mapping[str, int] | None) -> tuple[TensorSpec, ...]:
    """Returns the layout of tensors, each in the group that `group_of` names, or in group 0.

    Raises:
        ValueError: `group_of` names a tensor that `arrays` lacks.
    """
    groups = group_of or {}
    unknown = groups.keys() - arrays.keys()
    if unknown:
        raise ValueError(f"group_of: there is no tensor named {min(unknown)}")
    return tuple(TensorSpec(name, array.shape, groups.get(name, 0)) for name, array in arrays.items())


def worker_name() -> str:
    """Returns a unique worker name: host, process id and random digits."""
    # A name has 128 characters at most, of this charset, and begins with a letter or a digit.
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip("._-") or "worker"
    # A process may have several workers, and its id may come again.
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


def vector_messages(
    kind: type[Message], header: Message, vectors: Iterable[Sequence[Array]], start: int = 0
) -> Iterator[bytes]:
    """Yields the header of a stream, then its vectors end to end, in chunks whose offsets count from `start`."""
    codec, name = StreamCodec(kind), kind.DESCRIPTOR.fields_by_number[2].name
    yield codec.header(header)
    for arrays in vectors:
        vector = FlatVector(arrays)
        for offset, parts in vector.chunks():
            yield codec.chunk(name, start + offset, parts)
        start += vector.size


def _take_state(
    header: model_service_pb2.PullStateHeader, chunks: Iterable[Chunk], *, optimizer_state: bool
) -> ModelState:
    specs = to_tensors(header.config)
    weights, *slots = ({spec.name: np.empty(spec.shape, np.float32) for spec in specs} for _ in ("", *header.slots))
    vectors = FlatVector([array for vector in (weights, *slots) for array in vector.values()])
    for chunk in chunks:
        vectors.write(chunk.offset, chunk.data)
    return ModelState(
        version=header.position.version,
        weights=weights,
        slots=dict(zip(header.slots, slots, strict=True)) if optimizer_state else None,
        update_counts=dict(zip((spec.name for spec in specs), header.update_counts, strict=True)),
    )
