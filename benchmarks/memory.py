"""The peak memory of the server process, beside what it is allowed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import grpc

import deltaserve
from benchmarks import machine
from benchmarks.models import SHAPES_A, Shape, Tensors, elements, gradients_of, named, weights_of
from benchmarks.processes import SHARED, TCP, Transport, server
from benchmarks.results import Figures
from deltaserve.v1 import model_service_pb2

BASE_BYTES = 120_000_000
"""Allowance for the interpreter, its libraries and everything else that does not grow with the model."""

RATIO = "of allowed"
_READERS = 3
_WORKERS = 4


@dataclass(frozen=True, slots=True)
class _Scenario:
    """What clients do, and how many versions are read and pushes staged at the same time."""

    run: Callable[[str, Transport, Tensors, int], None]
    versions: int
    pushes: int


def memory(steps: int, shapes: Sequence[Shape] = SHAPES_A, transports: Sequence[Transport] = (TCP, SHARED)) -> Figures:
    """Measures the peak of the server's resident memory, with a new server for each scenario."""
    size, gradients = 4 * elements(shapes), named(gradients_of(shapes))
    rows: dict[str, tuple[float | None, ...]] = {}
    for transport in transports:
        for name, scenario in _SCENARIOS.items():
            with server(transport) as (target, pid):
                with deltaserve.connect(target) as client:
                    client.create_model("bench", named(weights_of(shapes)))
                scenario.run(target, transport, gradients, steps)
                peak = machine.peak_bytes(pid)
            allowed = size * (1 + scenario.versions + 2 + scenario.pushes) + BASE_BYTES
            row = (peak / 1e6, allowed / 1e6, peak / allowed, scenario.versions, scenario.pushes)
            rows[f"{transport.name}: {name}"] = row
    columns = ("peak MB", "allowed MB", RATIO, "versions read", "pushes staged")
    note = f"Allowed: weights x (1 + versions read) + 2 x state + staged pushes + {BASE_BYTES / 1e6:.0f} MB."
    return Figures(f"memory: the server's, {size / 1e6:.3g} MB of weights", columns, rows, (note,))


def _idle(target: str, transport: Transport, gradients: Tensors, steps: int) -> None:
    """Does nothing."""


def _one(target: str, transport: Transport, gradients: Tensors, steps: int) -> None:
    with deltaserve.connect(target) as client, client.model("bench").worker(**transport.worker) as worker:
        for _ in range(steps):
            worker.step(gradients)


def _several(target: str, transport: Transport, gradients: Tensors, steps: int) -> None:
    with ThreadPoolExecutor(_WORKERS) as executor:
        for done in [executor.submit(_one, target, transport, gradients, steps) for _ in range(_WORKERS)]:
            done.result()


def _stopped_readers(target: str, transport: Transport, gradients: Tensors, steps: int) -> None:
    """Several readers stop in the middle, each at another version, while a worker continues."""
    with ExitStack() as stack:
        for _ in range(_READERS):
            stack.enter_context(_stopped_reader(target))
            _one(target, transport, gradients, 1)
        _one(target, transport, gradients, steps)


@contextmanager
def _stopped_reader(target: str) -> Iterator[None]:
    request = model_service_pb2.PullStateRequest(model="bench").SerializeToString()
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_stream("/deltaserve.v1.ModelService/PullState", bytes, bytes)(request, timeout=600)
        next(call)
        yield
        call.cancel()


_SCENARIOS = {
    "idle": _Scenario(_idle, versions=0, pushes=0),
    "one worker": _Scenario(_one, versions=1, pushes=1),
    f"{_WORKERS} workers": _Scenario(_several, versions=_WORKERS, pushes=_WORKERS),
    f"one worker and {_READERS} readers who stopped": _Scenario(_stopped_readers, versions=1 + _READERS, pushes=1),
}
