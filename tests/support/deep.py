"""Runs the deep tier: `python -m tests.support.deep [PYTEST ARGUMENTS]`, which `make test-deep` calls.

Deep tests kill processes and wait for real leases, so a busy machine can fail one of them by chance. Each test that
fails runs again, up to twice, in a process of its own and with nothing beside it. A test that passes then does not fail
the run, but the closing lines name it: that list should be empty, and a test on it is to be mended.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

RERUNS = 2

MOST_RERUN = 10
"""With more failures than this, chance is not the reason, and running them all again would only take time."""

_WIDTH = 100


class Outcomes:
    """A pytest plugin that keeps the outcome of a run.

    Attributes:
        counts: Number of tests by outcome: passed, failed, skipped, ...
        failed: Node ids of the tests that failed, each once.
        root: Folder that the node ids are relative to.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failed: list[str] = []
        self.root = Path()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        self.root = terminalreporter.config.rootpath
        stats = terminalreporter.stats
        failures = [*stats.get("failed", []), *stats.get("error", [])]
        # A test can fail both in its call and in its teardown: it counts once.
        self.failed = list(dict.fromkeys(report.nodeid for report in failures))
        self.counts = {name: len(stats[name]) for name in ("passed", "skipped", "xfailed") if stats.get(name)}


def main(arguments: Sequence[str]) -> int:
    """Runs the deep tier, then the failed tests again; returns the exit status."""
    began = monotonic()
    outcomes = Outcomes()
    status = int(pytest.main(["-m", "deep", *arguments], plugins=[outcomes]))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or len(outcomes.failed) > MOST_RERUN:
        return status
    recovered = [test for test in outcomes.failed if passes_alone(test, outcomes.root)]
    lost = [test for test in outcomes.failed if test not in recovered]
    if outcomes.failed:
        for test in recovered:
            print(f"passed only when run again: {test}")
        for test in lost:
            print(f"failed {1 + RERUNS} times: {test}")
        print(closing_line(outcomes.counts, len(recovered), len(lost), monotonic() - began))
    return int(bool(lost))


def passes_alone(test: str, root: Path) -> bool:
    """Runs one test again, up to `RERUNS` times, and returns whether it passed once."""
    # `-m ""` because pyproject.toml deselects the deep tier; a plain process, so that nothing is left of the first run.
    command = [sys.executable, "-m", "pytest", "-m", "", "-n", "0", test]
    for attempt in range(RERUNS):
        print(f"\nRunning again, {attempt + 1} of {RERUNS}: {test}", flush=True)
        if subprocess.run(command, check=False, cwd=root).returncode == 0:
            return True
    return False


def closing_line(counts: dict[str, int], recovered: int, lost: int, seconds: float) -> str:
    """Returns a summary of the whole run in the form of pytest's own last line."""
    passed = counts.get("passed", 0) + recovered
    parts = [f"{lost} failed"] if lost else []
    parts += [f"{passed} passed"]
    parts += [f"{number} {name}" for name, number in counts.items() if name != "passed"]
    parts += [f"{recovered} only when run again"] if recovered else []
    return f" {', '.join(parts)} in {seconds:.2f}s ".center(_WIDTH, "=")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
