"""Workers continue after an in-process server stops and restarts. `test_restarts.py` kills server processes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.ports import held_port

import deltaserve
from deltaserve import Client, Worker
from deltaserve_server import LocalServer, ServerConfig

SMALL = {"w": np.linspace(-1, 1, 5, dtype=np.float32), "b": np.ones((), np.float32)}
LARGE = {"w": np.linspace(-1, 1, 400_000, dtype=np.float32)}


def steps(worker: Worker, start: dict[str, Any], numbers: range) -> None:
    for number in numbers:
        worker.step({name: (values * 0.1 * number).astype(np.float32) for name, values in start.items()})


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Stops the running server, starts one on the same port and data directory, and returns its address."""
    running = list[LocalServer]()
    with held_port() as port:
        target = f"127.0.0.1:{port.getsockname()[1]}"
        config = ServerConfig(bind=target, device="cpu", data_dir=tmp_path, durability="journal")

        def start() -> str:
            while running:
                running.pop().stop(grace_seconds=0)
            running.append(LocalServer(config))
            running[0].start()
            return target

        yield start
        while running:
            running.pop().stop(grace_seconds=0)


@pytest.mark.parametrize(
    ("start", "transport"),
    [(SMALL, "auto"), (LARGE, "stream"), (LARGE, "shared")],
    ids=["one message", "chunks", "shared memory"],
)
def test_a_worker_continues_in_its_session_with_the_same_bits(
    start: dict[str, Any], transport: Any, client: Client, life: Callable[[], str]
) -> None:
    with (
        deltaserve.connect(life(), timeout_seconds=30) as mine,
        client.create_model("m", start).worker(transport=transport) as twin,
    ):
        model = mine.create_model("m", start)
        with model.worker("a", transport=transport) as worker:
            for numbers in (range(1, 4), range(4, 7)):
                steps(worker, start, numbers)
                steps(twin, start, numbers)
                life()
            steps(worker, start, range(7, 9))
            steps(twin, start, range(7, 9))
            for name, values in worker.weights.items():
                np.testing.assert_array_equal(values, twin.weights[name])
            assert [session.epoch for session in model.info().sessions] == [1]
            memory = getattr(worker._membership.transport(), "memory", None)
            assert (memory is not None) == (transport == "shared")


def test_a_push_whose_answer_was_lost_is_found_after_the_restart(life: Callable[[], str]) -> None:
    with deltaserve.connect(life(), timeout_seconds=30) as client:
        worker = client.create_model("m", SMALL).worker("a")
        steps(worker, SMALL, range(1, 4))
        worker._session.sequence, worker._session.sent = 3, True
        life()
        steps(worker, SMALL, range(3, 4))
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (3, True)
        steps(worker, SMALL, range(4, 5))
        assert client.model("m").info().version == 4
