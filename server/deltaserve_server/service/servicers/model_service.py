"""ModelService: creates, shows, changes, watches and deletes models, and moves their whole state."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import grpc

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2 as rpc
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.engine.catalog import ModelCatalog
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector
from deltaserve_server.model import Policy, Refused, Session, Sync
from deltaserve_server.service import admission, conversion, optimizers
from deltaserve_server.service.conversion import from_position

_UPDATES = (1 << 63) - 1
"""The largest update count of a state that is put: the updates that follow must fit into the field too."""

_PULL_STATE = StreamCodec(rpc.PullStateResponse)


class ModelServicer:
    """Serves ModelService."""

    def __init__(self, catalog: ModelCatalog) -> None:
        self._catalog = catalog

    def CreateModel(self, messages: Iterator[Any], _: grpc.ServicerContext) -> rpc.CreateModelResponse:
        machine = conversion.to_machine(_header(messages, pb.ModelConfig))
        # Also if the model exists: the answer to the same request must not depend on that.
        limit = self._catalog.config.message_bytes // 2
        if conversion.from_machine(machine).ByteSize() > limit:  # no answer could carry it
            allowed = f"a layout of at most {limit} bytes in a message"
            raise Refused("SHAPE_INVALID", tensor="(all)", shape="(all)", allowed=allowed)
        self._check_workers(machine.policy)
        engine, created = self._catalog.find(machine.name), False
        if engine is None:
            engine, created = self._catalog.add(machine, lambda: admission.admit_weights(messages, machine.layout))
        with engine.lock:
            if not created:
                conversion.check_same(engine.machine, machine)
            return rpc.CreateModelResponse(created=created, position=from_position(engine.position))

    def _check_workers(self, policy: Policy) -> None:
        """Raises Refused if the policy's rounds need more workers than there can be."""
        limit = self._catalog.config.sessions
        if isinstance(policy, Sync) and policy.min_workers > limit:
            allowed = f"1 to {limit}, the server's limit of sessions"
            raise Refused("POLICY_INVALID", field="policy.sync.min_workers", allowed=allowed)

    def ExtendModel(self, messages: Iterator[Any], _: grpc.ServicerContext) -> rpc.ExtendModelResponse:
        header = _header(messages, rpc.ExtendModelHeader)
        engine = self._catalog.get(header.model)
        extension = _Extension(engine, header)
        if extension.present():  # the usual case: every worker of a model extends it, and the first one wins
            with engine.lock:
                return rpc.ExtendModelResponse(extended=False, position=from_position(engine.position))
        layout = extension.machine.layout.extended(extension.tensors)
        start = extension.machine.layout.size
        with ExitStack() as undo:
            slot_count = len(extension.machine.slots)
            reservation = undo.enter_context(self._catalog.quotas.reserve_model(layout.size - start, slot_count))
            weights = admission.admit_weights(messages, layout, start)
            with engine.lock:
                extended = not extension.present()  # another caller may have been quicker
                if extended:
                    engine.extend(extension.tensors, extension.groups, weights, reservation)
                    undo.pop_all()  # the engine owns it even if leaving the lock fails on the journal
                return rpc.ExtendModelResponse(extended=extended, position=from_position(engine.position))

    def GetModel(self, request: rpc.GetModelRequest, _: grpc.ServicerContext) -> rpc.GetModelResponse:
        engine = self._catalog.get(request.model)
        now = self._catalog.clock.monotonic()
        with engine.lock:
            sessions = sorted(engine.machine.sessions.live(), key=lambda session: session.rank)
            return rpc.GetModelResponse(
                config=conversion.from_machine(engine.machine),
                position=from_position(engine.position),
                sessions=[_session(session, now) for session in sessions],
            )

    def ListModels(self, _request: rpc.ListModelsRequest, _: grpc.ServicerContext) -> rpc.ListModelsResponse:
        return rpc.ListModelsResponse(models=map(_summary, self._catalog.complete()))

    def UpdateModel(self, request: rpc.UpdateModelRequest, _: grpc.ServicerContext) -> rpc.UpdateModelResponse:
        engine = self._catalog.get(request.model)
        with engine.lock:
            # On top of a change that still waits for its round, so that two clients' changes add up.
            groups, policy = engine.machine.configuration()
            if request.groups:  # none means that they stay
                if len(request.groups) != len(groups):
                    raise Refused("HYPERPARAMETER_INVALID", field="groups", allowed=f"{len(groups)} groups")
                changed = optimizers.to_groups(request.groups, unset=groups)
                optimizers.check_matches(engine.machine.name, groups[0], changed)
                groups = changed
            if request.HasField("policy"):
                policy = conversion.to_policy(request.policy)
                self._check_workers(policy)
            first_version = engine.change(groups, policy)
            config = conversion.from_machine(engine.machine, pending=True)
            return rpc.UpdateModelResponse(
                first_version=first_version, config=config, position=from_position(engine.position)
            )

    def DeleteModel(self, request: rpc.DeleteModelRequest, _: grpc.ServicerContext) -> rpc.DeleteModelResponse:
        return rpc.DeleteModelResponse(position=from_position(self._catalog.delete(request.model).position))

    def PullState(self, request: rpc.PullStateRequest, _: grpc.ServicerContext) -> Iterator[bytes]:
        engine = self._catalog.get(request.model)
        with ExitStack() as resources:
            # The vectors do not change while they are sent: they are those of one version, or copies.
            with engine.lock:
                slots = engine.machine.slots if request.optimizer_state else ()
                header = rpc.PullStateHeader(
                    config=conversion.from_machine(engine.machine),
                    position=from_position(engine.position),
                    update_counts=engine.machine.update_counts,
                    slots=[slot.name for slot in slots],
                )
                vectors: Sequence[Vector]
                if slots:
                    size_bytes = engine.machine.layout.size * ELEMENT_BYTES * (1 + len(slots))
                    resources.enter_context(self._catalog.quotas.memory.reserve(size_bytes))
                    vectors = engine.state().vectors
                else:
                    vectors = [resources.enter_context(engine.reading())[1]]
            yield _PULL_STATE.header(header)
            for index, vector in enumerate(vectors):
                for offset, data in admission.chunks(vector, vector.size):
                    yield _PULL_STATE.chunk("state", index * vector.size + offset, data)

    def PutState(self, messages: Iterator[Any], _: grpc.ServicerContext) -> rpc.PutStateResponse:
        header = _header(messages, rpc.PutStateHeader)
        engine = self._catalog.get(header.model)
        layout = engine.machine.layout  # immutable; compared again below, after the vectors have arrived
        slots = engine.machine.slots
        optimizers.check_slots(header.slots, slots)
        counts = list(header.update_counts) or [0] * len(layout.tensors)
        vector_count = (1 + len(slots)) * (2 if engine.journals else 1)  # the journal writes a copy
        with self._catalog.quotas.staged.reserve(layout.size * ELEMENT_BYTES * vector_count):
            if len(counts) != len(layout.tensors) or max(counts) > _UPDATES:
                allowed = f"{len(layout.tensors)} numbers of at most {_UPDATES}"
                raise Refused("PUSH_INVALID", field="update_counts", allowed=allowed)
            state = admission.admit_state(messages, layout, slots)
            with engine.lock:
                if engine.machine.layout is not layout:
                    raise Refused("PUSH_INVALID", field="state", allowed="the layout as it now is: it was extended")
                engine.put_state(state, counts)
                return rpc.PutStateResponse(position=from_position(engine.position))

    def WatchModel(self, request: rpc.WatchModelRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        engine = self._catalog.get(request.model)
        with self._catalog.quotas.watcher(), engine.watched() as watcher:
            if context.add_callback(watcher.close):  # else the thread would wait for a caller who has gone
                for event, missed in watcher:
                    yield conversion.encode_event(event, missed)

    def SaveSnapshot(self, request: rpc.SaveSnapshotRequest, _: grpc.ServicerContext) -> rpc.SaveSnapshotResponse:
        engine = self._catalog.get(request.model)
        entry = self._catalog.save(engine)
        with engine.lock:
            return rpc.SaveSnapshotResponse(snapshot=_snapshot(entry), position=from_position(engine.position))

    def ListSnapshots(self, request: rpc.ListSnapshotsRequest, _: grpc.ServicerContext) -> rpc.ListSnapshotsResponse:
        engine = self._catalog.get(request.model)
        snapshots = map(_snapshot, self._catalog.entries(engine))
        with engine.lock:
            return rpc.ListSnapshotsResponse(snapshots=snapshots, position=from_position(engine.position))


class _Extension:
    """The tensors and groups that ExtendModel adds; raises Refused if they do not fit the model."""

    def __init__(self, engine: ModelEngine, header: rpc.ExtendModelHeader) -> None:
        self.machine = engine.machine
        self._lock = engine.lock
        self._tensor_count, self._group_count = header.tensor_count, header.group_count
        with self._lock:
            layout = self.machine.layout
            if self._tensor_count > len(layout.tensors) or self._group_count > len(self.machine.groups):
                raise self._mismatch()
            base = layout.tensors[: self._tensor_count]
            self.groups = optimizers.to_groups(header.groups, count=self._group_count)
            optimizers.check_matches(self.machine.name, self.machine.groups[0], self.groups)
            self.tensors = conversion.to_tensors(
                header.tensors,
                self._group_count + len(self.groups),
                [tensor.name for tensor in base],
                layout.offsets[self._tensor_count],
            )

    def present(self) -> bool:
        """Returns whether the model has these tensors and groups already; raises Refused if it has others."""
        with self._lock:
            tensors = self.machine.layout.tensors[self._tensor_count :]
            groups = self.machine.groups[self._group_count :]
        # The model may have more: the answer was lost, and others have extended it further since.
        if tensors[: len(self.tensors)] == self.tensors and groups[: len(self.groups)] == self.groups:
            return True
        if tensors or groups:
            raise self._mismatch()
        return False

    def _mismatch(self) -> Refused:
        tensors, groups = len(self.machine.layout.tensors), len(self.machine.groups)
        difference = f"it has {tensors} tensors in {groups} groups"
        return Refused("MODEL_MISMATCH", model=self.machine.name, difference=difference)


def _header(messages: Iterator[Any], kind: type[Any]) -> Any:
    """Returns a stream's first message; raises Refused MESSAGE_INVALID unless it is of this kind."""
    first = next(messages, None)
    if not isinstance(first, kind) or isinstance(first, Chunk):
        raise Refused("MESSAGE_INVALID", message=f"stream: it begins with {kind.DESCRIPTOR.name}")
    return first


def _session(session: Session, now: float) -> rpc.SessionInfo:
    return rpc.SessionInfo(
        worker=session.worker,
        epoch=session.epoch,
        rank=session.rank,
        last_sequence=session.last_accepted,
        lease_left_seconds=max(session.expires - now, 0.0),
        waiting=session.waiting,
    )


def _snapshot(entry: Entry) -> rpc.Snapshot:
    return rpc.Snapshot(number=entry.number, version=entry.version, bytes=entry.bytes, taken_at=entry.taken_at)


def _summary(engine: ModelEngine) -> rpc.ModelSummary:
    with engine.inspected() as position:
        machine = engine.machine
        return rpc.ModelSummary(
            name=machine.name,
            element_count=machine.layout.size,
            tensor_count=len(machine.layout.tensors),
            session_count=len(machine.sessions),
            policy=conversion.from_policy(machine.policy),
            position=from_position(position),
            optimizer=machine.groups[0].kind,
        )
