"""The deep tier's runner: failed tests run again, alone, and the closing lines say so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

_TESTS = """
import os
from pathlib import Path
import pytest
pytestmark = pytest.mark.deep

def passes_from(time):
    counter = Path(os.environ["COUNTER"])
    counter.write_text(counter.read_text() + "x" if counter.exists() else "x")
    assert len(counter.read_text()) >= time

def test_good(): pass
def test_failing(): passes_from(TIME)
"""


def run_deep(folder: Path, time: int) -> "subprocess.CompletedProcess[str]":
    """Runs the deep tier of two tests, one of which passes from the given attempt on."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = deep\naddopts = -m 'not deep'\n")
    (folder / "test_some.py").write_text(_TESTS.replace("TIME", str(time)))
    environment = os.environ | {"COUNTER": str(folder / "counter")}
    command = [sys.executable, "-m", "tests.support.deep", f"--rootdir={folder}", f"-c{folder / 'pytest.ini'}"]
    return subprocess.run(
        [*command, "-n", "0", str(folder)], check=False, capture_output=True, text=True, cwd=_ROOT, env=environment
    )


@pytest.mark.deep
@pytest.mark.timeout(400)  # starts up to four pytest processes
@pytest.mark.parametrize(("time", "status"), [(1, 0), (3, 0), (4, 1)])
def test_a_failed_test_runs_again_twice_and_the_closing_lines_name_it(tmp_path: Path, time: int, status: int) -> None:
    ended = run_deep(tmp_path, time)
    assert ended.returncode == status, ended.stdout + ended.stderr
    *_, before, closing = ended.stdout.rstrip().splitlines()
    assert re.search(r"^=+ .*[0-9]+ passed.* in [0-9.]+s.*=+$", closing)
    if time == 1:
        assert "run again" not in ended.stdout
    elif status == 0:
        assert before.startswith("passed only when run again: ")
        assert "2 passed, 1 only when run again" in closing
    else:
        assert before.startswith("failed 3 times: ")
        assert "1 failed, 1 passed" in closing
    assert len((tmp_path / "counter").read_text()) == min(time, 3)
