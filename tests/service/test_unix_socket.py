"""A server on a Unix socket: calls work as over TCP, shared memory is the default, and the path is reusable."""

from pathlib import Path

import numpy as np
import pytest
from attach import Sharer
from expected import Twin, gradient
from messages import cut
from wire import Wire

import deltaserve
from deltaserve_server import LocalServer, ServerConfig

SIZE = 300_001


def config(path: Path) -> ServerConfig:
    return ServerConfig(bind=f"unix:{path}", device="cpu")


def test_every_door_and_shared_memory(tmp_path: Path) -> None:
    with LocalServer(config(tmp_path / "s.sock")) as server, Wire(server.target) as wire:
        assert server.target == f"unix:{tmp_path}/s.sock"
        assert (tmp_path / "s.sock").is_socket()
        twin = Twin(gradient(0, SIZE))
        wire.create("m", {"w": (SIZE,)}, weights=twin.weights)
        sharer = Sharer(wire, "m", "a")
        for number in (1, 3):
            _, weights = sharer.step(number, gradient(number, SIZE))
            twin.update(gradient(number, SIZE))
            np.testing.assert_array_equal(weights, twin.weights)
            answer = wire.stream_step(sharer.session.header(number + 1), cut(gradient(number + 1, SIZE)))
            twin.update(gradient(number + 1, SIZE))
            np.testing.assert_array_equal(answer.weights, twin.weights)
        twin.check(wire.snapshot("m"))
        wire.create("small")
        assert wire.step(wire.open("small", "a").header(1), np.ones(5)).result.version == 1


def test_a_worker_takes_shared_memory_there(tmp_path: Path) -> None:
    with LocalServer(config(tmp_path / "s.sock")) as server, deltaserve.connect(server.target) as client:
        worker = client.create_model("m", {"w": np.zeros(SIZE)}).worker()
        assert getattr(worker._membership.transport(), "memory", None) is not None
        worker.step({"w": np.ones(SIZE)})
        assert worker.version == 1


def test_the_same_path_again(tmp_path: Path) -> None:
    for _ in range(3):
        with LocalServer(config(tmp_path / "s.sock")) as server, Wire(server.target) as wire:
            wire.create("m")
            assert [model.name for model in wire.models()] == ["m"]


def test_a_path_that_cannot_be_listened_on(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "s.sock", tmp_path / ("x" * 120)):
        with pytest.raises(OSError, match=f"cannot listen on unix:{tmp_path}"), LocalServer(config(path)):
            pass


@pytest.mark.parametrize("bind", ["unix:", "unix", "/tmp/s.sock"])
def test_a_bad_address_is_refused(bind: str) -> None:
    with pytest.raises(ValueError, match="expected HOST:PORT or unix:PATH"):
        ServerConfig(bind=bind)
