"""Every RPC through a plain gRPC channel: generated messages, without any code of the client."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from messages import ADADELTA_SLOTS, CHUNK, Shapes, Vector, creation, cut, floats, push, replacement
from numpy.typing import ArrayLike

from deltaserve.v1 import common_pb2, model_service_pb2, system_service_pb2, worker_service_pb2
from deltaserve.v1.common_pb2 import Policy
from deltaserve.v1.optimizers_pb2 import Optimizer
from deltaserve.v1.worker_service_pb2 import PushHeader

SERVICES = {
    service.full_name: service
    for module in (model_service_pb2, worker_service_pb2, system_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
}
METHODS: dict[str, MethodDescriptor] = {m.name: m for service in SERVICES.values() for m in service.methods}

SECONDS = 20.0
"""Timeout of a call. A server that hangs fails the test; a busy machine does not."""
_WATCH_SECONDS = 100.0
"""Timeout of a call that lasts as long as many others, such as a thousand steps on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The status of a refused call."""

    code: grpc.StatusCode
    reason: str
    domain: str
    metadata: dict[str, str]
    retry_seconds: float | None
    fields: tuple[str, ...]
    text: str

    def __repr__(self) -> str:
        return f"{self.code.name} {self.reason} {self.metadata}: {self.text}"


def refusal(error: grpc.RpcError) -> Refusal:
    """Reads the status of a failed call. It must carry an ErrorInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no details: {error.code()} {error.details()}"
    info, retry, request = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    retry_seconds = None
    kinds = [detail.TypeName().rpartition(".")[2] for detail in status.details]
    assert kinds[0] == "ErrorInfo"
    assert set(kinds) <= {"ErrorInfo", "RetryInfo", "BadRequest"}
    assert len(set(kinds)) == len(kinds)
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        if detail.Unpack(retry):
            retry_seconds = retry.retry_delay.ToTimedelta().total_seconds()
    return Refusal(
        code=error.code(),
        reason=info.reason,
        domain=info.domain,
        metadata=dict(info.metadata),
        retry_seconds=retry_seconds,
        fields=tuple(violation.field for violation in request.field_violations),
        text=str(error.details()),
    )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a client can see of a model."""

    version: int
    config: bytes
    update_counts: tuple[int, ...]
    slots: tuple[str, ...]
    vectors: tuple[bytes, ...]
    sessions: tuple[tuple[str, int, int, int, bool], ...]

    @property
    def weights(self) -> Vector:
        """The parameters."""
        return np.frombuffer(self.vectors[0], "<f4")

    def slot(self, name: str) -> Vector:
        """A vector of optimizer state."""
        return np.frombuffer(self.vectors[1 + self.slots.index(name)], "<f4")

    @property
    def square_avg(self) -> Vector:
        """Adadelta's leaky average of squared gradients."""
        return self.slot("square_avg")

    @property
    def acc_delta(self) -> Vector:
        """Adadelta's leaky average of squared updates."""
        return self.slot("acc_delta")

    @property
    def arrays(self) -> list[Vector]:
        """The parameters and all optimizer state."""
        return [np.frombuffer(vector, "<f4") for vector in self.vectors]


@dataclass(frozen=True)
class Session:
    """An open session: the fields that identify it in requests, and the answer of OpenSession."""

    model: str
    opened: worker_service_pb2.OpenSessionResponse

    @property
    def id(self) -> dict[str, Any]:
        """The fields of every request of the session."""
        return {"model": self.model, "session_id": self.opened.session_id, "epoch": self.opened.epoch}

    def header(self, sequence: int, **fields: Any) -> PushHeader:
        """A push's header."""
        return PushHeader(**self.id, sequence=sequence, **fields)


@dataclass(frozen=True)
class Stepped:
    """A step's answer."""

    result: worker_service_pb2.PushResult
    position: common_pb2.ModelPosition
    weights: Vector


