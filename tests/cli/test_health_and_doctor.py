"""`health` and `doctor`: a good server, no server, and something else than a deltaserve server."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

import deltaserve
from deltaserve_server import LocalServer, ServerConfig

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def stranger() -> Iterator[str]:
    """A gRPC server without any service."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait(timeout=10)


def test_health_of_a_server(command: Command, target: str) -> None:
    ended = command("health", target)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "SERVING\n", "")


def test_health_of_a_draining_server(command: Command) -> None:
    with LocalServer() as server, deltaserve.connect(server.target, timeout_seconds=60.0) as client:
        model = client.create_model("m", {"w": [1.0]}, policy=deltaserve.Sync(min_workers=2))
        with ThreadPoolExecutor(2) as threads, model.worker() as worker:
            worker.pull()
            threads.submit(worker.step, {"w": np.ones(1, np.float32)})
            while not client.model("m").info().sessions[0].waiting:
                pass
            stopping = threads.submit(server.stop, grace_seconds=30.0)
            ended = command("health", server.target)
            while ended.returncode == 0:
                ended = command("health", server.target)
            assert "NOT_SERVING" in ended.stderr
            model.update(policy=deltaserve.Async())  # no round is open now, so the server stops
            stopping.result()


@pytest.mark.parametrize("where", ["silent", "stranger"])
def test_health_of_something_else(command: Command, where: str, request: pytest.FixtureRequest) -> None:
    address = request.getfixturevalue(where)
    ended = command("health", address, "--timeout", "0.5")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"deltaserve: {address} does not answer (")
    assert ended.stderr.count("\n") == 1


def test_doctor_finds_nothing_wrong_and_leaves_nothing_behind(command: Command, target: str) -> None:
    ended = command("doctor", target)
    names = ["reachable", "health", "version", "device", "durable", "optimizers", "limits", "memory"]
    names += ["round trip", "throughput"]
    lines = ended.stdout.splitlines()
    # On a busy machine the measurements may be problems; the first seven findings may not.
    assert [line[6:].split("  ")[0].strip() for line in lines if "->" not in line] == names
    assert all(line.startswith("ok") for line in lines[:7])
    assert "optimizers  adadelta, sgd, adagrad, rmsprop, adam, adamw" in ended.stdout
    assert "ms median" in ended.stdout
    assert "MB/s" in ended.stdout
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        assert not [model for model in client.models() if model.name.startswith("doctor-")]


def test_quick_doctor_measures_nothing(command: Command, target: str) -> None:
    ended = command("doctor", "--quick", target)
    assert ended.returncode == 0
    assert "MB/s" not in ended.stdout
    assert len(ended.stdout.splitlines()) == 8


def test_doctor_without_a_server(command: Command) -> None:
    ended = command("doctor", "127.0.0.1:9")
    assert ended.returncode == 1
    assert "nothing listens on port 9 of 127.0.0.1" in ended.stdout
    assert "-> start a server there: deltaserve serve --bind 127.0.0.1:9" in ended.stdout
    assert ended.stderr == "deltaserve: 1 problem found, see above\n"


def test_doctor_with_a_name_that_does_not_exist(command: Command) -> None:
    ended = command("doctor", "no-such-host.invalid:50051")
    assert ended.returncode == 1
    assert "no-such-host.invalid" in ended.stdout
    assert "-> " in ended.stdout


def test_doctor_of_a_stranger(command: Command, stranger: str) -> None:
    ended = command("doctor", stranger)
    assert ended.returncode == 1
    assert "ok    reachable" in ended.stdout
    assert "look  health" in ended.stdout
    assert "look  protocol" in ended.stdout
    assert ended.stdout.count("->") == 2


def test_doctor_reports_little_memory_and_small_messages(command: Command) -> None:
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", memory_bytes=64 << 20, message_bytes=512 << 10)
    with LocalServer(config) as server:
        ended = command("doctor", server.target)
    assert ended.returncode == 1
    assert "--message-bytes" in ended.stdout
    assert "not measured: the server has too little free memory" in ended.stdout
