"""Every place where a model's vectors can live, and pushes as they come."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deltaserve_server.memory import Budget, Staging, Store
from deltaserve_server.memory.host import HostStore
from deltaserve_server.memory.store import Vector


def _cuda() -> bool:
    try:
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


@pytest.fixture(
    params=[
        "host-1",
        "host-3",
        pytest.param("device", marks=[pytest.mark.gpu, pytest.mark.skipif(not _cuda(), reason="needs an NVIDIA GPU")]),
    ]
)
def make_store(request: pytest.FixtureRequest) -> Iterator[Callable[[Vector, Budget], Store]]:
    """Makes stores of one kind."""
    if request.param == "device":
        from deltaserve_server.memory.device import DeviceStore

        yield lambda weights, budget: DeviceStore(weights, 0, budget)
        return
    threads = int(request.param[-1])
    with ThreadPoolExecutor(threads) as executor:
        yield lambda weights, budget: HostStore(weights, 0, budget, executor, threads)


def unaligned(values: Vector) -> Vector:
    """The values as they lie in a received message: read-only, at an odd address."""
    return np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1)


@pytest.fixture
def stage() -> Callable[..., Staging]:
    """Stages the runs of a push in chunks; all of it where none are said."""

    def stage(
        store: Store, values: Vector, runs: Sequence[tuple[int, int]] | None = None, chunk: int = 1 << 18
    ) -> Staging:
        staging = store.stage()
        for start, stop in [(0, values.size)] if runs is None else runs:
            for at in range(start, stop, chunk):
                staging.add(at, unaligned(values[at : min(at + chunk, stop)]))
        return staging

    return stage
