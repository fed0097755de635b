"""A data directory restored from a backup, with real workers: each learns what is lost and continues.

`test_lineages.py` walks the server's part through every order of copies, kills, starts and restores.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.ports import held_port

import deltaserve
from deltaserve._transport.unary import UnaryTransport
from deltaserve._weights import ServerRestartedError
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server import LocalServer, ServerConfig

START = {"w": np.linspace(-1, 1, 8, dtype=np.float32)}
GRADIENT = {"w": np.full(8, 0.1, np.float32)}


@pytest.fixture
def address() -> Iterator[str]:
    """An address that stays free while no server has it."""
    held = held_port()
    yield f"127.0.0.1:{held.getsockname()[1]}"
    held.close()


def server(data: Path, address: str, durability: Any) -> LocalServer:
    config = ServerConfig(device="cpu", data_dir=data, durability=durability, bind=address, snapshot_seconds=None)
    return LocalServer(config)


def steps(worker: deltaserve.Worker, times: int) -> None:
    for _ in range(times):
        worker.step(GRADIENT)


def put_back(backup: Path, data: Path) -> None:
    shutil.rmtree(data)
    shutil.copytree(backup, data)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("durability", "restarted", "optimizer"),
    [
        ("journal", False, deltaserve.Adadelta()),
        ("journal", True, deltaserve.Adam()),
        ("fsync", False, deltaserve.SGD(momentum=0.9)),
        ("fsync", True, deltaserve.RMSprop(centered=True)),
    ],
    ids=["same server", "restarted since", "same server with fsync", "restarted since with fsync"],
)
def test_workers_learn_what_a_restored_directory_lacks_and_go_on(
    quick: Path, address: str, durability: str, restarted: bool, optimizer: deltaserve.Optimizer
) -> None:
    data, backup = quick / "data", quick / "backup"
    with ExitStack() as clients:
        live_client, away_client, idle_client = (
            clients.enter_context(deltaserve.connect(address, timeout_seconds=20)) for _ in range(3)
        )
        with server(data, address, durability):
            model = live_client.create_model("m", START, optimizer=optimizer, policy=deltaserve.Async())
            live, away = model.worker("live"), away_client.model("m").worker("away")
            steps(live, 2)
            idle = idle_client.model("m").worker("idle")
            shutil.copytree(data, backup)  # while the server runs
            steps(live, 3)
            steps(away, 1)
        if restarted:  # then the backup has never had the lineage that `live` knows, only its ancestor
            with server(data, address, durability):
                steps(live, 1)
        put_back(backup, data)
        with server(data, address, durability):
            for worker, lost in ((live, range(3, 6 + restarted)), (away, range(1, 2))):
                known = worker.version
                with pytest.raises(deltaserve.RolledBackError) as caught:
                    worker.step(GRADIENT)
                assert (caught.value.version, caught.value.restored_version) == (known, 2)
                assert caught.value.lost_pushes == lost
                before = model.info().version
                steps(worker, 2)
                assert worker.version == model.info().version == before + 2
            steps(idle, 1)  # its weights, of version 2, are in the backup
            assert idle.version == 7
            assert set(model.pull_state().update_counts.values()) == {7}, "of the backup, and of the steps since"


def lose_answer(worker: deltaserve.Worker) -> None:
    """Puts the worker into the state after a push whose answer was lost."""
    worker._session.sequence -= 1
    worker._session.sent = True


def test_weights_that_are_newer_than_a_push_that_counts_may_still_be_lost(quick: Path, address: str) -> None:
    """The snapshot has the push whose answer was lost, but not the weights that the worker pulled after it."""
    data, backup = quick / "data", quick / "backup"
    with ExitStack() as clients:
        client, other_client = (
            clients.enter_context(deltaserve.connect(address, timeout_seconds=20)) for _ in range(2)
        )
        with server(data, address, "snapshot"):
            model = client.create_model("m", START)
            worker, other = model.worker("a"), other_client.model("m").worker("other")
            steps(worker, 1)
            lose_answer(worker)
            model.save_snapshot()
            shutil.copytree(data, backup)  # as a kill would leave it
            steps(other, 3)
            worker.pull()
        put_back(backup, data)
        with server(data, address, "snapshot"):
            with pytest.raises(deltaserve.RolledBackError):
                steps(other, 1)
            steps(other, 5)  # as far as the worker's weights and farther
            with pytest.raises(deltaserve.RolledBackError) as caught:
                worker.step(GRADIENT)
            assert (caught.value.version, caught.value.restored_version) == (4, 1)
            assert not caught.value.lost_pushes
            assert worker.version == model.info().version == 6
            steps(worker, 1)


def test_a_late_worker_does_not_wait_for_a_version_that_was_lost(
    quick: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the round waits for the worker, and the worker for the round."""
    data, backup = quick / "data", quick / "backup"
    with ExitStack() as clients:
        client, late_client = (clients.enter_context(deltaserve.connect(address, timeout_seconds=20)) for _ in range(2))
        with server(data, address, "snapshot"):
            model = client.create_model("m", START, policy=deltaserve.Sync())
            model.save_snapshot()
            shutil.copytree(data, backup)
            first = model.worker("first")
            steps(first, 1)
            late = late_client.model("m").worker("late")
            late._membership.session.opened.first_version += 1  # as if it had joined while a round was open
        put_back(backup, data)
        with server(data, address, "snapshot"):
            waited, pull = list[int | None](), late._pull

            def interrupted(version: int | None) -> None:
                waited.append(version)
                if len(waited) == 1:  # the server died while the pull waited
                    raise ServerRestartedError
                pull(version)

            monkeypatch.setattr(late, "_pull", interrupted)
            late.pull()
            assert (waited, late.version) == ([2, 0], 0)


def test_shared_memory_opens_anew_in_a_session_that_takes_the_place_of_one_that_ended(
    quick: Path, address: str
) -> None:
    with ExitStack() as clients:
        client = clients.enter_context(deltaserve.connect(address, timeout_seconds=20))
        with server(quick / "data", address, "journal"):
            worker = client.create_model("m", START).worker("a", transport="shared")
            steps(worker, 2)
        with server(quick / "data", address, "journal"):
            worker.pull()  # which notices the restart
            session = rpc.CloseSessionRequest(**worker._session.id)
            client._connection.call("CloseSession", session)
            steps(worker, 1)
            assert worker.version == 3


def test_one_timeout_bounds_a_step_over_any_number_of_restarts(
    quick: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(quick / "data", address, "journal"), deltaserve.connect(address, timeout_seconds=0.3) as client:
        worker = client.create_model("m", START).worker("a")
        steps(worker, 1)

        def restarted(*_: object) -> Any:
            raise ServerRestartedError

        monkeypatch.setattr(UnaryTransport, "step", restarted)
        with pytest.raises(deltaserve.UnavailableError, match=r"within 0.3 s: it was restarted meanwhile"):
            worker.step(GRADIENT)
