"""A training run: starts the workers' processes, watches them, and stops all that it started."""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeAlias

import deltaserve
from deltaserve_server.recipes.errors import WorkerError
from deltaserve_server.recipes.recipes import Policy, Recipe, Seat
from deltaserve_server.recipes.worker import Begin, Done, Failed, Job, Message, Progress, main

LEAVE_SECONDS = 5.0
Observer = Callable[[Progress], None]
Pipe: TypeAlias = "Connection[Job | Begin, Message]"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave.

    Attributes:
        loss: Over all training examples, with the model's weights at the end.
        accuracy: Over the test examples; None where the recipe has none.
        epoch_seconds: Of the first worker, without the time spent on measuring the loss.
        updates: By how many versions the model moved on during the run, whoever moved it.
        version: The model's version at the end.
        samples_per_second: Of all workers of the run together.
        pushes: How many gradients the run's workers computed.
        late: How many of them came too late to count.
        passed: Batches that workers left out besides, because their rounds had closed meanwhile.
        curve: (epoch, loss) as the first worker measured it.
    """

    loss: float
    accuracy: float | None
    epoch_seconds: float
    updates: int
    version: int
    samples_per_second: float
    pushes: int
    late: int
    passed: int
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
) -> Outcome:
    """Trains with worker processes against a server.

    Args:
        recipe: What is learned.
        target: The server, `host:port`.
        model: The model's name; None means the recipe's. The first worker creates it, the others join, and so does a
            later run.
        workers: Number of processes.
        policy: Of the model.
        elastic: The one worker is on its own among workers of other runs (see Job).
        timeout_seconds: How long a worker's call may take, with all its retries.
        observer: Told of each worker's progress, in this thread.

    Raises:
        WorkerError: a worker ended before its work was done; the others have been stopped.
        deltaserve.Error: the server cannot be reached.
    """
    seat = Seat(target=target, model=model or recipe.name, policy=policy, timeout_seconds=timeout_seconds)
    with deltaserve.connect(target, timeout_seconds=timeout_seconds) as client:
        before = _version(client, seat.model)
        jobs = [
            Job(recipe=recipe, seat=seat, worker=worker, workers=workers, elastic=elastic) for worker in range(workers)
        ]
        done = _work(jobs, observer or (lambda progress: None))
        state = client.model(seat.model).pull_state(optimizer_state=False)
    return _outcome(recipe, done, state, before)


def _version(client: deltaserve.Client, model: str) -> int:
    """Returns a model's version; 0 where there is no such model yet."""
    return next((summary.version for summary in client.models() if summary.name == model), 0)


def _outcome(recipe: Recipe, done: Sequence[Done], state: deltaserve.ModelState, before: int) -> Outcome:
    first = min(done, key=lambda one: one.worker)
    seconds = max(one.ended for one in done) - min(one.started for one in done)
    return Outcome(
        loss=recipe.loss(state.weights),
        accuracy=recipe.accuracy(state.weights),
        epoch_seconds=first.training_seconds / recipe.epochs,
        updates=state.version - before,
        version=state.version,
        samples_per_second=sum(one.samples for one in done) / seconds,
        pushes=sum(one.pushes for one in done),
        late=sum(one.late for one in done),
        passed=sum(one.passed for one in done),
        curve=first.curve,
    )


def _work(jobs: Sequence[Job], observer: Observer) -> list[Done]:
    """Runs a process for each job until all are done. Whatever happens, none is left behind."""
    processes: dict[Pipe, SpawnProcess] = {}
    try:
        with _without_interrupts():
            for job in jobs:
                pipe, process = _start(f"worker {job.worker}")
                processes[pipe] = process
        for job, (pipe, process) in zip(jobs, processes.items(), strict=True):
            _send(job, pipe, process)
        done = _follow(processes, observer)
        for process in processes.values():  # a signal could break into its end, and leave a traceback
            process.join(LEAVE_SECONDS)
        return done
    finally:
        _stop(processes)


def _start(name: str) -> tuple[Pipe, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs,), name=name, daemon=True)
    process.start()
    # Ours is the only end left, so that a worker's death shows as the end of its pipe.
    theirs.close()
    return ours, process


def _send(message: Job | Begin, pipe: Pipe, process: SpawnProcess) -> None:
    """Sends a worker its job, which is too large for the arguments: `start` would hang if the worker died meanwhile."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(process) from None


def _follow(processes: Mapping[Pipe, SpawnProcess], observer: Observer) -> list[Done]:
    done: dict[Pipe, Done] = {}
    ready: set[Pipe] = set()
    while len(done) < len(processes):
        for pipe in wait([pipe for pipe in processes if pipe not in done]):
            assert isinstance(pipe, Connection)
            message = _receive(pipe, processes[pipe])
            if isinstance(message, Done):
                done[pipe] = message
                continue
            observer(message)
            if pipe not in ready:
                ready.add(pipe)
                _begin(ready, processes)
    return list(done.values())


def _begin(ready: AbstractSet[Pipe], processes: Mapping[Pipe, SpawnProcess]) -> None:
    """Lets the workers begin when all have their sessions: a round that is full without the others awaits nobody."""
    if len(ready) == len(processes):
        for pipe, process in processes.items():
            _send(Begin(), pipe, process)


def _receive(pipe: Pipe, process: SpawnProcess) -> Progress | Done:
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise _death(process) from None
    if isinstance(message, Failed):
        raise WorkerError(f"{process.name}: {message.text}")
    return message


def _death(process: SpawnProcess) -> WorkerError:
    """Returns the error that tells how a worker ended which has not told so itself."""
    process.join(LEAVE_SECONDS)
    code = process.exitcode
    if code is not None and code < 0:
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
    else:
        how = f"ended with exit status {code} before its work was done"
    return WorkerError(f"{process.name} {how}; the others were stopped")


def _stop(processes: Mapping[Pipe, SpawnProcess]) -> None:
    """Asks those still running to leave, gives them time to close their sessions, kills the rest."""
    for process in processes.values():
        process.terminate()
    deadline = time.monotonic() + LEAVE_SECONDS
    for pipe, process in processes.items():
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
        pipe.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Blocks SIGINT for processes started inside: on Ctrl+C they leave when the parent tells them, in good order.

    Here the signal is only put off until the end of the block.
    """
    # multiprocessing starts this helper with the first process and unblocks SIGINT as it does.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
