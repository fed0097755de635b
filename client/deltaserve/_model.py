"""A model on a server: looked at, read whole, put back, extended; and the sessions of workers."""

import os
import re
import secrets
import socket
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.element_types import ELEMENT_TYPES, Array, ElementType, WireType, named
from deltaserve._common.flat_vector import FlatVector, contiguous
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
from deltaserve._types import Hyperparameters, ModelEvent, ModelInfo, ModelState, SnapshotInfo, TensorSpec
from deltaserve._worker import Worker
from deltaserve.v1 import model_service_pb2

_VECTORS = ("weights", "square_avg", "acc_delta")


class Model:
    """A model on a server. Made by `Client.create_model` and `Client.model`.

    Attributes:
        name: Its name.
        tensors: Its layout.
        groups: Its hyperparameters by parameter group.
        policy: When a push becomes an update.
        created: Whether this object created it.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        tensors: tuple[TensorSpec, ...],
        groups: tuple[Hyperparameters, ...],
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
        """Returns the model as it now is: version, sessions, layout."""
        return to_model_info(self._connection.call("GetModel", model_service_pb2.GetModelRequest(model=self.name)))

    def worker(
        self,
        name: str | None = None,
        *,
        lease_seconds: float | None = None,
        transport: TransportName = "auto",
        wire: WireType = "float32",
    ) -> Worker:
        """Opens a session and returns the worker; an older session of the same name ends.

        Args:
            name: The worker's name, in the charset of model names; one worker, one name. None makes one up.
            lease_seconds: How long the session outlives its last sign of life; None means the server's default.
            transport: "auto" has vectors go through shared memory where the server is on this host, runs as the same
                user and allows it; "stream" never; "shared" insists on it when
                the session is opened.
            wire: The type in which elements travel in messages, "float32", "bfloat16" or "float16", in both directions.
                Weights and state are float32 on the server all the same. Shared memory holds float32.

        Raises:
            ValueError: There is no such transport or type.
            RequestError: The name or the lease is not allowed, the model is gone, or the server shares no memory and is
                to.
            OSError: Its memory is to be shared, and cannot be opened.
            UnavailableError: The server has its number of sessions.
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
        """Returns the model's numbers, all of one version.

        Args:
            optimizer_state: Also `square_avg` and `acc_delta`.
        """
        request = model_service_pb2.PullStateRequest(model=self.name, optimizer_state=optimizer_state)

        def start(attempt: int, seconds: float) -> Any:
            return self._connection.stub("PullState")(request.SerializeToString(), timeout=seconds)

        return self._connection.receive("PullState", start, _take_state)

    def put_state(self, state: ModelState) -> None:
        """Puts numbers in place of the model's present ones, for all its workers; makes a new version.

        Args:
            state: As from `pull_state`; without optimizer state it becomes zero.

        Raises:
            ValueError: A tensor is missing, or has another shape.
            RequestError: A value is not finite, or a square negative.
            UnavailableError: It may be in place all the same, and is not put there again by itself: workers may have
                gone on from it. `info().version` tells.
        """
        vectors = {name: self._arrays(getattr(state, name), name) for name in _VECTORS}
        counts = [state.update_counts.get(spec.name, 0) for spec in self.tensors]
        header = model_service_pb2.PutStateHeader(model=self.name, update_counts=counts)
        codec = StreamCodec(model_service_pb2.PutStateRequest)
        self._connection.send("PutState", lambda: _messages(codec, header, vectors), repeats_uncertain=False)

    def update(self, *, groups: Sequence[Hyperparameters] | None = None, policy: Policy | None = None) -> int:
        """Changes the hyperparameters, the policy or both, for all workers, from the next update on.

        Pushes that carry hyperparameters of their own, as those of `RemoteAdadelta` do, go on using those.

        Args:
            groups: By parameter group, as many as there are; None means that they stay.
            policy: None means that it stays.

        Returns:
            The first version that is made with the change in place; that after the next where a part of the open round
            was reduced already in another way than the new policy would.

        Raises:
            RequestError: A setting is out of range.
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
        """Yields where the model stands, then an event for every version, as they come, until the loop is left.

        Who is slow misses events and is told how many. A connection that breaks is made again.

        Raises:
            RequestError: The model is gone.
            UnavailableError: The server was not reached within the timeout, or has its number of watchers.
        """
        request = model_service_pb2.WatchModelRequest(model=self.name)
        last = -1
        for message in self._connection.stream("WatchModel", request):
            event = to_model_event(message)
            if event.version == last:  # the connection was made again, and nothing happened meanwhile
                continue
            if 0 <= last < event.version:
                event = replace(event, missed=event.version - last - 1)
            last = event.version
            yield event

    def extend(
        self,
        tensors: Mapping[str, ArrayLike],
        *,
        groups: Sequence[Hyperparameters] = (),
        group_of: Mapping[str, int] | None = None,
    ) -> bool:
        """Adds tensors at the end of the layout; workers opened before go on without them.

        Args:
            tensors: Initial weights by name, converted to float32.
            groups: Parameter groups to add.
            group_of: By tensor name: the index of its group among all groups; 0 where there is none.

        Returns:
            False where the model already had exactly these.

        Raises:
            ValueError: `group_of` has a tensor that is not among them.
            ConflictError: The layout has changed in another way.
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
        answer = self._connection.send(
            "ExtendModel", lambda: weight_messages(kind, header, list(arrays.values()), start)
        )
        self.tensors += specs
        self.groups += tuple(groups)
        return bool(answer.extended)

    def save_snapshot(self) -> SnapshotInfo:
        """Takes a snapshot of the model as it is now; returns when it is safe on the server's disk.

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
        return [to_snapshot(one) for one in self._connection.call("ListSnapshots", request).snapshots]

    def delete(self) -> None:
        """Forgets the model; its workers' next calls fail."""
        self._connection.call("DeleteModel", model_service_pb2.DeleteModelRequest(model=self.name))

    def _arrays(self, values: Mapping[str, Array] | None, what: str) -> list[Array]:
        if values is None:
            return [np.zeros(spec.shape, np.float32) for spec in self.tensors]
        arrays = []
        for spec in self.tensors:
            if spec.name not in values:
                raise ValueError(f"{what}: tensor {spec.name} is missing")
            arrays.append(contiguous(values[spec.name]))
            if arrays[-1].shape != spec.shape:
                raise ValueError(f"{what}: tensor {spec.name} has shape {arrays[-1].shape}, not {spec.shape}")
        return arrays


