"""Random bytes and mutated requests at every RPC: the documented codes, no hang, and a refusal changes nothing.

Each run is the same: the random source is seeded. Requests that are still good after the mutation may well be answered.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from messages import adadelta, creation, cut, floats, pieces, push, replacement, sync
from mutations import Messages, Mutator
from wire import METHODS, Session, Wire, refusal

from deltaserve._common.error_table import TABLE
from deltaserve.v1 import model_service_pb2 as models
from deltaserve.v1 import system_service_pb2 as system
from deltaserve.v1 import worker_service_pb2 as workers
from deltaserve.v1.common_pb2 import TensorSpec
from deltaserve_server import LocalServer, ServerConfig

SIZE = 24
SHAPES = {"w": (4, 5), "none": (0,), "b": (4,)}
GROUPS = [adadelta(lr=0.5), adadelta(rho=0.8)]
CONFIG = ServerConfig(
    bind="127.0.0.1:0", device="cpu", memory_bytes=64 << 20, models=8, sessions=16, lease_seconds=3600
)
CODES = {row.code for row in TABLE.values()} - {grpc.StatusCode.INTERNAL}
READS = (
    "GetModel",
    "ListModels",
    "PullState",
    "Pull",
    "GetServerInfo",
    "GetPush",
    "WatchModel",
    "SaveSnapshot",
    "ListSnapshots",
)
WAITS = 0.1
"""Timeout in seconds of a pull that may wait for a version far ahead."""


class Target:
    """A server with one model, whose state is checked after every call."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._restore()

    def requests(self) -> dict[str, Sequence[Message]]:
        """Returns a valid request for each RPC."""
        session, tensors = self._session, [TensorSpec(name="more", shape=[2])]
        extension = models.ExtendModelHeader(
            model="m", tensor_count=3, group_count=2, tensors=tensors, groups=GROUPS[:1]
        )
        header = session.header(self._number, base_version=0, hyperparameters=GROUPS, absent_tensors=[1], weight=2.0)
        policy = sync(3, quorum=3, grace_seconds=1.0, round_timeout_seconds=2.0, reduction=2, trim=1, clip_norm=5.0)
        vector = np.linspace(0, 1, SIZE)
        kind = workers.StreamStepRequest
        return {
            "CreateModel": creation("new", SHAPES, groups=GROUPS, group_of=[0, 1, 1]),
            "ExtendModel": [
                models.ExtendModelRequest(header=extension),
                *(models.ExtendModelRequest(weights=piece) for piece in pieces([1, 2], SIZE)),
            ],
            "GetModel": [models.GetModelRequest(model="m")],
            "ListModels": [models.ListModelsRequest()],
            "UpdateModel": [models.UpdateModelRequest(model="m", groups=GROUPS, policy=policy)],
            "WatchModel": [models.WatchModelRequest(model="m")],
            "DeleteModel": [models.DeleteModelRequest(model="m")],
            "SaveSnapshot": [models.SaveSnapshotRequest(model="m")],
            "ListSnapshots": [models.ListSnapshotsRequest(model="m")],
            "PullState": [models.PullStateRequest(model="m", optimizer_state=True)],
            "PutState": replacement("m", [vector] * 3, counts=[1, 2, 3], chunk=9),
            "OpenSession": [workers.OpenSessionRequest(model="m", worker="a", lease_seconds=30.0)],
            "KeepSession": [workers.KeepSessionRequest(**session.id)],
            "CloseSession": [workers.CloseSessionRequest(**session.id)],
            "OpenSharedMemory": [workers.OpenSharedMemoryRequest(**session.id)],
            "Step": [workers.StepRequest(header=header, gradient=floats(vector))],
            "StreamStep": [kind.FromString(message) for message in push(header, cut(vector, 7))],
            "Pull": [workers.PullRequest(model="m", newer_than=0, wait_for_version=0)],
            "GetPush": [
                workers.GetPushRequest(model="m", session_id=session.opened.session_id, sequence=self._number - 1)
            ],
            "GetServerInfo": [system.GetServerInfoRequest()],
        }

    def send(self, method: str, messages: Messages, pull_seconds: float = WAITS) -> bool:
        """Makes a call. Returns whether the server answered it."""
        call = self._wire.start(method, messages, seconds=pull_seconds if method == "Pull" else 20.0)
        try:
            for _ in call:
                if method == "WatchModel":  # it has no end
                    call.cancel()
                    break
        except grpc.RpcError as error:
            self._check(method, error)
            return False
        if method not in READS:
            self._restore()
        return True

    def _check(self, method: str, error: grpc.RpcError) -> None:
        """Checks the code and details of a refusal, and that the model has not changed."""
        if method == "Pull" and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return
        assert error.code() in CODES, error
        refused = refusal(error)
        assert refused.code is TABLE[refused.reason].code
        assert refused.metadata.keys() == TABLE[refused.reason].keys
        assert refused.text.isprintable()
        assert method in READS or self._wire.snapshot("m") == self._before, (method, refused)
        assert [model.name for model in self._wire.models()] == ["m"]

    def _restore(self) -> None:
        """Restores the initial state after a call that was answered."""
        for model in self._wire.models():
            self._wire.delete(model.name)
        self._wire.create("m", SHAPES, groups=GROUPS, group_of=[0, 1, 1])
        self._session: Session = self._wire.open("m", "a")
        self._wire.step(self._session.header(1), np.ones(SIZE))
        self._number = 2
        self._before = self._wire.snapshot("m")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    config = replace(CONFIG, data_dir=tmp_path_factory.mktemp("data"), durability="journal")
    with LocalServer(config) as server, Wire(server.target) as wire:
        yield Target(wire)


Mutate = Callable[[Mutator, Sequence[Message]], Messages]
KINDS: dict[str, tuple[Mutate, int]] = {
    "noise": (lambda mutator, _: mutator.noise(), 15),
    "bits": (lambda mutator, messages: mutator.bits(messages), 50),
    "fields": (lambda mutator, messages: mutator.fields(messages), 60),
    "order": (lambda mutator, messages: mutator.order(messages), 20),
}


@pytest.mark.parametrize("method", METHODS)
def test_good_requests_are_answered(target: Target, method: str) -> None:
    """Otherwise the mutations of these requests would prove nothing."""
    good = [message.SerializeToString() for message in target.requests()[method]]
    assert target.send(method, good, pull_seconds=20.0)


@pytest.mark.parametrize("share", [0.2, pytest.param(1.0, marks=pytest.mark.deep)], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_mutated_request_is_refused_as_documented(target: Target, method: str, kind: str, share: float) -> None:
    mutate, count = KINDS[kind]
    mutator = Mutator(sum(map(ord, method + kind)))
    for _ in range(round(share * count)):
        target.send(method, mutate(mutator, target.requests()[method]))


@pytest.mark.deep
def test_the_requests_of_other_rpcs_are_refused_as_documented(target: Target) -> None:
    for method in METHODS:
        for other in METHODS:
            if method != "Pull":
                target.send(method, [message.SerializeToString() for message in target.requests()[other]])
