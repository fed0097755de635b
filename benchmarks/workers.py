"""Many asynchronous workers of one model: throughput, fairness, memory, lost pushes."""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from threading import Barrier, Thread
from time import perf_counter

import deltaserve
from benchmarks import machine
from benchmarks.models import SHAPES_C, Shape, gradients_of, named, weights_of
from benchmarks.processes import TCP, TRANSPORTS, Transport, process, server
from benchmarks.results import Figures

COUNTS = (1, 2, 4, 8, 16, 64)
WORKLOAD_C = 4
STEPS, SHARE, LOST, WORKER_MB, SERVER_MB = (
    "steps/s",
    "slowest worker, of an equal share",
    "lost",
    "worker MB",
    "server MB",
)
COLUMNS = (STEPS, "lowest", "highest", SHARE, LOST, WORKER_MB, SERVER_MB)

_PROCESSES = 16
"""The largest number of worker processes; more workers are threads, because starting 64 interpreters is slow."""

_WARMUPS = 2


@dataclass(frozen=True, slots=True)
class _Round:
    """The outcome of one round: steps of each worker, duration, lost pushes, peaks of memory."""

    steps: list[int]
    seconds: float
    lost: int
    worker_bytes: int
    server_bytes: int


def by_transport(rounds: int, seconds: float) -> Figures:
    """Measures workload C, four workers, over every transport."""
    cases = {transport.row: (transport, WORKLOAD_C) for transport in TRANSPORTS}
    title = f"workers: {WORKLOAD_C} workers, 1 M parameters, {seconds:g} s"
    return Figures(title, COLUMNS, _measure(cases, rounds, seconds, SHAPES_C))


def by_count(
    rounds: int, seconds: float, counts: Sequence[int] = COUNTS, shapes: Sequence[Shape] = SHAPES_C
) -> Figures:
    """Measures several numbers of workers over TCP."""
    cases = {f"{count} worker{'s' if count > 1 else ''}": (TCP, count) for count in counts}
    title = f"workers: how many, 1 M parameters, {seconds:g} s, TCP"
    notes = (
        () if max(counts) <= _PROCESSES else (f"More than {_PROCESSES} workers are threads of {_PROCESSES} processes.",)
    )
    return Figures(title, COLUMNS, _measure(cases, rounds, seconds, shapes), notes)


def _measure(
    cases: dict[str, tuple[Transport, int]], rounds: int, seconds: float, shapes: Sequence[Shape]
) -> dict[str, tuple[float | None, ...]]:
    """Runs every case once per round, each with a new server."""
    found: dict[str, list[_Round]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (transport, count) in cases.items():
            found[name].append(_run(transport, count, seconds, shapes))
    return {name: _figures(measured) for name, measured in found.items()}


def _figures(rounds: list[_Round]) -> tuple[float, ...]:
    rates = [sum(measured.steps) / measured.seconds for measured in rounds]
    fairness = [min(measured.steps) * len(measured.steps) / sum(measured.steps) for measured in rounds]
    return (
        statistics.median(rates),
        min(rates),
        max(rates),
        statistics.median(fairness),
        float(sum(measured.lost for measured in rounds)),
        max(measured.worker_bytes for measured in rounds) / 1e6,
        max(measured.server_bytes for measured in rounds) / 1e6,
    )


def _run(transport: Transport, count: int, seconds: float, shapes: Sequence[Shape]) -> _Round:
    with ExitStack() as stack:
        target, pid = stack.enter_context(server(transport))
        client = stack.enter_context(deltaserve.connect(target))
        model = client.create_model("bench", named(weights_of(shapes)))
        processes = min(count, _PROCESSES)
        counts = [count // processes + (index < count % processes) for index in range(processes)]
        connections = [
            stack.enter_context(process(_work, target, transport, threads, list(shapes)))[0] for threads in counts
        ]
        for connection in connections:
            connection.recv()
        started = perf_counter()
        for connection in connections:
            connection.send(started + seconds)
        answers = [connection.recv() for connection in connections]
        steps = list(chain.from_iterable(answer[0] for answer in answers))
        ended = max(answer[1] for answer in answers)
        acknowledged = sum(steps) + _WARMUPS * count
        lost = acknowledged - model.info().version
        return _Round(steps, ended - started, lost, max(answer[2] for answer in answers), machine.peak_bytes(pid))


def _work(connection: Connection, target: str, transport: Transport, count: int, shapes: list[Shape]) -> None:
    """Runs `count` workers until the time received over the connection; sends their steps and their end."""
    gradients = named(gradients_of(shapes))
    ready, go = Barrier(count + 1), Barrier(count + 1)
    steps, deadline, ended = [0] * count, 0.0, [0.0] * count

    def run(index: int) -> None:
        with _worker(target, transport) as worker:
            for _ in range(_WARMUPS):
                worker.step(gradients)
            ready.wait()
            go.wait()
            while perf_counter() < deadline or not steps[index]:
                worker.step(gradients)
                steps[index] += 1
            ended[index] = perf_counter()

    threads = [Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    connection.send("ready")
    deadline = connection.recv()
    go.wait()
    for thread in threads:
        thread.join()
    connection.send((steps, max(ended), machine.peak_bytes(os.getpid())))


@contextmanager
def _worker(target: str, transport: Transport) -> Iterator[deltaserve.Worker]:
    with deltaserve.connect(target) as client, client.model("bench").worker(**transport.worker) as worker:
        yield worker
