"""The scene of a refused request: a server with a model that must not change."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from google.protobuf.message import Message
from messages import ADADELTA_SLOTS, cut, floats, push
from wire import Session, Wire, eventually

from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2 as models
from deltaserve.v1 import worker_service_pb2 as workers
from deltaserve_server import LocalServer, ServerConfig

CONFIG = ServerConfig(
    bind="127.0.0.1:0",
    device="cpu",
    threads=1,
    memory_bytes=900_000,
    staged_bytes=100_000,
    message_bytes=140_000,
    models=5,
    sessions=6,
    watchers=2,
    lease_seconds_min=0.25,
)
"""Limits small enough for a test to reach."""

LARGE = 20_000
"""Elements of a model that does not fit into one message, nor two pushes of it into the staged bytes."""

Request = tuple[str, list[Message | bytes]]


@dataclass
class Scene:
    """A server with a model that has had updates.

    Attributes:
        wire: To the server.
        a: A session with model "m" (tensors w [4] and b [], asynchronous), two pushes old.
        models: Names of the models that must not change.
    """

    wire: Wire
    server: LocalServer
    monkeypatch: pytest.MonkeyPatch
    threads: ThreadPoolExecutor
    a: Session
    models: list[str] = field(default_factory=lambda: ["m"])
    pending: list[Future[bool]] = field(default_factory=list)
    calls: list[object] = field(default_factory=list)

    def other(self, name: str, shape: tuple[int, ...] = (4,), policy: pb.Policy | None = None) -> None:
        """Creates another model that must not change."""
        self.wire.create(name, {"w": shape}, policy=policy)
        self.models.append(name)

    def start_push(self, session: Session, sequence: int, size: int) -> None:
        """Starts a push. Returns once it waits for its round."""
        self.calls.append(self.wire.start("StreamStep", push(session.header(sequence), cut(np.ones(size)))))
        eventually(lambda: self._waits(session), "the push does not wait for its round")

    def drain(self) -> None:
        """Starts to stop the server, which drains for as long as a push waits for its round."""
        self.pending.append(self.threads.submit(self.server.stop, 30.0))
        eventually(lambda: bool(self.server._catalog.quotas.draining), "the server does not stop")

    def _waits(self, session: Session) -> bool:
        return any(held.waiting for held in self.wire.model(session.model).sessions)


@dataclass(frozen=True)
class Case:
    """A request that the server must refuse.

    Attributes:
        reason: The expected reason.
        prepare: Sets the scene and returns the request.
        metadata: Some of the expected metadata.
        retry: Whether the refusal must carry a RetryInfo.
    """

    reason: str
    prepare: Callable[[Scene], Request]
    metadata: Mapping[str, str]
    retry: bool

    def __str__(self) -> str:
        return f"{self.reason}-{self.prepare.__name__}"


CASES: list[Case] = []


def case(
    reason: str, *, retry: bool = False, **metadata: str
) -> Callable[[Callable[[Scene], Request]], Callable[[Scene], Request]]:
    """Adds a case."""

    def add(prepare: Callable[[Scene], Request]) -> Callable[[Scene], Request]:
        CASES.append(Case(reason, prepare, metadata, retry))
        return prepare

    return add


def step(header: workers.PushHeader, *values: float) -> Request:
    """A Step."""
    return "Step", [workers.StepRequest(header=header, gradient=floats(values))]


def stream(header: workers.PushHeader, *chunks: tuple[int, object]) -> Request:
    """A StreamStep. The values of a chunk are numbers or bytes."""
    return "StreamStep", list(push(header, chunks))  # type: ignore[arg-type]


def put(*chunks: pb.Chunk, counts: Sequence[int] = (), slots: Sequence[str] = ADADELTA_SLOTS) -> Request:
    """A PutState of model "m"."""
    kind = models.PutStateRequest
    header = models.PutStateHeader(model="m", update_counts=counts, slots=slots)
    return "PutState", [kind(header=header), *(kind(state=chunk) for chunk in chunks)]


def whole(index: int, *values: float) -> pb.Chunk:
    """A vector of a PutState in one chunk: the weights have index 0."""
    return pb.Chunk(offset=5 * index, data=floats(values))


def opened(scene: Scene, worker: str = "z", **fields: object) -> Request:
    """An OpenSession with model "m"."""
    return "OpenSession", [workers.OpenSessionRequest(model="m", worker=worker, **fields)]  # type: ignore[arg-type]
