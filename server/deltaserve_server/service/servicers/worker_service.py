"""WorkerService: sessions, steps and pulls."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import grpc

from deltaserve._common.codec import StreamCodec
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server.engine.catalog import ModelCatalog
from deltaserve_server.memory import shared_memory
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.model import PushResult, Refused
from deltaserve_server.service import admission, conversion
from deltaserve_server.service.element_types import element_type_of
from deltaserve_server.service.push_handler import PushHandler
from deltaserve_server.service.rpc import wait

_STEP = StreamCodec(rpc.StreamStepResponse)
_PULL = StreamCodec(rpc.PullResponse)

_SPARE_BYTES = 1 << 16
"""Room in a Step's messages for all but the vector."""

_LOCAL_PEERS = "ipv4:127.", "ipv6:%5B::1%5D", "unix:"
"""What gRPC's name of a caller on this host begins with."""

_STATES = {
    "not accepted": rpc.PUSH_STATE_NOT_ACCEPTED,
    "waiting": rpc.PUSH_STATE_WAITING,
    "applied": rpc.PUSH_STATE_APPLIED,
}


class WorkerServicer:
    """Serves WorkerService.

    Args:
        registry: The server's models.
    """

    def __init__(self, catalog: ModelCatalog) -> None:
        self._catalog = catalog

    def OpenSession(self, request: rpc.OpenSessionRequest, _: grpc.ServicerContext) -> rpc.OpenSessionResponse:
        """Gives a worker a standing with a model."""
        worker = conversion.checked_name("worker", request.worker)
        tensor_count = request.tensor_count if request.HasField("tensor_count") else None
        group_count = request.group_count if request.HasField("group_count") else None
        engine = self._catalog.get(request.model)
        head = engine.head
        if request.HasField("lineage") and not head.knows(request.lineage):
            raise Refused("LINEAGE_UNKNOWN", model=request.model)
        session = self._catalog.open_session(request.model, worker, self._lease(request), tensor_count, group_count)
        with engine.event():
            return rpc.OpenSessionResponse(
                session_id=session.id,
                epoch=session.epoch,
                rank=session.rank,
                lease_seconds=session.lease_seconds,
                first_version=session.first_version,
                tensor_count=session.tensor_count,
                position=engine.position,
                lineage=head.lineage,
                ancestors=[rpc.Ancestor(lineage=one.lineage, version=one.version) for one in head.ancestors],
            )

    def KeepSession(self, request: rpc.KeepSessionRequest, _: grpc.ServicerContext) -> rpc.KeepSessionResponse:
        """Renews a lease, and tells what was applied."""
        engine = self._catalog.get(request.model)
        with engine.event():
            session = engine.keep_session(request.session_id, request.epoch)
            return rpc.KeepSessionResponse(
                lease_seconds=session.lease_seconds,
                last_applied_sequence=session.last_applied,
                last_accepted_sequence=session.last_accepted,
                position=engine.position,
            )

    def CloseSession(self, request: rpc.CloseSessionRequest, _: grpc.ServicerContext) -> rpc.CloseSessionResponse:
        """Lets a worker leave."""
        engine = self._catalog.get(request.model)
        with engine.event():
            engine.close_session(request.session_id, request.epoch)
            return rpc.CloseSessionResponse(position=engine.position)

    def OpenSharedMemory(
        self, request: rpc.OpenSharedMemoryRequest, context: grpc.ServicerContext
    ) -> rpc.OpenSharedMemoryResponse:
        """Gives a session memory for its gradients."""
        local = context.peer().startswith(_LOCAL_PEERS)
        gradient = self._catalog.share(request.model, request.session_id, request.epoch, local)
        engine = self._catalog.get(request.model)
        with engine.event():
            return rpc.OpenSharedMemoryResponse(gradient=_memory(gradient), position=engine.position)

    def Step(self, request: rpc.StepRequest, context: grpc.ServicerContext) -> rpc.StepResponse:
        """Push and weights in one message each way."""
        if not request.HasField("header"):
            raise Refused("MESSAGE_INVALID", message="StepRequest: it has a header")
        push_handler = PushHandler(self._catalog, request.header)
        size = push_handler.weights_size * push_handler.wire.dtype.itemsize
        if size > self._catalog.config.message_bytes - _SPARE_BYTES:
            allowed = f"a vector of at most {self._catalog.config.message_bytes - _SPARE_BYTES} bytes: use StreamStep"
            raise Refused("PUSH_INVALID", field="gradient", allowed=allowed)
        if request.header.shared_memory:
            raise Refused("PUSH_INVALID", field="shared_memory", allowed="false: use StreamStep")
        result = push_handler.push(push_handler.gate.cut(request.gradient), context)
        with push_handler.engine.reading(context.is_active) as (position, weights):
            raw = b"".join(push_handler.wire.encoded([weights[: push_handler.weights_size].data]))
        return rpc.StepResponse(result=_result(result), position=position, weights=raw)

    def StreamStep(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The same in chunks."""
        header = next(messages, None)
        if not isinstance(header, rpc.PushHeader):
            raise Refused("MESSAGE_INVALID", message="StreamStepRequest: the stream begins with a PushHeader")
        push_handler = PushHandler(self._catalog, header)
        if header.shared_memory:
            result = push_handler.push_shared(context)
        else:
            result = push_handler.push(push_handler.pieces(messages), context)
        with push_handler.engine.reading(context.is_active) as (position, weights):
            answer = rpc.StreamStepHeader(result=_result(result), position=position)
            handle = shared_memory.handle(weights) if header.shared_memory else None
            if handle:
                yield _STEP.header(
                    rpc.StreamStepHeader(result=answer.result, position=position, weights=_memory(handle))
                )
                _await_end(messages)  # until then the worker reads them
                return
            yield _STEP.header(answer)
            for offset, data in admission.chunks(weights, push_handler.weights_size, push_handler.wire):
                yield _STEP.chunk("weights", offset, data)

    def Pull(self, request: rpc.PullRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The weights of the current version."""
        engine, wire = self._catalog.get(request.model), element_type_of(request.weights_type)
        if request.HasField("wait_for_version"):
            reached = engine.reached(request.wait_for_version, self._catalog.config.sessions)
            try:
                wait(context, reached)
            finally:
                engine.forget(reached)
        with engine.reading() as (position, weights):
            not_modified = request.HasField("newer_than") and position.version <= request.newer_than
            count = 0 if not_modified else weights.size
            yield _PULL.header(rpc.PullHeader(position=position, not_modified=not_modified, element_count=count))
            for offset, data in admission.chunks(weights, count, wire):
                yield _PULL.chunk("weights", offset, data)

    def GetPush(self, request: rpc.GetPushRequest, _: grpc.ServicerContext) -> rpc.GetPushResponse:
        """What became of a push."""
        engine = self._catalog.get(request.model)
        with engine.event():
            status = engine.machine.push_status(request.session_id, request.sequence)
            session = engine.machine.sessions.find_any(request.session_id)
            return rpc.GetPushResponse(
                last_applied_sequence=session.last_applied if session else 0,
                lineage=engine.head.lineage,
                state=_STATES[status.state],
                final=status.final,
                result=_result(status.result) if status.result else None,
                position=engine.position,
            )

    def _lease(self, request: rpc.OpenSessionRequest) -> float:
        config = self._catalog.config
        if not request.HasField("lease_seconds"):
            return config.lease_seconds
        asked = request.lease_seconds
        if not isfinite(asked) or not config.lease_seconds_min <= asked <= config.lease_seconds_max:
            allowed = f"{config.lease_seconds_min:g} to {config.lease_seconds_max:g}"
            raise Refused("POLICY_INVALID", field="lease_seconds", allowed=allowed)
        return asked


def _await_end(messages: Iterator[Any]) -> None:
    """Returns when the caller has sent all; raises Refused MESSAGE_INVALID where another message comes."""
    if next(messages, None) is not None:
        raise Refused("MESSAGE_INVALID", message="StreamStepRequest: nothing follows the header of a shared push")


def _memory(handle: Handle) -> rpc.SharedMemory:
    return rpc.SharedMemory(
        process_id=handle.process_id, file_descriptor=handle.descriptor, name=handle.name, bytes=handle.size_bytes
    )


def _result(result: PushResult) -> rpc.PushResult:
    contribution, summary = result.contribution, result.summary
    if contribution is None or summary is None:
        return rpc.PushResult(version=result.version, duplicate=result.duplicate)
    return rpc.PushResult(
        version=result.version,
        duplicate=result.duplicate,
        staleness=contribution.staleness,
        contributors=len(summary.contributions),
        hyperparameters=conversion.from_groups(summary.hyperparameters),
        gradient_norm=contribution.norm,
        update_norm=summary.norm,
    )