class Watch:
    """A WatchModel call.

    Args:
        call: The call.
    """

    def __init__(self, call: Any) -> None:
        self.call = call

    def next(self) -> model_service_pb2.WatchModelResponse:
        """Waits for the next message."""
        return model_service_pb2.WatchModelResponse.FromString(next(self.call))

    def until(self, version: int) -> list[model_service_pb2.WatchModelResponse]:
        """Returns the messages up to that of a version."""
        messages = [self.next()]
        while messages[-1].position.version < version:
            messages.append(self.next())
        return messages

    def refused(self) -> Refusal:
        """Reads everything that is left, and returns the refusal that ends it."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return refusal(error)
        raise AssertionError("it ended without a reason")

    def cancel(self) -> None:
        """Cancels the call."""
        self.call.cancel()


class Wire:
    """A separate channel to a server. Its window does not grow, so a reader that stops takes effect at once."""

    def __init__(self, target: str) -> None:
        self.target = target
        options = [
            ("grpc.max_receive_message_length", 64 << 20),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
        ]
        self.channel = grpc.insecure_channel(target, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()

    # --- any RPC

    def start(self, method: str, messages: Iterable[Message | bytes], seconds: float = SECONDS) -> Any:
        """Starts a call. The result iterates over the bytes of the responses, and can be cancelled."""
        path = f"/{METHODS[method].containing_service.full_name}/{method}"
        begin: Any = self.channel.stream_stream(path, request_serializer=None, response_deserializer=None)
        encoded = (m if isinstance(m, bytes) else m.SerializeToString() for m in messages)
        return begin(encoded, timeout=seconds)

    def call(self, method: str, *messages: Message | bytes, seconds: float = SECONDS) -> list[Any]:
        """Makes a call and returns its responses."""
        kind = GetMessageClass(METHODS[method].output_type)
        return [kind.FromString(data) for data in self.start(method, messages, seconds)]

    def one(self, method: str, *messages: Message | bytes, seconds: float = SECONDS) -> Any:
        """Makes a call that has one response."""
        (answer,) = self.call(method, *messages, seconds=seconds)
        return answer

    def refused(self, method: str, *messages: Message | bytes) -> Refusal:
        """Makes a call that the server refuses."""
        try:
            answer = self.call(method, *messages)
        except grpc.RpcError as error:
            return refusal(error)
        raise AssertionError(f"{method} answered {answer}")

    # --- models

    def create(
        self,
        name: str,
        shapes: Shapes | None = None,
        *,
        weights: ArrayLike | None = None,
        groups: Sequence[Optimizer] = (),
        group_of: Sequence[int] = (),
        policy: Policy | None = None,
    ) -> model_service_pb2.CreateModelResponse:
        """Creates a model. Its weights are zero unless given."""
        messages = creation(name, shapes, weights=weights, groups=groups, group_of=group_of, policy=policy)
        answer: model_service_pb2.CreateModelResponse = self.one("CreateModel", *messages)
        return answer

    def model(self, name: str) -> model_service_pb2.GetModelResponse:
        """GetModel."""
        answer: model_service_pb2.GetModelResponse = self.one("GetModel", model_service_pb2.GetModelRequest(model=name))
        return answer

    def models(self) -> Sequence[model_service_pb2.ModelSummary]:
        """ListModels."""
        answer: model_service_pb2.ListModelsResponse = self.one("ListModels", model_service_pb2.ListModelsRequest())
        return answer.models

    def snapshot(self, name: str) -> Snapshot:
        """PullState and GetModel."""
        header, *rest = self.call("PullState", model_service_pb2.PullStateRequest(model=name, optimizer_state=True))
        slots = tuple(header.header.slots)
        vectors = np.split(_joined([message.state for message in rest]), 1 + len(slots))
        return Snapshot(
            version=header.header.position.version,
            config=header.header.config.SerializeToString(deterministic=True),
            update_counts=tuple(header.header.update_counts),
            slots=slots,
            vectors=tuple(vector.tobytes() for vector in vectors),
            sessions=tuple((s.worker, s.epoch, s.rank, s.last_sequence, s.waiting) for s in self.model(name).sessions),
        )

    def put(
        self,
        name: str,
        vectors: Sequence[ArrayLike],
        counts: Sequence[int] = (),
        slots: Sequence[str] = ADADELTA_SLOTS,
        chunk: int = CHUNK,
    ) -> int:
        """PutState. Returns the version that it made."""
        messages = replacement(name, vectors, counts, slots, chunk)
        answer: model_service_pb2.PutStateResponse = self.one("PutState", *messages)
        return answer.position.version

    def update(
        self, name: str, groups: Sequence[Optimizer] = (), policy: Policy | None = None
    ) -> model_service_pb2.UpdateModelResponse:
        """UpdateModel."""
        request = model_service_pb2.UpdateModelRequest(model=name, groups=groups, policy=policy)
        answer: model_service_pb2.UpdateModelResponse = self.one("UpdateModel", request)
        return answer

    def watch(self, name: str, seconds: float = _WATCH_SECONDS) -> Watch:
        """WatchModel."""
        return Watch(self.start("WatchModel", [model_service_pb2.WatchModelRequest(model=name)], seconds))

    def delete(self, name: str) -> None:
        """DeleteModel."""
        self.one("DeleteModel", model_service_pb2.DeleteModelRequest(model=name))

    def info(self) -> system_service_pb2.GetServerInfoResponse:
        """GetServerInfo."""
        answer: system_service_pb2.GetServerInfoResponse = self.one(
            "GetServerInfo", system_service_pb2.GetServerInfoRequest()
        )
        return answer

    # --- workers

    def open(self, model: str, worker: str, lease_seconds: float | None = None) -> Session:
        """OpenSession."""
        request = worker_service_pb2.OpenSessionRequest(model=model, worker=worker, lease_seconds=lease_seconds)
        return Session(model, self.one("OpenSession", request))

    def keep(self, session: Session) -> worker_service_pb2.KeepSessionResponse:
        """KeepSession."""
        request = worker_service_pb2.KeepSessionRequest(**session.id)
        answer: worker_service_pb2.KeepSessionResponse = self.one("KeepSession", request)
        return answer

    def close(self, session: Session) -> None:
        """CloseSession."""
        self.one("CloseSession", worker_service_pb2.CloseSessionRequest(**session.id))

    def fate(self, session: Session, sequence: int) -> worker_service_pb2.GetPushResponse:
        """GetPush."""
        request = worker_service_pb2.GetPushRequest(
            model=session.model, session_id=session.opened.session_id, sequence=sequence
        )
        answer: worker_service_pb2.GetPushResponse = self.one("GetPush", request)
        return answer

    def step(self, header: PushHeader, gradient: ArrayLike, seconds: float = SECONDS) -> Stepped:
        """Step."""
        request = worker_service_pb2.StepRequest(header=header, gradient=floats(gradient))
        answer = self.one("Step", request, seconds=seconds)
        return Stepped(answer.result, answer.position, np.frombuffer(answer.weights, "<f4"))

    def stream_step(self, header: PushHeader, chunks: Iterable[tuple[int, ArrayLike]]) -> Stepped:
        """StreamStep of chunks as they are given."""
        return streamed(self.start("StreamStep", push(header, chunks)))

    def begin(self, header: PushHeader, gradient: ArrayLike) -> Any:
        """Starts a StreamStep, which may wait for its round. Returns once the push is accepted or refused."""
        call = self.start("StreamStep", push(header, cut(gradient)))
        eventually(lambda: self._accepted(header) or call.done(), "the push does not arrive")
        return call

    def _accepted(self, header: PushHeader) -> bool:
        session: dict[str, Any] = {"model": header.model, "session_id": header.session_id, "epoch": header.epoch}
        answer = self.one("KeepSession", worker_service_pb2.KeepSessionRequest(**session))
        return bool(answer.last_accepted_sequence >= header.sequence)

    def lease_left(self, model: str) -> dict[str, float]:
        """Returns the seconds that are left of each worker's lease."""
        return {session.worker: session.lease_left_seconds for session in self.model(model).sessions}

    def outlives(self, model: str, worker: str, other: str) -> bool:
        """Returns whether the lease of one worker expires after that of another."""
        left = self.lease_left(model)
        return left[worker] > left[other]

    def waiting(self, model: str) -> set[str]:
        """The workers whose pushes wait for their round."""
        return {session.worker for session in self.model(model).sessions if session.waiting}

    def pull(self, model: str, **fields: Any) -> tuple[worker_service_pb2.PullHeader, Vector]:
        """Pull."""
        return pulled(self.start("Pull", [worker_service_pb2.PullRequest(model=model, **fields)]))


