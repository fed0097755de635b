"""The Python examples: each runs to its end in this process, and one of them in two processes that share a server."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deltaserve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as `python examples/NAME ARGUMENTS` would; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(pattern: str, out: str) -> float:
    found = re.search(pattern, out, re.MULTILINE)
    assert found is not None, out
    return float(found[1])


@pytest.mark.deep
def test_numpy_linear(output: Callable[..., str]) -> None:
    out = output("numpy_linear.py")
    assert "after 2000 updates" in out
    assert number(r"^largest error: (.*)$", out) < 0.05


def test_torch_digits(output: Callable[..., str]) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine its threads spin, and wait for each other
    try:
        out = output("torch_digits.py")
    finally:
        torch.set_num_threads(threads)
    assert number(r"^test accuracy: (.*)$", out) >= 0.93


def test_torch_digits_differs_from_a_local_run_in_three_lines() -> None:
    assert re.findall(r"# (\d)", (EXAMPLES / "torch_digits.py").read_text()) == ["1", "2", "3"]


def test_notebook(output: Callable[..., str]) -> None:
    assert "version: 1000" in output("notebook.py")
    assert (EXAMPLES / "notebook.py").read_text().count("\n# %%") == 5


@pytest.mark.deep
def test_two_processes_share_one_server(target: str) -> None:
    command = [sys.executable, str(EXAMPLES / "numpy_linear.py"), target]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        out, errors = child.communicate(timeout=100)
        assert (child.returncode, errors) == (0, "")
        assert number(r"^largest error: (.*)$", out) < 0.05
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        info = client.model("line").info()
    assert (info.version, info.sessions) == (4000, ())
