"""Measures how long a dead worker holds a round: one worker is killed or stopped in its step, another one measures.

Prints a line for each failpoint. The exit status is 1 if a hold exceeds the lease or the timeout of rounds.
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
"""Tolerance for a machine that runs several trials at once."""

_TRIALS = 3
"""Trials of a case whose hold is too long: a stall of the machine is rare, and a defect shows each time."""

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


class Case(NamedTuple):
    """A case: the fault of the victim, and whether rounds have a timeout."""

    point: str
    action: str
    timed: bool

    @property
    def policy(self) -> Sync:
        return Sync(round_timeout_seconds=TIMEOUT_SECONDS if self.timed else None)

    @property
    def bound(self) -> float:
        """Largest allowed hold, in seconds."""
        return TIMEOUT_SECONDS if self.timed else LEASE_SECONDS + _TICK_SECONDS

    @property
    def text(self) -> str:
        return f"{self.point} {self.action}, {'round_timeout' if self.timed else 'lease'}"


class _Victim:
    """A worker that dies or stops: `at` is the time, and `failed` says that it ended in another way."""

    def __init__(self, target: str, model: str, case: Case) -> None:
        self.at: float | None = None
        self.failed = False
        environment = {"DELTASERVE_FAILPOINTS": f"{case.point}={case.action}@3"}
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


def hold(target: str, number: str, case: Case) -> float:
    """Returns how long a round waited for the victim after its death or stop, in seconds."""
    name, gradient = f"{case.point}.{case.action}.{case.timed}.{number}", {"w": np.ones(_ELEMENTS, np.float32)}
    with ExitStack() as stack:
        client = stack.enter_context(deltaserve.connect(target, timeout_seconds=30))
        model = client.create_model(name, gradient, policy=case.policy)
        stack.callback(model.delete)
        survivor = stack.enter_context(model.worker("survivor"))
        victim = _Victim(target, name, case)
        stack.callback(victim.close)
        while True:
            began = monotonic()
            survivor.step(gradient)
            result, at = survivor.last_result, victim.at
            if victim.failed:
                raise RuntimeError(f"{case.text}: the victim ended without its fault")
            if at is not None and result and result.contributors == 1:
                return monotonic() - max(at, began)


def least_hold(target: str, number: int, case: Case) -> float:
    """Returns the shortest of up to three holds; it measures again only if a hold is too long."""
    least = hold(target, f"{number}", case)
    for again in range(1, _TRIALS):
        if least <= case.bound + _MARGIN_SECONDS:
            break
        least = min(least, hold(target, f"{number}.{again}", case))
    return least


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="trials of each case")
    parser.add_argument("--jobs", type=int, default=7, help="trials at a time")
    options = parser.parse_args(arguments)
    cases = [Case(point, action, timed) for point in _POINTS for action in ("kill", "stop") for timed in (False, True)]
    program = Path(__file__).with_name("server_program.py")
    server = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout
    target = server.stdout.readline().strip()
    held: dict[Case, list[float]] = defaultdict(list)
    try:
        with ThreadPoolExecutor(options.jobs) as threads:
            trials = [(number, case) for number in range(options.rounds) for case in cases]
            for (_, case), seconds in zip(trials, threads.map(lambda t: least_hold(target, *t), trials), strict=True):
                held[case].append(seconds)
    finally:
        server.kill()
        server.communicate()
    print(f"{'held a round, in seconds':45} {'trials':>6} {'bound':>6} {'median':>6} {'most':>6}")
    for case, seconds_of in held.items():
        median, most = statistics.median(seconds_of), max(seconds_of)
        print(f"{case.text:45} {len(seconds_of):6} {case.bound:6.2f} {median:6.2f} {most:6.2f}")
    return int(any(max(seconds_of) > case.bound + _MARGIN_SECONDS for case, seconds_of in held.items()))


if __name__ == "__main__":
    sys.exit(main())
