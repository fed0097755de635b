"""Compares the speed of this checkout with that of another one: `python -m benchmarks.compare OTHER_CHECKOUT`.

Both run in turns within one run, each in its own processes, so that what else the machine does affects both alike.
A ratio below 1 means that this checkout is faster. Compare the ratios; the times of two runs do not compare. On a busy
machine the ratio of the processor time, worker and server together, says more than that of the medians.
"""

import compileall
import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from benchmarks import machine, startup
from benchmarks.results import Figures
from benchmarks.timing import REST_SECONDS, collect
from benchmarks.workers import WORKLOAD_C

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("this", "other", "this / other", "fastest / fastest", "processor time / processor time", "rounds")

_B_STEPS = 100
"""Steps of workload B in a round; a round's time is their median."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often each part is measured.

    Attributes:
        large: Steps of workload A, over each transport.
        small: Blocks of steps of workload B.
        workers: Runs of workload C.
        workers_seconds: The length of one of these runs.
        starts: Starts of a server.
        imports: Imports of the client.
        large_model: The model in place of workload A's: a workload or a number of parameters.
        workers_model: The model in place of workload C's.
    """

    large: int = 31
    small: int = 41
    workers: int = 5
    workers_seconds: float = 4.0
    starts: int = 11
    imports: int = 31
    large_model: str = "a"
    workers_model: str = "c"


QUICK = Rounds(large=7, small=9, workers=2, workers_seconds=1.5, starts=3, imports=7)


@dataclass(frozen=True, slots=True)
class Checkout:
    """A working tree with the folders `client` and `server`."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of processes that run this checkout's packages, and this file's benchmarks."""
        folders = (self.root / "client", self.root / "server", ROOT)
        return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}

    def prepare(self) -> None:
        """Checks that its own packages are the ones imported, and writes their bytecode, as pip does.

        Raises:
            RuntimeError: Another copy of the client is imported.
        """
        for folder in "client", "server":
            compileall.compile_dir(self.root / folder, quiet=2)
        command = [sys.executable, "-P", "-c", "import deltaserve; print(deltaserve.__file__)"]
        imported = subprocess.check_output(command, env=self.environment, text=True).strip()
        if not Path(imported).is_relative_to(self.root):
            raise RuntimeError(f"expected the package deltaserve of {self.root}, got {imported}")


class Worker:
    """A worker process of one checkout."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid

    def send(self, command: str) -> None:
        """Starts a command of `benchmarks.compare_worker`."""
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> object:
        """Returns the answer to the last command."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}; its error is above")
        return json.loads(line)

    def median_step(self, steps: int, rest_seconds: float = 0.0) -> float:
        """Returns the median time of some steps, in seconds."""
        sleep(rest_seconds)
        self.send(f"steps {steps}")
        seconds = self.answer()
        assert isinstance(seconds, list)
        return float(statistics.median(seconds))


@contextmanager
def worker(checkout: Checkout, target: str, workload: str, transport: str) -> Iterator[Worker]:
    """Gives a worker that has joined the model of a workload and made no step yet."""
    command = [sys.executable, "-P", "-m", "benchmarks.compare_worker", target, workload, transport]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=checkout.environment, text=True) as process:
        yield Worker(process)  # the end of its input ends it


@dataclass(frozen=True, slots=True)
class Contender:
    """What is measured of one checkout: a run that returns seconds, and the processes that do its work."""

    run: Callable[[], float]
    pids: tuple[int, ...] = ()

    def processor_seconds(self) -> float:
        """Returns the processor time of its processes up to now."""
        return sum(map(machine.cpu_seconds, self.pids))


def compare(checkouts: Mapping[str, Checkout], rounds: Rounds) -> Iterator[tuple[str, tuple[float | None, ...]]]:
    """Yields the rows of the table: their names and their figures, times in milliseconds."""
    for row, count, make in (
        ("A: 25 M parameters over TCP, ms", rounds.large, partial(_alone, rounds.large_model, "tcp", 1)),
        (
            "A: 25 M parameters through shared memory, ms",
            rounds.large,
            partial(_alone, rounds.large_model, "shared memory", 1),
        ),
        ("B: 6 parameters over TCP, p50, ms", rounds.small, partial(_alone, "b", "tcp", _B_STEPS)),
        (
            f"C: {WORKLOAD_C} workers over TCP, ms a step",
            rounds.workers,
            partial(_together, rounds.workers_model, rounds.workers_seconds),
        ),
        ("start of a server until SERVING, ms", rounds.starts, _start),
        ("import deltaserve, ms", rounds.imports, _import),
    ):
        with ExitStack() as stack:
            contenders = {name: make(stack, checkout) for name, checkout in checkouts.items()}
            before = [contender.processor_seconds() for contender in contenders.values()]
            timings = collect({name: contender.run for name, contender in contenders.items()}, count)
            after = [contender.processor_seconds() for contender in contenders.values()]
            this, other = timings.values()
            used_by_this, used_by_other = (end - start for start, end in zip(before, after, strict=True))
            yield (
                row,
                (
                    this.median * 1e3,
                    other.median * 1e3,
                    this.median / other.median,
                    min(this.seconds) / min(other.seconds),
                    used_by_this / used_by_other if used_by_other else None,
                    count,
                ),
            )


def _alone(workload: str, transport: str, steps: int, stack: ExitStack, checkout: Checkout) -> Contender:
    """Returns one worker that makes some steps a round; the round's time is their median."""
    target, pid = stack.enter_context(startup.server_process(checkout.environment))
    alone = stack.enter_context(worker(checkout, target, workload, transport))
    alone.median_step(3)
    return Contender(partial(alone.median_step, steps, REST_SECONDS), (pid, alone.pid))


def _together(model: str, seconds: float, stack: ExitStack, checkout: Checkout) -> Contender:
    """Returns the workers of workload C; a round's time is that of a step, all workers counted."""
    target, _ = stack.enter_context(startup.server_process(checkout.environment))
    workers = [stack.enter_context(worker(checkout, target, model, "tcp")) for _ in range(WORKLOAD_C)]
    for one in workers:
        one.median_step(2)  # all of them must have joined before the clock starts

    def run() -> float:
        started = monotonic()
        for one in workers:
            one.send(f"until {started + seconds}")
        steps = sum(int(str(one.answer())) for one in workers)
        return (monotonic() - started) / steps

    # Processor time is left out: the round has a fixed length, so a faster checkout does more in it.
    return Contender(run)


def _start(stack: ExitStack, checkout: Checkout) -> Contender:
    return Contender(partial(startup.start_seconds, checkout.environment))


def _import(stack: ExitStack, checkout: Checkout) -> Contender:
    return Contender(partial(startup.import_seconds, "deltaserve", checkout.environment))


def main() -> None:
    """Compares, and prints each row when it is measured."""
    parser = ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="the root of the other working tree")
    parser.add_argument("--quick", action="store_true", help="about a fifth of the rounds")
    arguments = parser.parse_args()
    checkouts = {"this": Checkout(ROOT), "other": Checkout(arguments.other.resolve())}
    for checkout in checkouts.values():
        checkout.prepare()
    print(", ".join(f"{name} {value}" for name, value in machine.describe().items()), flush=True)
    rows = {}
    for row, figures in compare(checkouts, QUICK if arguments.quick else Rounds()):
        rows[row] = figures
        print(f"measured {row}", file=sys.stderr, flush=True)
    print(f"\n{Figures('compare', COLUMNS, rows).markdown()}")


if __name__ == "__main__":
    main()
