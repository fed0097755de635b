"""Weights in shared memory that the worker reads too late or cannot map."""

from time import sleep
from typing import Any

import numpy as np
import pytest

import deltaserve
from deltaserve._common.flat_vector import FlatVector
from deltaserve._transport import shared_memory
from deltaserve._transport.shared_memory import SharedMemory
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server import LocalServer

SIZE = 300_001
ONES = {"w": np.ones(SIZE, np.float32)}


def test_weights_released_during_the_copy_are_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes during the copy, and the server reuses the memory of the version."""
    read = SharedMemory.read_weights
    with (
        LocalServer() as server,
        deltaserve.connect(server.target, timeout_seconds=30) as patient,
        deltaserve.connect(server.target, timeout_seconds=30) as hasty,
    ):
        model = patient.create_model("m", {"w": np.zeros(SIZE)})
        other, late = model.worker("other", transport="shared"), hasty.model("m").worker("late", transport="shared")
        other.step(ONES)
        late.step(ONES)
        updates = iter([4])

        def slow(self: SharedMemory, weights: rpc.SharedMemory, target: FlatVector) -> None:
            count = next(updates, 0)
            sleep(4.0 * bool(count))
            for _ in range(count):
                other.step(ONES)
            read(self, weights, target)

        monkeypatch.setattr(SharedMemory, "read_weights", slow)
        hasty._connection.timeout_seconds = 3.0
        with pytest.raises(deltaserve.UnavailableError):
            late.step(ONES)
        hasty._connection.timeout_seconds = 30
        late.step(ONES)
        assert late.last_result is not None
        assert (late.last_result.duplicate, late.last_result.version) == (True, 3)
        assert np.array_equal(late.weights["w"], model.pull_state(optimizer_state=False).weights["w"])
        assert late.version == model.info().version == 7


def test_a_worker_that_cannot_map_weights_uses_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_descriptors(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    with LocalServer() as server, deltaserve.connect(server.target) as client:
        model = client.create_model("m", {"w": np.zeros(SIZE)})
        with model.worker("a", transport="shared") as worker:
            worker.pull()
            monkeypatch.setattr(shared_memory, "_mapped", out_of_descriptors)
            for version in (1, 2):
                worker.step(ONES)
                assert worker.version == model.info().version == version
