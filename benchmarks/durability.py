"""The cost of durability: a step under every durability, beside raw writes to the disk; and recovery."""

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier
from time import perf_counter, sleep

import numpy as np

import deltaserve
from benchmarks.models import SHAPES_A, SHAPES_B, Shape, elements, gradients_of, named, weights_of
from benchmarks.results import Figures, Timings
from benchmarks.startup import listening
from benchmarks.timing import collect

NONE, SNAPSHOT, JOURNAL, FSYNC = "none", "snapshot", "journal", "fsync"
WRITE, WRITE_AND_SYNC = "the gradient written to a file", "the same, with fsync"
FIRST_PUSH = "server process to the first accepted push"

_EVERY = 50
_BLOCK = 50
"""Steps of a block. It contains one snapshot, which starts in the middle, so that it ends within the block."""

_JOURNAL_BLOCK = 24
"""Steps of a block with a journal: enough to contain the snapshots that rotate the journal, as training does."""

_PART = 1 << 20
_DISK = "/var/tmp"  # noqa: S108  the names in it are random
"""A folder on a disk; /tmp may be in memory."""

_PATIENCE_SECONDS = 120.0


class _Program:
    """A process of `deltaserve serve` with its own data directory."""

    def __init__(self, folder: str, durability: str, *options: str) -> None:
        # Bound until `close` but not listening: nobody else gets the port while the server is down.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._port.getsockname()[1]}"
        command = f"-m deltaserve serve --bind {self.target} --device cpu --log-level warning --durability {durability}"
        kept = [] if durability == NONE else ["--data-dir", str(Path(folder) / durability)]
        self._command = [sys.executable, *command.split(), *kept, *options]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        try:
            listening(self.target, self._process)
        except BaseException:
            self.signal(signal.SIGKILL)
            raise

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal and waits until the process has ended."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
        self._process.wait()

    def close(self) -> None:
        """Stops the server and frees its port."""
        self.signal(signal.SIGTERM)
        self._port.close()

    @property
    def written_bytes(self) -> int:
        """Number of bytes that the process has written to files."""
        lines = Path(f"/proc/{self._process.pid}/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("write_bytes")))


@contextmanager
def _training(durability: str, shapes: Sequence[Shape], *options: str) -> Iterator[tuple[_Program, "_Training"]]:
    with TemporaryDirectory(prefix="deltaserve-", dir=_DISK) as folder:
        program = _Program(folder, durability, *options)
        try:
            with deltaserve.connect(program.target, timeout_seconds=_PATIENCE_SECONDS) as client:
                yield program, _Training(client, shapes)
        finally:
            program.close()


class _Training:
    """A worker that pushes the same gradient in every step, over TCP."""

    def __init__(self, client: deltaserve.Client, shapes: Sequence[Shape]) -> None:
        self.model = client.create_model("bench", named(weights_of(shapes)))
        self._worker = self.model.worker(transport="stream")
        self._gradients = named(gradients_of(shapes))

    def step(self) -> None:
        self._worker.step(self._gradients)

    def block(self, count: int) -> float:
        """Returns the mean duration of `count` steps, in seconds."""
        started = perf_counter()
        for _ in range(count):
            self.step()
        return (perf_counter() - started) / count


def snapshots(rounds: int, shapes: Sequence[Shape] = SHAPES_A) -> Timings:
    """Times steps with and without a snapshot every 50 updates, in alternating blocks of 50 steps."""
    with ExitStack() as stack:
        _, plain = stack.enter_context(_training(NONE, shapes))
        options = "--snapshot-updates", str(_EVERY), "--snapshot-seconds", "0"
        _, kept = stack.enter_context(_training(SNAPSHOT, shapes, *options))
        for training in (plain, kept):
            training.block(_BLOCK // 2)
        rows = collect({NONE: lambda: plain.block(_BLOCK), SNAPSHOT: lambda: kept.block(_BLOCK)}, rounds, warmups=1)
    title = f"durability: a step of {elements(shapes) / 1e6:.3g} M parameters, a snapshot every {_EVERY} updates"
    return Timings(title, NONE, rows, notes=("A round is the mean of 50 steps, with one snapshot.",))


def journals(rounds: int, shapes: Sequence[Shape] = SHAPES_A) -> Timings:
    """Times steps with a journal, in blocks that alternate with raw writes of the gradient."""
    with ExitStack() as stack:
        trainings = {name: stack.enter_context(_training(name, shapes)) for name in (NONE, JOURNAL, FSYNC)}
        disk = stack.enter_context(_disk(elements(shapes) * 4))
        contenders: dict[str, Callable[[], float]] = {
            name: lambda training=training: training.block(_JOURNAL_BLOCK)  # type: ignore[misc]
            for name, (_, training) in trainings.items()
        }
        contenders |= {WRITE: lambda: disk(False), WRITE_AND_SYNC: lambda: disk(True)}
        before = {name: program.written_bytes for name, (program, _) in trainings.items()}
        rows = collect(contenders, rounds, warmups=1)
        steps = (rounds + 1) * _JOURNAL_BLOCK
        written = [
            f"{name} {(program.written_bytes - before[name]) / steps / 1e6:.0f} MB"
            for name, (program, _) in trainings.items()
        ]
    title = f"durability: a step of {elements(shapes) / 1e6:.3g} M parameters, journalled"
    notes = (
        f"A round is the mean of {_JOURNAL_BLOCK} steps; snapshots, which cut the journal, are part of it.",
        f"Written to the disk a step: {', '.join(written)}.",
    )
    return Timings(title, NONE, rows, notes=notes)


@contextmanager
def _disk(size: int) -> Iterator[Callable[[bool], float]]:
    """Yields a function that writes a block of gradients of `size` bytes to a file; it returns the seconds per write.

    A block, because a disk that is written to for long is slower than the page cache in front of it.
    """
    data = memoryview(np.random.default_rng(0).bytes(size))

    def run(sync: bool) -> float:
        with TemporaryDirectory(prefix="deltaserve-", dir=_DISK) as folder:
            file = os.open(Path(folder) / "file", os.O_WRONLY | os.O_CREAT)
            started = perf_counter()
            for start in range(0, _JOURNAL_BLOCK * size, size):
                os.posix_fallocate(file, start, size)
                for at in range(0, size, _PART):
                    os.pwrite(file, data[at : at + _PART], start + at)
                if sync:
                    os.fsync(file)
            seconds = (perf_counter() - started) / _JOURNAL_BLOCK
            os.close(file)
        return seconds

    yield run


def group_commit(rounds: int, seconds: float, counts: Sequence[int] = (1, 4, 16)) -> Figures:
    """Measures the steps per second of several asynchronous workers of a small model, under every durability."""
    columns = tuple(f"{count} worker{'s' * (count > 1)}" for count in counts)
    found: dict[str, list[list[float]]] = {name: [] for name in (NONE, JOURNAL, FSYNC)}
    with ExitStack() as stack:
        trainings = {name: stack.enter_context(_training(name, SHAPES_B)) for name in found}
        for _ in range(rounds):
            for name, (program, _) in trainings.items():
                found[name].append([_rate(program.target, count, seconds) for count in counts])
    rows: dict[str, tuple[float | None, ...]] = {
        name: tuple(statistics.median(rates) for rates in zip(*values, strict=True)) for name, values in found.items()
    }
    rows["fsync of a page, one after the other"] = (_syncs(seconds), *[None] * (len(counts) - 1))
    return Figures(f"durability: steps a second of {elements(SHAPES_B)} parameters, by workers", columns, rows)


def _rate(target: str, count: int, seconds: float) -> float:
    """Returns the steps per second of `count` workers together, which are threads of this process."""
    gradients = named(gradients_of(SHAPES_B))
    rates, all_there = [0.0] * count, Barrier(count, timeout=60)

    def run(index: int) -> None:
        with deltaserve.connect(target) as client, client.model("bench").worker() as worker:
            worker.pull()
            all_there.wait()
            steps, begin = 0, perf_counter()
            while (took := perf_counter() - begin) < seconds or not steps:
                worker.step(gradients)
                steps += 1
            rates[index] = steps / took

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(run, range(count)))
    return sum(rates)


def _syncs(seconds: float) -> float:
    count, deadline = 0, perf_counter() + seconds
    with TemporaryDirectory(prefix="deltaserve-", dir=_DISK) as folder:
        file = os.open(Path(folder) / "file", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(file, 0, 1 << 24)
        while perf_counter() < deadline:
            os.pwrite(file, b"x" * 512, 512 * count % (1 << 24))
            os.fsync(file)
            count += 1
        os.close(file)
    return count / seconds


def recovery(rounds: int, shapes: Sequence[Shape] = SHAPES_A) -> Timings:
    """Times a recovery, from the start of a server after SIGKILL to the first accepted push.

    The worker retries by itself. The length of the journal at each kill is random.
    """
    chance = random.Random(1)  # noqa: S311  decides times only
    with _training(JOURNAL, shapes) as (program, training):

        def run() -> float:
            for _ in range(chance.randint(1, 12)):
                training.step()
            sleep(chance.uniform(0, 0.3))
            program.signal(signal.SIGKILL)
            started = perf_counter()
            program.start()
            training.step()
            return perf_counter() - started

        rows = collect({FIRST_PUSH: run}, rounds, warmups=1)
    title = f"durability: a server of {elements(shapes) / 1e6:.3g} M parameters, journalled, comes back after SIGKILL"
    return Timings(title, FIRST_PUSH, rows, "s", notes=("The push itself, and the weights back, are part of it.",))
