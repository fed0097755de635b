"""The failpoints themselves: what the environment may say, what happens then, and that every name is a place."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import deltaserve
import deltaserve_server
from deltaserve._common import failpoints
from deltaserve._common.failpoints import NAMES, FailpointError, failpoint

_REACHES = """
import sys
from deltaserve._common.failpoints import failpoint, FailpointError
for number in range(1, int(sys.argv[1]) + 1):
    try:
        failpoint("push.staged")
    except FailpointError as error:
        print(number, error, flush=True)
"""


def reach(times: int, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Reaches push.staged so often, in a process of its own; it prints each error."""
    given = {f"DELTASERVE_FAILPOINTS{name}": value for name, value in environment.items()}
    command = [sys.executable, "-c", _REACHES, str(times)]
    return subprocess.run(command, check=False, env=os.environ | given, capture_output=True, text=True, timeout=30)


def happened(outcome: "subprocess.CompletedProcess[str]") -> list[int]:
    return [int(line.split()[0]) for line in outcome.stdout.splitlines()]


def test_every_name_is_a_place_in_the_code_and_every_place_has_a_name() -> None:
    roots = [Path(str(package.__file__)).parent for package in (deltaserve, deltaserve_server)]
    sources = [path.read_text() for root in roots for path in root.rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'\bfailpoint\("([a-z_.]+)"\)', source)}
    assert used == NAMES.keys()


def test_nothing_happens_unless_the_environment_says_so() -> None:
    assert failpoints._armed is None
    for name in NAMES:
        failpoint(name)
    assert happened(reach(3)) == []
    assert happened(reach(3, **{"": "push.headers=error"})) == []


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
def test_it_happens_as_often_as_asked(text: str, numbers: list[int]) -> None:
    outcome = reach(4, **{"": text})
    assert outcome.returncode == 0, outcome.stderr
    assert happened(outcome) == numbers


def test_by_chance_the_seed_decides() -> None:
    one, same, other = (happened(reach(400, **{"": "push.staged=error@1/10", "_SEED": seed})) for seed in "112")
    assert one == same != other
    assert 15 < len(one) < 75


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
def test_what_it_does_not_understand_stops_the_process_at_its_start(text: str, message: str) -> None:
    outcome = reach(0, **{"": text})
    assert outcome.returncode == 1
    assert message in outcome.stderr.splitlines()[-1]


def test_a_place_without_a_name_is_an_error_where_any_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_armed", {"push.staged": failpoints.parse("push.staged=error")})
    with pytest.raises(ValueError, match=r"failpoint push\.stagd is not in the list"):
        failpoint("push.stagd")
    with pytest.raises(FailpointError, match=r"failpoint push\.staged"):
        failpoint("push.staged")


def test_a_death_is_in_the_log_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcome = reach(5, **{"": "push.staged=kill@3", "_LOG": str(log)})
    assert outcome.returncode == -signal.SIGKILL
    at, pid, *rest = log.read_text().split()
    assert int(at) > 0
    assert int(pid) > 1
    assert rest == ["push.staged", "kill", "3"]


def test_a_stopped_process_goes_on_when_it_is_told_to(tmp_path: Path) -> None:
    environment = os.environ | {"DELTASERVE_FAILPOINTS": "push.staged=stop@1;push.staged=error@2"}
    process = subprocess.Popen(
        [sys.executable, "-c", _REACHES, "2"], env=environment, stdout=subprocess.PIPE, text=True
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0].startswith("2 failpoint push.staged")