def streamed(call: Iterable[bytes]) -> Stepped:
    """Reads StreamStep's answer."""
    header, *rest = [worker_service_pb2.StreamStepResponse.FromString(data) for data in call]
    weights = _joined([message.weights for message in rest])
    return Stepped(header.header.result, header.header.position, weights)


def pulled(call: Iterable[bytes]) -> tuple[worker_service_pb2.PullHeader, Vector]:
    """Reads Pull's answer."""
    header, *rest = [worker_service_pb2.PullResponse.FromString(data) for data in call]
    weights = _joined([message.weights for message in rest])
    assert weights.size == header.header.element_count
    return header.header, weights


def _joined(chunks: Sequence[common_pb2.Chunk]) -> Vector:
    end = 0
    for chunk in chunks:
        assert chunk.offset * 4 == end
        end += len(chunk.data)
    return np.frombuffer(b"".join(chunk.data for chunk in chunks), "<f4")


@contextmanager
def unchanged(wire: Wire, *models: str) -> Iterator[None]:
    """Checks that the body changes nothing that a client can see."""
    before = _seen(wire, models)
    yield
    eventually(lambda: _seen(wire, models) == before, f"something of {models} changed")


def _seen(wire: Wire, models: Sequence[str]) -> tuple[object, ...]:
    return (
        _names(wire),
        wire.info().limits.memory_available_bytes,
        [wire.snapshot(name) for name in models],
    )


def _names(wire: Wire) -> list[str]:
    """Returns the names of all models, or the reason why the server does not list them."""
    try:
        return [model.name for model in wire.models()]
    except grpc.RpcError as error:
        return [refusal(error).reason]


def eventually(condition: Callable[[], bool], otherwise: str, seconds: float = SECONDS) -> None:
    """Waits for a condition."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, otherwise
        sleep(0.005)
