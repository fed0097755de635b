"""The process of one worker: it trains, and reports to the parent over a pipe."""

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
from deltaserve_server.recipes.batches import BatchPlan, WorkerBatch
from deltaserve_server.recipes.recipe import JoinOptions, Learner, Recipe

REPORT_SECONDS = 0.05  # a step may take less than a millisecond: a report of each would slow it down


@dataclass(frozen=True)
class Begin:
    """Tells a worker that all workers of its run have a session."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of one worker.

    Attributes:
        worker: Index of this worker in its run, from 0.
        elastic: This worker is the only one of its run and trains beside workers of other runs. Its rank then decides
            the order of its examples, so that two workers do not compute the same gradients.
    """

    recipe: Recipe
    join: JoinOptions
    worker: int
    workers: int
    elastic: bool

    @property
    def synchronous(self) -> bool:
        """Whether other workers wait for each push, even for one of an empty batch."""
        return isinstance(self.join.policy, deltaserve.Sync)

    def plan(self, rank: int) -> BatchPlan:
        """Returns the batches of this worker, whose session has the given rank."""
        recipe = self.recipe
        return BatchPlan(
            examples=len(recipe.train),
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            # + 1, because numpy draws the same numbers from (seed, 0) as from (seed,).
            seed=(recipe.seed, rank + 1) if self.elastic else (recipe.seed,),
            worker=self.worker,
            workers=self.workers,
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a worker is.

    Attributes:
        step: Number of steps that are done, of `steps` in all.
        loss: The loss that was measured last; None before the first measurement and for workers that do not measure.
        late: Number of batches that do not count because this worker was too slow.
    """

    worker: int
    step: int
    steps: int
    loss: float | None
    late: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What a worker did; its last message.

    Attributes:
        started: When the first step started, in seconds of the monotonic clock, which all processes share.
        ended: When the last step ended, on the same clock.
        training_seconds: The time between the two, without the measurements of the loss.
        samples: Number of examples in the gradients that the server applied.
        pushes: Number of gradients that were computed.
        late: Number of these gradients that arrived too late.
        skipped: Number of batches without a gradient, because their rounds had closed.
        curve: Pairs of epoch and loss; empty for workers that do not measure.
    """

    worker: int
    started: float
    ended: float
    training_seconds: float
    samples: int
    pushes: int
    late: int
    skipped: int
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """Why a worker gave up, in one line for the user; its last message."""

    text: str


Message = Progress | WorkerResult | WorkerFailure


@dataclass
class LossRecorder:
    """Measures the loss now and then, and the time spent on everything else.

    Attributes:
        epoch_examples: Number of examples in an epoch.
        measures: Whether this worker measures the loss; one worker of a run is enough.
        seen: Number of examples in the batches so far, of all workers.
        seconds: Training time before the last measurement.
        curve: Pairs of epoch and loss.
    """

    recipe: Recipe
    epoch_examples: int
    measures: bool
    seen: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    def after(self, batch: WorkerBatch, learner: Learner, last: bool) -> None:
        """Counts a batch, and measures the loss if it is due or the batch is the last one."""
        before, self.seen = self.seen, self.seen + batch.batch_examples
        every = self.recipe.evaluate_every or self.epoch_examples
        # A batch may step over a multiple of `every`, so the remainder is rarely 0.
        if self.measures and (last or before // every != self.seen // every):
            self.seconds += time.monotonic() - self._since
            self.curve.append((self.seen / self.epoch_examples, self.recipe.loss(learner.weights)))
            self._since = time.monotonic()

    def stop(self) -> float:
        """Returns the training time in seconds, without the measurements."""
        self.seconds += time.monotonic() - self._since
        return self.seconds

    @property
    def loss(self) -> float | None:
        """The loss that was measured last."""
        return self.curve[-1][1] if self.curve else None


@dataclass
class Trainer:
    """Runs the steps of a job and counts their outcomes.

    In a synchronous run each batch belongs to a round. A worker that missed rounds skips their batches and continues
    with the batch of the open round. All workers then finish together, and none waits for others that have left.
    """

    job: Job
    learner: Learner
    samples: int = 0
    pushes: int = 0
    late: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self._first_version = self.learner.version
        # Workers of other runs start at other versions: for them a version does not tell the batch.
        self._follows_rounds = self.job.synchronous and not self.job.elastic

    def take(self, step: int, batch: WorkerBatch) -> None:
        """Runs step number `step`, counted from 1, or skips its batch."""
        if self._follows_rounds and self.learner.version - self._first_version >= step:
            # Asked only now, because it is a call: under a policy that somebody has chosen meanwhile no rounds count.
            self._follows_rounds = isinstance(self.learner.model.info().policy, deltaserve.Sync)
            if self._follows_rounds:
                self.skipped += 1
                return
        if len(batch.rows) or self.job.synchronous:
            self.pushes += 1
            if self._push(batch):
                self.samples += len(batch.rows)
            else:
                self.late += 1

    def _push(self, batch: WorkerBatch) -> bool:
        """Makes the step, and repeats it while its round fails for lack of workers; returns whether it counts."""
        deadline = time.monotonic() + self.job.join.timeout_seconds
        while True:
            try:
                return self.learner.step(batch)
            except deltaserve.UnavailableError as error:
                # A worker of this run may still be on its way. Any other reason has outlived the client's own retries.
                if error.reason != "ROUND_FAILED" or time.monotonic() > deadline:
                    raise


def train(job: Job, report: Callable[[Message], None], begin: Callable[[], object] = lambda: None) -> None:
    """Does a job in this process.

    Args:
        job: What to do.
        report: Called with each message; the first one is the progress at step 0, the last one the result.
        begin: Called before the first step; returns when the other workers of the run have a session too.

    Raises:
        deltaserve.Error: The server refused a call or cannot be reached.
    """
    with job.recipe.learner(job.join) as learner:
        plan = job.plan(learner.rank)
        report(Progress(worker=job.worker, step=0, steps=plan.steps, loss=None))
        begin()  # the clock starts after it: imports of the other workers are no training
        reported = started = time.monotonic()
        trainer, recorder = Trainer(job, learner), LossRecorder(job.recipe, plan.examples, measures=job.worker == 0)
        for step, batch in enumerate(plan.batches(), start=1):
            trainer.take(step, batch)
            recorder.after(batch, learner, last=step == plan.steps)
            if time.monotonic() - reported > REPORT_SECONDS or step == plan.steps:
                reported = time.monotonic()
                late = trainer.late + trainer.skipped
                report(Progress(worker=job.worker, step=step, steps=plan.steps, loss=recorder.loss, late=late))
        ended, training_seconds = time.monotonic(), recorder.stop()
    report(
        WorkerResult(
            worker=job.worker,
            started=started,
            ended=ended,
            training_seconds=training_seconds,
            samples=trainer.samples,
            pushes=trainer.pushes,
            late=trainer.late,
            skipped=trainer.skipped,
            curve=tuple(recorder.curve),
        )
    )


def main(pipe: "Connection[Message, Job | Begin]") -> None:
    """Runs a worker's process, which gets its job over the pipe; exits with status 0 if the job is done, else 1."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()  # SIGKILL leaves the parent no time to stop workers
    try:
        job = pipe.recv()
        assert isinstance(job, Job)
        failure = _failure(job, pipe.send, pipe.recv)
        if failure is not None:
            pipe.send(failure)
            sys.exit(1)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # the parent is gone, so there is nobody to report to
    finally:
        # The process now ends by itself; a signal would only interrupt the interpreter's shutdown and print an error.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _failure(job: Job, report: Callable[[Message], None], begin: Callable[[], object]) -> WorkerFailure | None:
    """Does a job; returns why it failed, or None."""
    try:
        train(job, report, begin)
    except deltaserve.Error as error:
        text = str(error)
        if error.reason == "MODEL_MISMATCH":
            join = job.join
            text += f": choose another --model, or delete that one: deltaserve delete {join.model} "
            text += f"--target {join.target}"
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent's end of the pipe, for `main`
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        return None
    # An exception itself may not survive the pipe: it may hold what cannot be pickled.
    return WorkerFailure(text=" ".join(text.split()))


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process by an exception, so that the session closes and nobody waits for its lease to expire."""
    # A second signal must not interrupt the closing of the session; SIGKILL still ends the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, for whatever reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # an exception in the main thread, which closes the session
