"""Workers and connections that die, stop and stutter: no push is lost, none is applied twice, not a bit differs."""

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_PROGRAM = Path(__file__).with_name("chaos.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Ran(NamedTuple):
    """What a program said, and what it wrote down of its runs."""

    status: int
    text: str
    outcomes: list[dict[str, Any]]

    def total(self, name: str) -> int:
        return sum(outcome[name] for outcome in self.outcomes)


def run(folder: Path, name: str, *arguments: str) -> Ran:
    path = folder / f"{name}.json"
    command = [sys.executable, str(_PROGRAM), "--json", str(path), *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=390)
    assert path.exists(), ended.stderr
    return Ran(ended.returncode, ended.stdout + ended.stderr, json.loads(path.read_text()))


def test_every_fault_under_every_policy(tmp_path: Path) -> None:
    ran = run(tmp_path, "all", *("--trials", "100", "--seconds", "4", "--rate", "3", "--alternate", "--every-fault"))
    assert ran.status == 0, ran.text
    assert {outcome["policy"] for outcome in ran.outcomes} == {"sync", "quorum", "median", "async", "stale", "bounded"}
    assert ran.total("acknowledged") > 30
    assert ran.total("applied") >= ran.total("acknowledged")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """Runs against servers that have a defect, by its name."""
    folder = tmp_path_factory.mktemp("planted")
    common = ("--jobs", "1", "--trials", "1", "--seconds", "3", "--rate", "3", "--doors", "unary")
    policies = {"doubles": "async", "loses": "async", "other-bits": "sync"}
    with ThreadPoolExecutor() as threads:
        return {
            name: running.result()
            for name, running in [
                (name, threads.submit(run, folder, name, "--plant", name, "--policies", policy, *common))
                for name, policy in policies.items()
            ]
        }


@pytest.mark.parametrize(("plant", "count"), [("doubles", "doubled"), ("loses", "lost"), ("other-bits", "bits")])
def test_a_defect_of_the_server_is_found(planted: Mapping[str, Ran], plant: str, count: str) -> None:
    ran = planted[plant]
    assert ran.status == 1
    assert ran.total(count) > 0, ran.text
    assert "logs in " in ran.text
    assert "--seed 1000" in ran.text


def test_a_dead_or_stopped_worker_holds_a_round_no_longer_than_its_lease_or_the_rounds_timeout() -> None:
    command = [sys.executable, str(_PROGRAM.with_name("holds.py"))]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("worker.") == 20
