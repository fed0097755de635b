"""What all adapters share: workloads, timing, the check against float64, processes, the command line.

Uses the standard library and numpy only, because the environments of the peers have little else in common.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic, perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks import machine
from benchmarks.models import Array, elements, gradients_of, shapes_of, weights_of

LR, RHO, EPS = 1.0, 0.9, 1e-6

_TOLERANCE = 2e-3
"""The largest allowed deviation from float64, relative to the largest change of a weight: float32 and variants of
the formula need it."""

_SAMPLES = 2000
_PATIENCE_SECONDS = 120.0

Record = dict[str, Any]


class Client(NamedTuple):
    """A worker of a peer: functions that make a step, return the latest weights, and close it."""

    step: Callable[[], object]
    weights: Callable[[], Sequence[Any]]
    close: Callable[[], object]


class Adapter(Protocol):
    """A module whose server and workers `run_processes` runs as processes."""

    def serve(self, connection: Connection, workload: str, variant: str, workers: int) -> None:
        """Sends `("ready", address)`, answers "count" with `("count", updates)`, returns at any other message."""

    def connect(self, address: Any, workload: str, variant: str, rank: int, workers: int) -> Client:
        """Returns worker number `rank`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The length of a workload: workers, warm-up steps, timed steps or seconds."""

    workers: int
    warmups: int
    steps: int
    seconds: float


def plan(workload: str, quick: bool) -> Plan:
    """Returns the plan for workload a, b or c, or for a number of parameters."""
    share = 0.1 if quick else 1.0
    if workload == "c":
        return Plan(4, 5, 0, 10.0 * share)
    count = elements(shapes_of(workload))
    steps = 2000 if workload == "b" else max(11, min(250_000_000 // count, 500))
    return Plan(1, 100 if workload == "b" else 3, max(round(steps * share), 3), 0.0)


def check(workload: str, weights: Sequence[Any], updates: int) -> tuple[bool, float]:
    """Compares weights with those of Adadelta in float64 after `updates` updates with the constant gradient.

    Returns:
        Whether they are equal up to rounding, and the largest deviation relative to the largest change of a weight.
    """
    worst = 0.0
    shapes = shapes_of(workload)
    for start, gradient, end in zip(weights_of(shapes), gradients_of(shapes), weights, strict=True):
        every = max(start.size // _SAMPLES, 1)
        first, push, last = (np.asarray(array).ravel()[::every].astype(np.float64) for array in (start, gradient, end))
        expected = _adadelta(first, push, updates)
        moved = float(np.abs(expected - first).max()) or 1.0
        worst = float(np.maximum(worst, np.abs(last - expected).max() / moved))  # unlike max, it keeps a NaN
    return worst < _TOLERANCE, worst


def _adadelta(weights: Any, gradient: Any, updates: int) -> Any:
    square_avg, acc_delta = np.zeros_like(weights), np.zeros_like(weights)
    for _ in range(updates):
        square_avg = RHO * square_avg + (1 - RHO) * gradient**2
        delta = np.sqrt(acc_delta + EPS) / np.sqrt(square_avg + EPS) * gradient
        acc_delta = RHO * acc_delta + (1 - RHO) * delta**2
        weights = weights - LR * delta
    return weights


class Meter:
    """Measures what a tree of processes uses from now on."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        return (
            machine.tree_cpu_seconds(self._root),
            float(machine.loopback_bytes()),
            machine.busy_seconds(),
            perf_counter(),
        )

    def per_step(self, steps: int) -> Record:
        """Returns processor time and loopback traffic per step, and the load of other processes."""
        processor, sent, busy, wall = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return {
            "cpu_seconds": processor / max(steps, 1),
            "loopback_bytes": sent / max(steps, 1),
            "others_share_of_a_core": max(busy - processor, 0.0) / wall,
        }


def timed(client: Client, workload: str, quick: bool, root: int) -> Record:
    """Times the steps of one worker, and checks the final weights.

    Args:
        client: The worker.
        workload: Any workload except c.
        quick: Whether to make a tenth of the steps.
        root: The ancestor of all processes, for the meter.
    """
    todo = plan(workload, quick)
    for _ in range(todo.warmups):
        client.step()
    meter, seconds = Meter(root), []
    for _ in range(todo.steps):
        started = perf_counter()
        client.step()
        seconds.append(perf_counter() - started)
    used = meter.per_step(todo.steps)
    correct, error = check(workload, client.weights(), todo.warmups + todo.steps)
    peak = machine.peak_bytes(os.getpid())
    return {"seconds": seconds, **used, "worker_bytes": peak, "correct": correct, "error": error}


def work(client: Client, deadline: float) -> tuple[int, float]:
    """Steps until the monotonic clock shows `deadline`, at least once; returns the number of steps and the end."""
    count = 0
    while monotonic() < deadline or not count:
        client.step()
        count += 1
    return count, monotonic()


