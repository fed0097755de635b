"""Servers, workers and connections that die, stop and stall: no push is lost or applied twice, and no bit differs."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_PROGRAM = Path(__file__).with_name("chaos.py")

_JOBS = 4

_SEEDS = "1", "2", "3", "4", "5", "6", "7", "8"
"""Seeds to try until a run shows a planted defect: a short run may miss it, on a busy machine more often."""

_AFTER_UPDATES = "push.published@3", "push.acknowledged@3", "push.published@6", "push.acknowledged@6"
_DEATHS = {
    "snapshot": (*_AFTER_UPDATES, "snapshot.manifest@1", "snapshot.manifest@2"),
    "journal": (*_AFTER_UPDATES, "journal.recorded@8", "journal.written@8"),
}
"""Failpoints at which a server with a defect dies first: soon after an update or a snapshot."""

pytestmark = [pytest.mark.deep, pytest.mark.timeout(400)]


class Ran(NamedTuple):
    """Status and output of chaos.py, and the outcomes of its runs."""

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


def test_every_fault_and_every_death_of_the_server_with_every_durability(tmp_path: Path) -> None:
    once = ("--trials", "100", "--every-fault", "--alternate", "--jobs", str(_JOBS))
    ran = run(tmp_path, "all", *once, "--seconds", "4", "--rate", "1.5")
    assert ran.status == 0, ran.text
    assert {outcome["policy"] for outcome in ran.outcomes} == {"sync", "quorum", "median", "async", "stale", "bounded"}
    assert {outcome["durability"] for outcome in ran.outcomes} == {"none", "snapshot", "journal", "fsync"}
    assert len({outcome["optimizer"] for outcome in ran.outcomes}) > 5
    assert ran.total("acknowledged") > 30
    assert ran.total("applied") + ran.total("rolled_back") >= ran.total("acknowledged")


class Planted(NamedTuple):
    """A planted defect, the scenario that shows it, and a pattern of its report, or the count that it raises."""

    name: str
    policy: str
    durability: str
    found: str
    optimizer: str = "adadelta"

    def shows(self, ran: Ran) -> bool:
        counted = self.found in ("doubled", "lost", "bits")
        return ran.total(self.found) > 0 if counted else bool(re.search(self.found, ran.text))


_DEFECTS = (
    Planted("doubles", "async", "none", "doubled"),
    Planted("loses", "async", "none", "lost"),
    Planted("other-bits", "sync", "none", "bits"),
    Planted("tells-early", "async", "journal", r"life \d+ told of version \d+; life \d+ came back at"),
    Planted(
        "skips-records",
        "async",
        "journal",
        r"the server cannot start any more: .*its version cannot be|told of version \d+; life \d+ came back at",
    ),
    Planted("forgets-last-record", "async", "journal", r"told of version \d+; life \d+ came back at"),
    Planted("forgets-sessions", "stale", "journal", r"GetPush says of .* not accepted; it is in versions|SEQUENCE_GAP"),
    Planted("mixes-snapshots", "async", "snapshot", "bits"),
    Planted("miscounts-losses", "async", "snapshot", r"it was told that pushes \[.*\] of session \w+ are lost"),
    Planted("promises-too-much", "async", "snapshot", r"was told of version \d+; life \d+ came back at"),
    Planted(
        "comes-back-older",
        "async",
        "snapshot",
        r"had a snapshot of version \d+; life \d+ came back at|came back at version \d+; there were",
    ),
    Planted("forgets-counts", "async", "journal", "bits", "adam"),
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """Runs against servers with planted defects, by the defect's name."""
    folder = tmp_path_factory.mktemp("planted")

    def find(defect: Planted) -> Ran:
        kind = ("--defect", defect.name, "--policies", defect.policy, "--durabilities", defect.durability)
        once = ("--doors", "unary", "--optimizers", defect.optimizer, "--jobs", "1", "--trials", "1")
        often = ("3", "--first", *_DEATHS[defect.durability]) if defect.durability in _DEATHS else ("3", "--rate", "3")
        for seed in _SEEDS:
            ran = run(folder, f"{defect.name}-{seed}", *kind, *once, "--seed", seed, "--seconds", *often)
            if defect.shows(ran):
                break
        return ran

    with ThreadPoolExecutor(_JOBS) as threads:
        return dict(zip([defect.name for defect in _DEFECTS], threads.map(find, _DEFECTS), strict=True))


@pytest.mark.parametrize("defect", _DEFECTS, ids=[defect.name for defect in _DEFECTS])
def test_a_defect_of_the_server_is_found(planted: Mapping[str, Ran], defect: Planted) -> None:
    ran = planted[defect.name]
    assert defect.shows(ran), ran.text
    assert ran.status == 1, ran.text
    assert "logs in " in ran.text
    assert re.search(r"--seed \d000 ", ran.text)


def test_a_dead_or_stopped_worker_holds_a_round_no_longer_than_its_lease_or_the_rounds_timeout() -> None:
    command = [sys.executable, str(_PROGRAM.with_name("round_holds.py"))]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("worker.") == 20
