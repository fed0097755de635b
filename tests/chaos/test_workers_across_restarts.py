"""Defects that the chaos harness found: restarts at moments that are hard to hit at random."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from server_host import free_port

import deltaserve
from deltaserve import Async, RolledBackError, Worker
from deltaserve._common import failpoints
from deltaserve._common.failpoints import FailpointError

_PROGRAM = Path(__file__).with_name("server_program.py")
pytestmark = pytest.mark.deep

_START = {"w": np.linspace(-1, 1, 5, dtype=np.float32)}


class Server:
    """A server with snapshots that the test kills and restarts."""

    def __init__(self, folder: Path) -> None:
        self._settings = {"port": free_port(), "data": str(folder), "durability": "snapshot"}
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(_PROGRAM), json.dumps(self._settings)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout
        self.target = self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def restart(self) -> None:
        self.kill()
        self.start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    yield started
    started.kill()


@pytest.fixture
def model(server: Server) -> Iterator[deltaserve.Model]:
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        yield client.create_model("m", _START, policy=Async())


def step(worker: Worker, *numbers: int) -> None:
    for number in numbers:
        worker.step({name: values * np.float32(0.1 * number) for name, values in _START.items()})


def lose_answer(worker: Worker) -> None:
    """Puts the worker into the state after a push whose answer was lost."""
    worker._session.sequence -= 1
    worker._session.sent = True


def once(function: Callable[..., Any], before: Callable[[], object]) -> Callable[..., Any]:
    """Wraps a function so that `before` runs before its first call."""
    remaining = [before]

    def called(*arguments: Any, **options: Any) -> Any:
        if remaining:
            remaining.pop()()
        return function(*arguments, **options)

    return called


def test_a_push_in_the_snapshot_is_not_applied_again(server: Server, model: deltaserve.Model) -> None:
    worker = model.worker("a")
    step(worker, 1, 2, 3)
    model.save_snapshot()
    lose_answer(worker)
    server.restart()
    step(worker, 3)
    assert model.info().version == worker.version == 3
    step(worker, 4)
    assert model.info().version == 4


def test_another_gradient_after_a_lost_answer_gets_the_next_number(server: Server, model: deltaserve.Model) -> None:
    worker = model.worker("a")
    step(worker, 1, 2, 3)
    model.save_snapshot()
    lose_answer(worker)
    server.restart()
    step(worker, 4)
    assert model.info().version == 4


def test_a_second_restart_before_the_current_weights_arrive(
    server: Server, model: deltaserve.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = model.worker("a")
    step(worker, 1, 2)
    model.save_snapshot()
    step(worker, 3, 4)
    server.restart()
    monkeypatch.setattr(worker, "_pull", once(worker._pull, server.restart))
    with pytest.raises(RolledBackError) as caught:
        step(worker, 5)
    assert (caught.value.restored_version, caught.value.lost_pushes) == (2, range(3, 5))
    step(worker, 5)
    assert model.info().version == 3


def test_a_loss_is_reported_even_after_an_interrupt(
    server: Server, model: deltaserve.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = model.worker("a")
    step(worker, 1)
    model.save_snapshot()
    step(worker, 2, 3)
    server.restart()
    monkeypatch.setattr(failpoints, "_armed", {"worker.rejoined": failpoints.parse("worker.rejoined=error@1")})
    with pytest.raises(FailpointError):
        step(worker, 4)
    with pytest.raises(RolledBackError) as caught:
        step(worker, 4)
    assert (caught.value.restored_version, caught.value.lost_pushes) == (1, range(2, 4))


def test_a_session_that_is_lost_while_its_worker_asks_for_a_push(
    server: Server, model: deltaserve.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = model.worker("a")
    step(worker, 1, 2)
    lose_answer(worker)
    monkeypatch.setattr(worker._membership, "find_push", once(worker._membership.find_push, server.restart))
    with pytest.raises(RolledBackError) as caught:
        step(worker, 3)
    assert (caught.value.restored_version, caught.value.lost_pushes) == (0, range(1, 2))


def test_the_restored_version_refers_to_the_weights_that_the_worker_has(
    server: Server, model: deltaserve.Model
) -> None:
    """Its weights came with the repeated answer, from the second of three lives of the server."""
    one = model.worker("one")
    step(one, 1, 2, 3)
    model.save_snapshot()
    lose_answer(one)
    server.restart()
    other = model.worker("other")
    step(other, 1, 2)
    model.save_snapshot()
    step(other, 3)
    step(one, 3)
    assert one.version == 6
    server.restart()
    with pytest.raises(RolledBackError) as caught:
        step(one, 4)
    assert (caught.value.version, caught.value.restored_version, len(caught.value.lost_pushes)) == (6, 5, 0)


def test_a_server_that_was_stopped_for_a_moment_still_ends() -> None:
    """A signal that arrives during the stop may wake another thread than the one that waits for it."""
    command = [sys.executable, "-m", "deltaserve", "serve", "--bind", "127.0.0.1:0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    process.stdout.readline()
    sleep(0.5)  # its threads run by now
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)
        sleep(0.1)
    process.communicate(timeout=30)
    assert process.returncode == 0
