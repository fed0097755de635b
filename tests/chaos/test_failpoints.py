"""Failpoints: the entries in the environment, their actions, and the list of names."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deltaserve
import deltaserve_server
from deltaserve._common import failpoints
from deltaserve._common.failpoints import NAMES, FailpointError, failpoint

_REACHES = """
from deltaserve._common.failpoints import failpoint, FailpointError
for number in range(1, 6):
    try:
        failpoint("push.staged")
    except FailpointError as error:
        print(number, error, flush=True)
"""


def start(**environment: str) -> "subprocess.Popen[str]":
    """Starts a process that reaches push.staged five times and prints each error."""
    given = {f"DELTASERVE_FAILPOINTS{name}": value for name, value in environment.items()}
    command = [sys.executable, "-c", _REACHES]
    return subprocess.Popen(command, env=os.environ | given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def errors(monkeypatch: pytest.MonkeyPatch, text: str, times: int, seed: str = "") -> list[int]:
    """Arms failpoints in this process, reaches push.staged, and returns the times at which it raised an error."""
    armed: dict[str, list[Any]] = {}
    for entry in failpoints.parse(text, seed):
        armed.setdefault(entry.name, []).append(entry)
    monkeypatch.setattr(failpoints, "_armed", armed)
    raised = []
    for number in range(1, times + 1):
        try:
            failpoint("push.staged")
        except FailpointError:
            raised.append(number)
    return raised


def test_every_name_is_a_failpoint_in_the_code_and_every_failpoint_has_a_name() -> None:
    roots = [Path(str(package.__file__)).parent for package in (deltaserve, deltaserve_server)]
    sources = [path.read_text() for root in roots for path in root.rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'\bfailpoint\("([a-z_.]+)"\)', source)}
    assert used == NAMES.keys()


def test_nothing_happens_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failpoints._armed is None
    for name in NAMES:
        failpoint(name)
    assert errors(monkeypatch, "push.headers=error", 3) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("push.staged=error", [1, 2, 3, 4]),
        ("push.staged=error@3", [3]),
        ("push.staged=error@2; push.staged=error@4;", [2, 4]),
        ("push.staged=error@1/1", [1, 2, 3, 4]),
        ("push.staged=sleep(0)@2;push.headers=kill", []),
    ],
)
def test_an_action_happens_as_often_as_asked(monkeypatch: pytest.MonkeyPatch, text: str, numbers: list[int]) -> None:
    assert errors(monkeypatch, text, 4) == numbers


def test_the_seed_decides_random_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, other = (errors(monkeypatch, "push.staged=error@1/10", 400, seed) for seed in "112")
    assert first == same != other
    assert 15 < len(first) < 75


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("push.stagd=kill", "there is no place named push.stagd; there are worker.opened, "),
        ("push.staged=die", "push.staged: expected kill, stop, sleep(SECONDS) or error, got die"),
        ("push.staged=kill(1)", "got kill(1)"),
        ("push.staged=sleep", "got sleep"),
        ("push.staged=sleep(soon)", "expected seconds, 0 or more, got 'soon'"),
        ("push.staged=sleep(-1)", "got '-1'"),
        ("push.staged=sleep(nan)", "got 'nan'"),
        ("push.staged=kill@0", "expected a count of 1 or more, got 'push.staged=kill@0'"),
        ("push.staged=kill@1/0", "expected a count of 1 or more"),
        ("push.staged=kill@2/3", "expected NAME=ACTION, NAME=ACTION@N or NAME=ACTION@1/N, got 'push.staged=kill@2/3'"),
        ("push.staged", "expected NAME=ACTION"),
    ],
)
def test_a_wrong_entry_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        failpoints.parse(text)


def test_a_wrong_entry_ends_the_process_at_its_start() -> None:
    with start(**{"": "push.stagd=kill"}) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "there is no place named push.stagd" in said.splitlines()[-1]


def test_a_failpoint_without_a_name_is_an_error_if_any_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_armed", {"push.staged": failpoints.parse("push.staged=error")})
    with pytest.raises(ValueError, match=r"failpoint push\.stagd is not in the list"):
        failpoint("push.stagd")
    with pytest.raises(FailpointError, match=r"failpoint push\.staged"):
        failpoint("push.staged")


def test_a_death_is_logged_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with start(**{"": "push.staged=kill@3", "_LOG": str(log)}) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    at, pid, *rest = log.read_text().split()
    assert int(at) > 0
    assert int(pid) == process.pid
    assert rest == ["push.staged", "kill", "3"]


def test_a_stopped_process_continues_after_sigcont() -> None:
    with start(**{"": "push.staged=stop@1;push.staged=error@2"}) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0].startswith("2 failpoint push.staged")
