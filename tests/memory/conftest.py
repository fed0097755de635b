"""Every kind of store, and pushes staged as they arrive."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.memory.store_states import MakeStore

from deltaserve_server.memory import Budget, Staging, State, Store
from deltaserve_server.memory.host import HostStore
from deltaserve_server.optimizers.formats import Values


def _cuda() -> bool:
    try:
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


@pytest.fixture(
    params=[
        pytest.param("host-1", marks=pytest.mark.deep),
        "host-3",
        "shared-2",
        pytest.param("device", marks=[pytest.mark.gpu, pytest.mark.skipif(not _cuda(), reason="needs an NVIDIA GPU")]),
    ]
)
def make_store(request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    """Creates stores of one kind: host or shared memory with a number of threads, or a GPU."""
    if request.param == "device":
        from deltaserve_server.memory.device import DeviceStore

        yield lambda state, budget: DeviceStore(state, 0, budget)
        return
    threads = int(request.param[-1])
    with ThreadPoolExecutor(threads) as executor:

        def make(state: State, budget: Budget) -> Store:
            store = HostStore(state, 0, budget, executor, threads)
            if request.param.startswith("shared"):
                store.use_shared_memory()
            return store

        yield make


def unaligned(values: Values) -> Values:
    """Returns the values as in a received message: read-only, at an odd address."""
    received: Any = np.frombuffer(b"x" + values.tobytes(), values.dtype, offset=1)
    read_only: Values = received
    return read_only


@pytest.fixture
def stage() -> Callable[..., Staging]:
    """Stages the given runs of a push in chunks, by default the whole push."""

    def stage(
        store: Store, values: Values, runs: Sequence[tuple[int, int]] | None = None, chunk: int = 1 << 18
    ) -> Staging:
        staging = store.stage()
        for start, stop in [(0, values.size)] if runs is None else runs:
            for at in range(start, stop, chunk):
                staging.add(at, unaligned(values[at : min(at + chunk, stop)]))
        return staging

    return stage
