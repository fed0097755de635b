"""Client processes that are killed while they upload: the server releases everything that they held."""

import signal
import subprocess
import sys
from time import monotonic, sleep

import numpy as np
import pytest

import deltaserve
from deltaserve_server import LocalServer

SIZE = 1_000_000

UPLOADS = """
import sys, time
import grpc
from deltaserve.v1 import common_pb2 as pb, worker_service_pb2 as rpc, model_service_pb2 as models

target, worker = sys.argv[1:]
channel = grpc.insecure_channel(target)
call = channel.unary_unary("/deltaserve.v1.WorkerService/OpenSession", None, rpc.OpenSessionResponse.FromString)
opened = call(rpc.OpenSessionRequest(model="m", worker=worker, lease_seconds=2.0).SerializeToString(), timeout=10)

def chunks(kind, field, size):
    for offset in range(0, size, 100_000):
        yield kind(**{field: pb.Chunk(offset=offset, data=bytes(400_000))}).SerializeToString()

def push():
    header = rpc.PushHeader(model="m", session_id=opened.session_id, epoch=opened.epoch, sequence=1)
    yield rpc.StreamStepRequest(header=header).SerializeToString()
    yield from chunks(rpc.StreamStepRequest, "gradient", 900_000)
    print("sent", flush=True)
    time.sleep(60)

def put():
    yield models.PutStateRequest(header=models.PutStateHeader(model="m")).SerializeToString()
    yield from chunks(models.PutStateRequest, "weights", 1_000_000)
    time.sleep(60)

def create():
    tensors = [pb.TensorSpec(name="w", shape=[1_000_000])]
    config = pb.ModelConfig(name=worker, tensors=tensors)
    yield models.CreateModelRequest(config=config).SerializeToString()
    yield from chunks(models.CreateModelRequest, "weights", 900_000)
    time.sleep(60)

for service, method, messages in (
    ("ModelService", "PutState", put()),
    ("ModelService", "CreateModel", create()),
    ("WorkerService", "StreamStep", push()),
):
    started = channel.stream_stream(f"/deltaserve.v1.{service}/{method}")(messages, timeout=60)
    globals()["keep_" + method] = started

renew = channel.unary_unary("/deltaserve.v1.WorkerService/KeepSession")
session = rpc.KeepSessionRequest(model="m", session_id=opened.session_id, epoch=opened.epoch).SerializeToString()
while True:
    renew(session, timeout=60)
    time.sleep(0.3)
"""


@pytest.mark.deep
def test_clients_that_are_killed_during_their_uploads_leave_nothing() -> None:
    with LocalServer() as server, deltaserve.connect(server.target, timeout_seconds=30) as client:
        model = client.create_model("m", {"w": np.zeros(SIZE, np.float32)}, policy=deltaserve.Sync())
        free = client.server_info().limits.memory_available_bytes
        with model.worker("survivor") as survivor:
            for attempt in range(2):
                victims = [_start(server.target, f"victim{attempt}{k}") for k in range(3)]
                for victim in victims:
                    assert victim.stdout is not None
                    assert victim.stdout.readline() == b"sent\n"
                assert len(model.info().sessions) == 4
                assert client.server_info().limits.memory_available_bytes < free - 3 * 4 * SIZE
                for victim in victims:
                    victim.send_signal(signal.SIGKILL)
                    victim.communicate()
                survivor.step({"w": np.ones(SIZE, np.float32)})
                assert survivor.last_result is not None
                assert survivor.last_result.contributors == 1
        _until_free(client, free)
        assert [entry.name for entry in client.models()] == ["m"]
        assert model.pull_state().update_counts == {"w": 2}


def _start(target: str, worker: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", UPLOADS, target, worker], stdout=subprocess.PIPE)


def _until_free(client: deltaserve.Client, free: int) -> None:
    deadline = monotonic() + 20
    while client.server_info().limits.memory_available_bytes != free:
        assert monotonic() < deadline, "an upload is still held"
        sleep(0.05)
