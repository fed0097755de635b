"""One worker's process: trains, and tells the parent about it over a pipe."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import FrameType

import deltaserve
from deltaserve_server.recipes.batches import Plan, Share
from deltaserve_server.recipes.recipes import Learner, Recipe, Seat

REPORT_EVERY_SECONDS = 0.05


@dataclass(frozen=True)
class Begin:
    """Says to a worker that all workers of its run have their sessions."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker is to do.

    Attributes:
        recipe: What is learned.
        seat: Where.
        worker: This worker's number among those of this run, from 0.
        workers: How many there are in this run.
        elastic: The worker is the only one of this run, among workers of other runs: it takes its examples in an order
            of its own, drawn from its rank, so that not all of them compute the same.
    """

    recipe: Recipe
    seat: Seat
    worker: int
    workers: int
    elastic: bool

    @property
    def synchronous(self) -> bool:
        """Whether others wait for each push, also for that of a share without examples."""
        return isinstance(self.seat.policy, deltaserve.Sync)

    def plan(self, rank: int) -> Plan:
        """Returns how the examples are dealt out, given the rank of the worker's session."""
        recipe = self.recipe
        return Plan(
            examples=len(recipe.train),
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            seed=(recipe.seed, rank + 1) if self.elastic else (recipe.seed,),
            worker=self.worker,
            workers=self.workers,
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a worker is.

    Attributes:
        loss: The last that it measured; None before the first, and of workers that do not.
        late: How many batches went by without it, because it was too slow.
    """

    worker: int
    step: int
    steps: int
    loss: float | None
    late: int = 0


@dataclass(frozen=True, kw_only=True)
class Done:
    """A worker's work is done.

    Attributes:
        started, ended: Of the first and the last step, on the monotonic clock that all processes share.
        training_seconds: Between them, without the time spent on measuring the loss.
        samples: Examples that went into those of this worker's gradients that count.
        pushes: How many gradients it has computed.
        late: How many of them came too late to count.
        passed: Batches that it left out besides, because their rounds had closed meanwhile.
        curve: (epoch, loss), where this worker measured it.
    """

    worker: int
    started: float
    ended: float
    training_seconds: float
    samples: int
    pushes: int
    late: int
    passed: int
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A worker gave up; `text` is one line for the user."""

    text: str


Message = Progress | Done | Failed


@dataclass
class Watch:
    """A stopwatch that stands still while the loss is measured, and the curve of what was measured.

    Attributes:
        recipe: Whose loss.
        epoch_examples: Examples of an epoch.
        measures: Whether this worker measures at all; one of a run is enough.
    """

    recipe: Recipe
    epoch_examples: int
    measures: bool
    seen: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    def after(self, share: Share, learner: Learner, last: bool) -> None:
        """Counts a step's batch; measures the loss when due, and after the last step."""
        before, self.seen = self.seen, self.seen + share.batch
        every = self.recipe.evaluate_every or self.epoch_examples
        if self.measures and (last or before // every != self.seen // every):
            self.seconds += time.monotonic() - self._since
            self.curve.append((self.seen / self.epoch_examples, self.recipe.loss(learner.weights)))
            self._since = time.monotonic()

    def stop(self) -> float:
        """Returns the seconds in all, without those of measuring."""
        self.seconds += time.monotonic() - self._since
        return self.seconds

    @property
    def loss(self) -> float | None:
        """The last loss that was measured."""
        return self.curve[-1][1] if self.curve else None


@dataclass
class Trainer:
    """Does a job's steps, and counts what became of them.

    In a synchronous run a batch belongs to a round: a worker that was too slow for some goes on with the batch of the
    round that is open, so that all are done at the same time and none waits for others that have left.
    """

    job: Job
    learner: Learner
    samples: int = 0
    pushes: int = 0
    late: int = 0
    passed: int = 0

    def __post_init__(self) -> None:
        self._first_version = self.learner.version
        self._in_step = self.job.synchronous and not self.job.elastic

    def take(self, step: int, share: Share) -> None:
        """Takes the step with this number, from 1, or passes over its batch."""
        if self._in_step and self.learner.version - self._first_version >= step and self._by_rounds():
            self.passed += 1
        elif len(share.rows) or self.job.synchronous:
            self.pushes += 1
            if self._pushed(share):
                self.samples += len(share.rows)
            else:
                self.late += 1

    def _by_rounds(self) -> bool:
        """Whether versions still count rounds: another may have changed the policy."""
        self._in_step = isinstance(self.learner.model.info().policy, deltaserve.Sync)
        return self._in_step

    def _pushed(self, share: Share) -> bool:
        """Makes the step, again where its round has failed for want of other workers; returns whether it counts."""
        deadline = time.monotonic() + self.job.seat.timeout_seconds
        while True:
            try:
                return self.learner.step(share)
            except deltaserve.UnavailableError as error:
                if error.reason != "ROUND_FAILED" or time.monotonic() > deadline:
                    raise


def train(job: Job, tell: Callable[[Message], None], begin: Callable[[], object] = lambda: None) -> None:
    """Does a job in this process.

    Args:
        job: What to do.
        tell: Called with each message; the first is of step 0, the last is Done.
        begin: Called before the first step; returns when the other workers of the run have their sessions too.

    Raises:
        deltaserve.Error: the server refused, or was lost.
    """
    with job.recipe.learner(job.seat) as learner:
        plan = job.plan(learner.rank)
        tell(Progress(worker=job.worker, step=0, steps=plan.steps, loss=None))
        begin()
        told = started = time.monotonic()
        trainer, watch = Trainer(job, learner), Watch(job.recipe, plan.examples, measures=job.worker == 0)
        for step, share in enumerate(plan.shares(), start=1):
            trainer.take(step, share)
            watch.after(share, learner, last=step == plan.steps)
            if time.monotonic() - told > REPORT_EVERY_SECONDS or step == plan.steps:
                told = time.monotonic()
                late = trainer.late + trainer.passed
                tell(Progress(worker=job.worker, step=step, steps=plan.steps, loss=watch.loss, late=late))
        ended, training_seconds = time.monotonic(), watch.stop()
    tell(
        Done(
            worker=job.worker,
            started=started,
            ended=ended,
            training_seconds=training_seconds,
            samples=trainer.samples,
            pushes=trainer.pushes,
            late=trainer.late,
            passed=trainer.passed,
            curve=tuple(watch.curve),
        )
    )


def main(pipe: "Connection[Message, Job | Begin]") -> None:
    """Entry point of a worker's process; job and Begin come over the pipe. Exit status: 0 if all is done, else 1."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        job = pipe.recv()
        assert isinstance(job, Job)
        failure = _failure(job, pipe.send, pipe.recv)
        if failure is not None:
            pipe.send(failure)
            sys.exit(1)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone, and with it whoever wanted to know.
        sys.exit(1)
    finally:
        # From here on this process ends by itself; a signal would only break into the interpreter's own end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _failure(job: Job, tell: Callable[[Message], None], begin: Callable[[], object]) -> Failed | None:
    """Does a job; returns what went wrong with it."""
    try:
        train(job, tell, begin)
    except deltaserve.Error as error:
        text = str(error) + _advice(job, error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        return None
    return Failed(text=" ".join(text.split()))


def _advice(job: Job, error: deltaserve.Error) -> str:
    if error.reason != "MODEL_MISMATCH":
        return ""
    seat = job.seat
    return f": choose another --model, or delete that one: deltaserve delete {seat.model} --target {seat.target}"


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends by unwinding, so that the session is closed and nobody waits for its lease."""
    # A second signal must not cut the closing short: who is in a hurry uses SIGKILL.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def _follow_parent() -> None:
    """Ends this process when the one that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
