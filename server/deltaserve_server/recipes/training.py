"""A training run: starts a process for each worker, watches them, and leaves none behind."""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeAlias

import deltaserve
from deltaserve_server.recipes.errors import WorkerError
from deltaserve_server.recipes.recipe import JoinOptions, Policy, Recipe
from deltaserve_server.recipes.worker import Begin, Job, Message, Progress, WorkerFailure, WorkerResult, main

LEAVE_SECONDS = 5.0
"""How long a worker may take to close its session before it is killed."""

Observer = Callable[[Progress], None]
Pipe: TypeAlias = "Connection[Job | Begin, Message]"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        loss: Over all training examples, with the weights that the model has at the end.
        accuracy: Fraction of the test examples that are classified correctly; None without test examples.
        epoch_seconds: Training time of the first worker per epoch, without the measurements of the loss.
        updates: Number of versions by which the model advanced during the run, by workers of other runs too.
        version: The model's version at the end.
        samples_per_second: Of all workers of the run together.
        pushes: Number of gradients that the workers computed.
        late: Number of these gradients that arrived too late.
        skipped: Number of batches without a gradient, because their rounds had closed.
        curve: Pairs of epoch and loss, measured by the first worker.
    """

    loss: float
    accuracy: float | None
    epoch_seconds: float
    updates: int
    version: int
    samples_per_second: float
    pushes: int
    late: int
    skipped: int
    curve: tuple[tuple[float, float], ...]


def run(
    recipe: Recipe,
    *,
    target: str,
    model: str | None = None,
    workers: int,
    policy: Policy,
    elastic: bool = False,
    timeout_seconds: float = 60.0,
    observer: Observer | None = None,
) -> RunResult:
    """Trains with several worker processes against a server.

    Args:
        recipe: What to train.
        target: The server's address, HOST:PORT or unix:PATH.
        model: The model's name; None means the recipe's. A model of this name is trained further; otherwise the first
            worker creates it.
        workers: Number of worker processes.
        policy: The policy that the model has, or is created with.
        elastic: The only worker trains beside workers of other runs (see `Job`).
        timeout_seconds: The limit of each of a worker's calls, its retries included.
        observer: Called in this thread with each progress report.

    Raises:
        WorkerError: A worker ended before it finished its job; the others have been stopped.
        deltaserve.Error: The server cannot be reached.
    """
    join = JoinOptions(target=target, model=model or recipe.name, policy=policy, timeout_seconds=timeout_seconds)
    with deltaserve.connect(target, timeout_seconds=timeout_seconds) as client:
        before = next((summary.version for summary in client.models() if summary.name == join.model), 0)
        jobs = [
            Job(recipe=recipe, join=join, worker=worker, workers=workers, elastic=elastic) for worker in range(workers)
        ]
        results = _run_workers(jobs, observer or (lambda progress: None))
        # After the last worker: its updates are in, which no worker's own weights promise.
        state = client.model(join.model).pull_state(optimizer_state=False)
    # Results come in the order in which workers finish; only worker 0 measures the loss.
    first = min(results, key=lambda result: result.worker)
    seconds = max(result.ended for result in results) - min(result.started for result in results)
    return RunResult(
        loss=recipe.loss(state.weights),
        accuracy=recipe.accuracy(state.weights),
        epoch_seconds=first.training_seconds / recipe.epochs,
        updates=state.version - before,
        version=state.version,
        samples_per_second=sum(result.samples for result in results) / seconds,
        pushes=sum(result.pushes for result in results),
        late=sum(result.late for result in results),
        skipped=sum(result.skipped for result in results),
        curve=first.curve,
    )


def _run_workers(jobs: Sequence[Job], observer: Observer) -> list[WorkerResult]:
    """Runs a process for each job until all are done; no process outlives this call."""
    processes: dict[Pipe, SpawnProcess] = {}
    try:
        with _without_interrupts():
            for job in jobs:
                pipe, process = _start(f"worker {job.worker}")
                processes[pipe] = process
        for job, (pipe, process) in zip(jobs, processes.items(), strict=True):
            _send(job, pipe, process)
        results = _follow(processes, observer)
        for process in processes.values():  # _stop's signal could interrupt its shutdown and print an error
            process.join(LEAVE_SECONDS)
        return results
    finally:
        _stop(processes)


def _start(name: str) -> tuple[Pipe, SpawnProcess]:
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    pipe, workers_end = context.Pipe()
    process = context.Process(target=main, args=(workers_end,), name=name, daemon=True)
    process.start()
    workers_end.close()  # only the worker holds it now, so that the worker's death closes the pipe
    return pipe, process


def _send(message: Job | Begin, pipe: Pipe, process: SpawnProcess) -> None:
    """Sends a worker a message. A job is too large for the arguments: `start` would hang if the worker died."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(process) from None


def _follow(processes: Mapping[Pipe, SpawnProcess], observer: Observer) -> list[WorkerResult]:
    """Passes progress on until every worker has sent its result."""
    results: dict[Pipe, WorkerResult] = {}
    ready: set[Pipe] = set()
    while len(results) < len(processes):
        for pipe in wait([pipe for pipe in processes if pipe not in results]):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except (EOFError, ConnectionResetError):  # all that the pipe knows of the worker's death
                raise _death(processes[pipe]) from None
            if isinstance(message, WorkerFailure):
                raise WorkerError(f"{processes[pipe].name}: {message.text}")
            if isinstance(message, WorkerResult):
                results[pipe] = message
                continue
            observer(message)
            if pipe not in ready:
                ready.add(pipe)
                # Workers begin only when all have a session: a quorum would close rounds without those still to come.
                if len(ready) == len(processes):
                    for other, process in processes.items():
                        _send(Begin(), other, process)
    return list(results.values())


def _death(process: SpawnProcess) -> WorkerError:
    """Returns the error for a worker that ended without a message."""
    process.join(LEAVE_SECONDS)  # the pipe closes before the exit status is known
    code = process.exitcode
    if code is not None and code < 0:
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
    else:
        how = f"ended with exit status {code} before it finished"
    return WorkerError(f"{process.name} {how}; the other workers were stopped")


def _stop(processes: Mapping[Pipe, SpawnProcess]) -> None:
    """Ends the workers that still run: they get time to close their sessions, then they are killed."""
    for process in processes.values():
        process.terminate()
    deadline = time.monotonic() + LEAVE_SECONDS
    for pipe, process in processes.items():
        # One deadline for all: many workers that hang cost no more time than one.
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
        pipe.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Blocks SIGINT, for processes started inside as well: after Ctrl+C this process tells them to leave.

    This process gets the signal at the end of the block.
    """
    # multiprocessing starts its resource tracker with the first process, and unblocks SIGINT as it does.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
