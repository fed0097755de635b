"""The Node.js worker, which uses the contract from another language. Skipped without Node or its npm packages."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import deltaserve

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.deep  # npm may have to download the packages

NODE = ROOT / "examples" / "node"
INSTALL = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """Installs the worker's packages; a machine without Node or without a network skips these tests."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    if not (NODE / "node_modules").is_dir():
        try:
            ended = subprocess.run(INSTALL, cwd=NODE, capture_output=True, text=True, timeout=90, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("npm ci did not finish within 90 s")
        if ended.returncode:
            shutil.rmtree(NODE / "node_modules", ignore_errors=True)
            pytest.skip(f"npm ci failed: {ended.stderr.strip()[-300:]}")


def work(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["node", str(NODE / "worker.js"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def loss(ended: "subprocess.CompletedProcess[str]") -> float:
    assert ended.returncode == 0, ended.stderr
    found = re.fullmatch(r"loss: (\d\.\d{3}), \d+\.\d{3} sec/epoch\n", ended.stdout)
    assert found is not None, ended.stdout
    return float(found[1])


def airfoil_file() -> Path:
    given = Path(os.environ.get("DELTASERVE_DATA") or ROOT.parent / "shared" / "data")
    file = given / "airfoil_self_noise.dat" if given.is_dir() else given
    if not file.is_file():
        pytest.skip("set DELTASERVE_DATA to the folder of airfoil_self_noise.dat")
    return file


def test_it_learns_and_closes_its_session(target: str) -> None:
    # Noise in the made-up labels, 0.7^2 of a variance of 1.74, leaves a loss of 0.14.
    assert 0.10 < loss(work(target)) < 0.20
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        info = client.model("airfoil-node").info()
    assert (info.version, info.sessions) == (300, ())


def test_it_reaches_the_loss_of_the_book_on_the_real_file(target: str) -> None:
    assert 0.242 <= loss(work(target, str(airfoil_file()))) <= 0.252


def test_python_and_node_take_turns_on_one_model(target: str) -> None:
    first = {"w": np.zeros((5, 1), np.float32), "b": np.zeros(1, np.float32)}
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        model = client.create_model("shared", first, optimizer=deltaserve.Adadelta(eps=1e-5))
        with model.worker() as worker:
            worker.step({"w": np.ones((5, 1), np.float32), "b": np.ones(1, np.float32)})
            loss(work(target, "", "shared"))
            worker.step({"w": np.ones((5, 1), np.float32), "b": np.ones(1, np.float32)})
            assert worker.version == 302


def test_a_refusal_is_printed_with_its_reason(target: str) -> None:
    ended = work(target, "", "no/such/name")
    assert ended.returncode == 1
    assert ended.stderr.startswith("worker: NAME_INVALID: ")
    assert ended.stderr.count("\n") == 1


def test_a_mismatch_is_printed_with_its_reason(target: str) -> None:
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        client.create_model("other", {"w": np.zeros(3, np.float32)})
    ended = work(target, "", "other")
    assert ended.returncode == 1
    assert ended.stderr.startswith("worker: MODEL_MISMATCH: ")


def test_it_is_short_and_its_packages_are_pinned() -> None:
    assert len((NODE / "worker.js").read_text().splitlines()) < 80
    lock = (NODE / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    assert '"integrity"' in lock
