"""A data directory restored from a backup, with real workers: each learns what is lost and continues.

These tests need three changes: the server begins a lineage at every start (durability), refuses
a push of another lineage with LINEAGE_CHANGED and returns the chain from KeepSession (service), and the worker compares
its own version with the chain (client). `test_lineages.py` covers the first part alone.
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


@pytest.mark.parametrize("restarted", [False, True], ids=["same server", "restarted since"])
@pytest.mark.parametrize("durability", ["journal", "fsync"])
def test_workers_learn_what_a_restored_directory_lacks_and_go_on(
    quick: Path, address: str, durability: str, restarted: bool
) -> None:
    data, backup = quick / "data", quick / "backup"
    with ExitStack() as clients:
        live_client, away_client, idle_client = (
            clients.enter_context(deltaserve.connect(address, timeout_seconds=20)) for _ in range(3)
        )
        with server(data, address, durability):
            model = live_client.create_model("m", START, policy=deltaserve.Async())
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