def together(counts: Sequence[tuple[int, float]], started: float) -> Record:
    """Combines the results of `work` of all workers."""
    steps = [count for count, _ in counts]
    return {"steps_per_second": sum(steps) / (max(end for _, end in counts) - started), "steps_by_worker": steps}


def judge(workload: str, weights: Sequence[Any], acknowledged: int, applied: int) -> Record:
    """Returns whether the weights contain exactly the acknowledged pushes."""
    correct, error = check(workload, weights, acknowledged)
    return {"acknowledged": acknowledged, "lost": acknowledged - applied, "correct": correct, "error": error}


def run_processes(module: str, workload: str, variant: str, quick: bool) -> Record:
    """Runs an adapter whose server and workers are processes."""
    todo = plan(workload, quick)
    with ExitStack() as stack:
        server, process = stack.enter_context(_process(_serve, module, workload, variant, todo.workers))
        address = _receive(server, process)
        workers = [
            stack.enter_context(_process(_work, module, workload, variant, address, rank, os.getpid(), quick))
            for rank in range(todo.workers)
        ]
        record = _workload_c(server, process, workers, quick) if workload == "c" else _receive(*workers[0])
        assert process.pid is not None
        record["server_bytes"] = machine.peak_bytes(process.pid)
        for connection, _ in workers:
            connection.send("close")
        return record


_Child = tuple[Connection, BaseProcess]


def _workload_c(server: Connection, process: BaseProcess, workers: Sequence[_Child], quick: bool) -> Record:
    todo = plan("c", quick)
    for worker in workers:
        _receive(*worker)
    meter, started = Meter(os.getpid()), monotonic()
    for connection, _ in workers:
        connection.send(started + todo.seconds)
    answers = [_receive(*worker) for worker in workers]
    record = together([answer[:2] for answer in answers], started)
    steps = sum(record["steps_by_worker"])
    record |= meter.per_step(steps)
    workers[0][0].send("step")  # the last step of all, so that its weights contain all pushes
    weights = _receive(*workers[0])
    server.send("count")
    record |= judge("c", weights, todo.workers * todo.warmups + steps + 1, _receive(server, process))
    return {**record, "worker_bytes": max(answer[2] for answer in answers)}


@contextmanager
def _process(target: Callable[..., None], *arguments: object) -> Any:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_guarded, args=(theirs, target, *arguments))
    child.start()
    try:
        yield ours, child
    finally:
        with suppress(OSError):
            ours.send("stop")
        child.join(10)
        if child.is_alive():
            child.kill()
        child.join()


def _guarded(connection: Connection, target: Callable[..., None], *arguments: object) -> None:
    try:
        target(connection, *arguments)
    except Exception:
        connection.send(("error", traceback.format_exc()))


def _receive(connection: Connection, process: BaseProcess) -> Any:
    """Returns the content of the next answer; raises RuntimeError for an error or if no answer comes."""
    deadline = monotonic() + _PATIENCE_SECONDS
    while not connection.poll(0.2):
        if not process.is_alive() or monotonic() > deadline:
            raise RuntimeError(f"no answer; the process's exit status is {process.exitcode}")
    kind, content = connection.recv()
    if kind == "error":
        raise RuntimeError(content)
    return content


def _serve(connection: Connection, module: str, workload: str, variant: str, workers: int) -> None:
    adapter: Adapter = importlib.import_module(module)
    adapter.serve(connection, workload, variant, workers)


def _work(
    connection: Connection, module: str, workload: str, variant: str, address: Any, rank: int, root: int, quick: bool
) -> None:
    adapter: Adapter = importlib.import_module(module)
    todo = plan(workload, quick)
    client = adapter.connect(address, workload, variant, rank, todo.workers)
    if workload != "c":
        connection.send(("done", timed(client, workload, quick, root)))
    else:
        for _ in range(todo.warmups):
            client.step()
        connection.send(("ready", None))
        connection.send(("done", (*work(client, connection.recv()), machine.peak_bytes(os.getpid()))))
    while connection.recv() == "step":
        client.step()
        connection.send(("weights", [np.array(array) for array in client.weights()]))
    client.close()


def copies(arrays: Sequence[Array]) -> list[Array]:
    """Returns new arrays in the same shapes, for the weights of a worker."""
    return [np.zeros_like(array) for array in arrays]


def free_port() -> int:
    """Returns a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main(variants: Sequence[str], run: Callable[[str, str, bool], Record]) -> None:
    """Runs the workload of the command line and prints its record as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True, help="a, b, c, or a number of parameters")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    arguments = parser.parse_args()
    answer = os.dup(1)
    os.dup2(2, 1)  # keeps the output of libraries out of the answer
    try:
        record = run(arguments.workload, arguments.variant, arguments.quick)
    except Exception:
        record = {"failed": traceback.format_exc()}
    os.write(answer, (json.dumps(record) + "\n").encode())
    sys.stderr.flush()
    os._exit("failed" in record)  # skips the shutdown of libraries, some of which hang
