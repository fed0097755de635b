"""How long a dead worker holds a round: one is killed or stopped at a place of its step, another one measures.

Prints a line for each place; the status is 1 where a hold lasted longer than the lease, or the round's timeout, allows.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import NamedTuple

import numpy as np

import deltaserve
from deltaserve import Sync

LEASE_SECONDS = 1.0
TIMEOUT_SECONDS = 0.4

_TICK_SECONDS = 0.25
_MARGIN_SECONDS = 0.75
"""Of a machine that is busy with several of these at once."""

_TRIALS = 3
"""A machine that stood still for a moment does not do so again; a defect does."""

_POINTS = ("worker.before_send", "worker.mid_body", "worker.sent", "worker.acknowledged", "worker.recorded")
_ELEMENTS = 300_000

_VICTIM = """
import sys
import numpy as np, deltaserve
target, model, lease, elements = sys.argv[1:]
gradient = {"w": np.ones(int(elements), np.float32)}
with deltaserve.connect(target) as client, client.model(model).worker("victim", lease_seconds=float(lease)) as worker:
    while True:
        try:
            worker.step(gradient)
        except deltaserve.StaleGradientError:
            pass
"""


class Cell(NamedTuple):
    """What is tried: a fault of the victim, and whether rounds have a timeout."""

    point: str
    action: str
    timed: bool

    @property
    def policy(self) -> Sync:
        return Sync(round_timeout_seconds=TIMEOUT_SECONDS if self.timed else None)

    @property
    def bound(self) -> float:
        """How long a round may be held, in seconds."""
        return TIMEOUT_SECONDS if self.timed else LEASE_SECONDS + _TICK_SECONDS

    @property
    def text(self) -> str:
        return f"{self.point} {self.action}, {'round_timeout' if self.timed else 'lease'}"


class _Victim:
    """A worker that dies or stops; `at` says when, once it has, and `failed` that it ended in another way."""

    def __init__(self, target: str, model: str, cell: Cell) -> None:
        self.at: float | None = None
        self.failed = False
        environment = {"DELTASERVE_FAILPOINTS": f"{cell.point}={cell.action}@3"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, target, model, str(LEASE_SECONDS), str(_ELEMENTS)],
            env=os.environ | environment,
        )
        Thread(target=self._wait, daemon=True).start()

    def close(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _wait(self) -> None:
        became = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        at = monotonic()
        if became and became.si_status in (signal.SIGKILL, signal.SIGSTOP):
            self.at = at
        else:
            self.failed = True


def hold(target: str, number: str, cell: Cell) -> float:
    """Returns how long a round still waited for the victim after its death or stop, in seconds."""
    name, gradient = f"{cell.point}.{cell.action}.{cell.timed}.{number}", {"w": np.ones(_ELEMENTS, np.float32)}
    with ExitStack() as stack:
        client = stack.enter_context(deltaserve.connect(target, timeout_seconds=30))
        model = client.create_model(name, gradient, policy=cell.policy)
        stack.callback(model.delete)
        survivor = stack.enter_context(model.worker("survivor"))
        victim = _Victim(target, name, cell)
        stack.callback(victim.close)
        while True:
            began = monotonic()
            survivor.step(gradient)
            result, at = survivor.last_result, victim.at
            if victim.failed:
                raise RuntimeError(f"{cell.text}: the victim failed by itself")
            if at is not None and result and result.contributors == 1:
                return monotonic() - max(at, began)


def least_hold(target: str, number: int, cell: Cell) -> float:
    """Returns the same, measured again where it is longer than allowed."""
    least = hold(target, f"{number}", cell)
    for again in range(1, _TRIALS):
        if least <= cell.bound + _MARGIN_SECONDS:
            break
        least = min(least, hold(target, f"{number}.{again}", cell))
    return least


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often each of them")
    parser.add_argument("--jobs", type=int, default=7, help="how many at a time")
    options = parser.parse_args(arguments)
    cells = [Cell(point, action, timed) for point in _POINTS for action in ("kill", "stop") for timed in (False, True)]
    program = Path(__file__).with_name("server_program.py")
    server = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout
    target = server.stdout.readline().strip()
    held: dict[Cell, list[float]] = defaultdict(list)
    try:
        with ThreadPoolExecutor(options.jobs) as threads:
            trials = [(number, cell) for number in range(options.rounds) for cell in cells]
            for (_, cell), seconds in zip(trials, threads.map(lambda t: least_hold(target, *t), trials), strict=True):
                held[cell].append(seconds)
    finally:
        server.kill()
        server.communicate()
    print(f"{'held a round, in seconds':45} {'trials':>6} {'bound':>6} {'median':>6} {'most':>6}")
    for cell, seconds_of in held.items():
        median, most = statistics.median(seconds_of), max(seconds_of)
        print(f"{cell.text:45} {len(seconds_of):6} {cell.bound:6.2f} {median:6.2f} {most:6.2f}")
    return int(any(max(seconds_of) > cell.bound + _MARGIN_SECONDS for cell, seconds_of in held.items()))


if __name__ == "__main__":
    sys.exit(main())
