"""WorkerService: sessions, steps and pulls."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import grpc

from deltaserve._common.codec import StreamCodec
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server.engine.catalog import ModelCatalog
from deltaserve_server.memory import shared_memory
from deltaserve_server.model import Refused
from deltaserve_server.service import admission, conversion
from deltaserve_server.service.conversion import from_ancestors, from_position, from_result
from deltaserve_server.service.element_types import element_type_of
from deltaserve_server.service.method_handlers import wait
from deltaserve_server.service.push_handler import PushHandler

_STEP = StreamCodec(rpc.StreamStepResponse)
_PULL = StreamCodec(rpc.PullResponse)

_SPARE_BYTES = 1 << 16
"""Room in the messages of Step for everything but the vector."""

_LOCAL_PEERS = "ipv4:127.", "ipv6:%5B::1%5D", "unix:"
"""What gRPC's name of a caller on this host begins with."""

_STATES = {
    "not accepted": rpc.PUSH_STATE_NOT_ACCEPTED,
    "waiting": rpc.PUSH_STATE_WAITING,
    "applied": rpc.PUSH_STATE_APPLIED,
}


class WorkerServicer:
    """Serves WorkerService; `executor` checks large pushes, each on up to `threads` threads."""

    def __init__(self, catalog: ModelCatalog, executor: Executor, threads: int) -> None:
        self._catalog = catalog
        self._executor = executor
        self._threads = threads

    def OpenSession(self, request: rpc.OpenSessionRequest, _: grpc.ServicerContext) -> rpc.OpenSessionResponse:
        worker = conversion.checked_name("worker", request.worker)
        tensor_count = request.tensor_count if request.HasField("tensor_count") else None
        group_count = request.group_count if request.HasField("group_count") else None
        engine = self._catalog.get(request.model)
        # Before the session is opened, which fences the worker's older one.
        if request.HasField("lineage") and not engine.head.knows(request.lineage):
            raise Refused("LINEAGE_UNKNOWN", model=request.model)
        config = self._catalog.config
        lease_seconds = request.lease_seconds if request.HasField("lease_seconds") else config.lease_seconds
        if not config.lease_seconds_min <= lease_seconds <= config.lease_seconds_max:  # not a number fails this too
            allowed = f"{config.lease_seconds_min:g} to {config.lease_seconds_max:g}"
            raise Refused("POLICY_INVALID", field="lease_seconds", allowed=allowed)
        session = self._catalog.open_session(request.model, worker, lease_seconds, tensor_count, group_count)
        with engine.lock:
            return rpc.OpenSessionResponse(
                session_id=session.id,
                epoch=session.epoch,
                rank=session.rank,
                lease_seconds=session.lease_seconds,
                first_version=session.first_version,
                tensor_count=session.tensor_count,
                position=from_position(engine.position),
                lineage=engine.head.lineage,
                ancestors=from_ancestors(engine.head),
            )

    def KeepSession(self, request: rpc.KeepSessionRequest, _: grpc.ServicerContext) -> rpc.KeepSessionResponse:
        engine = self._catalog.get(request.model)
        with engine.lock:
            session = engine.keep_session(request.session_id, request.epoch)
            return rpc.KeepSessionResponse(
                lease_seconds=session.lease_seconds,
                last_applied_sequence=session.last_applied,
                last_accepted_sequence=session.last_accepted,
                position=from_position(engine.position),
                lineage=engine.head.lineage,
                ancestors=from_ancestors(engine.head),
            )

    def CloseSession(self, request: rpc.CloseSessionRequest, _: grpc.ServicerContext) -> rpc.CloseSessionResponse:
        engine = self._catalog.get(request.model)
        with engine.lock:
            engine.close_session(request.session_id, request.epoch)
            return rpc.CloseSessionResponse(position=from_position(engine.position))

    def OpenSharedMemory(
        self, request: rpc.OpenSharedMemoryRequest, context: grpc.ServicerContext
    ) -> rpc.OpenSharedMemoryResponse:
        engine = self._catalog.get(request.model)
        session = engine.keep_session(request.session_id, request.epoch)
        if not self._catalog.config.offers_shared_memory:
            raise Refused("SHARED_MEMORY_UNAVAILABLE", why="the server does not offer it")
        if not context.peer().startswith(_LOCAL_PEERS):
            raise Refused("SHARED_MEMORY_UNAVAILABLE", why="the server is on another host")
        handle = engine.open_shared_memory(session, self._catalog.quotas.memory)
        with engine.lock:
            gradient, position = conversion.from_handle(handle), from_position(engine.position)
            return rpc.OpenSharedMemoryResponse(gradient=gradient, position=position)

    def Step(self, request: rpc.StepRequest, context: grpc.ServicerContext) -> rpc.StepResponse:
        if not request.HasField("header"):
            raise Refused("MESSAGE_INVALID", message="StepRequest: it has a header")
        push = PushHandler(self._catalog, request.header)
        limit = self._catalog.config.message_bytes - _SPARE_BYTES  # for the answer, whose type may be wider
        if push.weights_size * push.weights_type.dtype.itemsize > limit:
            allowed = f"a vector of at most {limit} bytes: use StreamStep"
            raise Refused("PUSH_INVALID", field="gradient", allowed=allowed)
        if request.header.shared_memory:
            raise Refused("PUSH_INVALID", field="shared_memory", allowed="false: use StreamStep")
        result = push.push(push.validator.split(request.gradient), context)
        with push.reading(context) as (position, weights):
            # A copy: the response is serialized after the version is released.
            encoded = b"".join(push.weights_type.encoded([weights[: push.weights_size].data]))
        return rpc.StepResponse(result=from_result(result), position=from_position(position), weights=encoded)

    def StreamStep(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        header = next(messages, None)
        if not isinstance(header, rpc.PushHeader):
            raise Refused("MESSAGE_INVALID", message="StreamStepRequest: the stream begins with a PushHeader")
        push = PushHandler(self._catalog, header)
        if header.shared_memory:
            result = push.push_shared(context, self._executor, self._threads)
        else:
            result = push.push(push.chunks(messages), context)
        with push.reading(context) as (position, weights):
            answer = rpc.StreamStepHeader(result=from_result(result), position=from_position(position))
            # None for a version that was made before anybody shared memory: it is sent in chunks.
            handle = shared_memory.handle(weights) if header.shared_memory else None
            if handle:
                answer.weights.CopyFrom(conversion.from_handle(handle))
                yield _STEP.header(answer)
                if next(messages, None) is not None:  # the worker ends its stream when it has read the weights
                    allowed = "nothing follows the header of a shared push"
                    raise Refused("MESSAGE_INVALID", message=f"StreamStepRequest: {allowed}")
                return
            yield _STEP.header(answer)
            for offset, data in admission.chunks(weights, push.weights_size, push.weights_type):
                yield _STEP.chunk("weights", offset, data)

    def Pull(self, request: rpc.PullRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        engine, weights_type = self._catalog.get(request.model), element_type_of(request.weights_type)
        if request.HasField("wait_for_version"):
            with engine.reached(request.wait_for_version, self._catalog.config.sessions) as reached:
                wait(context, reached)
        with engine.reading() as (position, weights):
            not_modified = request.HasField("newer_than") and position.version <= request.newer_than
            count = 0 if not_modified else weights.size  # the header alone answers who has this version
            header = rpc.PullHeader(position=from_position(position), not_modified=not_modified, element_count=count)
            yield _PULL.header(header)
            for offset, data in admission.chunks(weights, count, weights_type):
                yield _PULL.chunk("weights", offset, data)

    def GetPush(self, request: rpc.GetPushRequest, _: grpc.ServicerContext) -> rpc.GetPushResponse:
        engine = self._catalog.get(request.model)
        with engine.lock:
            status = engine.machine.push_status(request.session_id, request.sequence)
            session = engine.machine.sessions.find_any(request.session_id)
            return rpc.GetPushResponse(
                last_applied_sequence=session.last_applied if session else 0,
                lineage=engine.head.lineage,
                ancestors=from_ancestors(engine.head),
                state=_STATES[status.state],
                final=status.final,
                result=from_result(status.result) if status.result else None,
                position=from_position(engine.position),
            )