def tensor_specs(arrays: Mapping[str, Array], group_of: Mapping[str, int] | None) -> tuple[TensorSpec, ...]:
    """Returns the layout of tensors, each in the group that `group_of` gives, or in group 0.

    Raises:
        ValueError: `group_of` has a tensor that is not among them.
    """
    groups = group_of or {}
    unknown = groups.keys() - arrays.keys()
    if unknown:
        raise ValueError(f"group_of: there is no tensor named {min(unknown)}")
    return tuple(TensorSpec(name, array.shape, groups.get(name, 0)) for name, array in arrays.items())


def worker_name() -> str:
    """Returns a name that no other worker has: host, process, and something random."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip("._-") or "worker"
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"


def weight_messages(kind: type[Message], header: Message, arrays: Sequence[Array], start: int = 0) -> Iterator[bytes]:
    """Yields a stream's header and the weights in chunks, their offsets counted from `start`."""
    codec = StreamCodec(kind)
    yield codec.header(header)
    for offset, parts in FlatVector(arrays).chunks():
        yield codec.chunk("weights", start + offset, parts)


def _messages(codec: StreamCodec[Any], header: Message, vectors: Mapping[str, Sequence[Array]]) -> Iterator[bytes]:
    yield codec.header(header)
    for name, arrays in vectors.items():
        for offset, parts in FlatVector(arrays).chunks():
            yield codec.chunk(name, offset, parts)


def _take_state(header: model_service_pb2.PullStateHeader, pieces: Iterable[Chunk]) -> ModelState:
    specs = to_tensors(header.config)
    vectors: dict[str, dict[str, Array]] = {}
    flat: dict[str, FlatVector] = {}
    for piece in pieces:
        if piece.vector not in vectors:
            vectors[piece.vector] = {spec.name: np.empty(spec.shape, np.float32) for spec in specs}
            flat[piece.vector] = FlatVector(list(vectors[piece.vector].values()))
        flat[piece.vector].write(piece.offset, piece.data)
    return ModelState(
        version=header.position.version,
        weights=vectors["weights"],
        square_avg=vectors.get("square_avg"),
        acc_delta=vectors.get("acc_delta"),
        update_counts=dict(zip((spec.name for spec in specs), header.update_counts, strict=True)),
    )
