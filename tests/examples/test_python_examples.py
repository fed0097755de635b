"""Each example as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import deltaserve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def start(name: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(child: "subprocess.Popen[str]") -> str:
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert err == ""
    return out


def number(pattern: str, out: str) -> float:
    found = re.search(pattern, out, re.MULTILINE)
    assert found is not None, out
    return float(found[1])


def test_numpy_linear_as_it_stands() -> None:
    out = output(start("numpy_linear.py"))
    assert "after 2000 updates" in out
    assert number(r"^largest error: (.*)$", out) < 0.05


def test_numpy_linear_twice_at_a_time_on_one_server(target: str) -> None:
    children = [start("numpy_linear.py", target) for _ in range(2)]
    assert all(number(r"^largest error: (.*)$", output(child)) < 0.05 for child in children)
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        info = client.model("line").info()
    assert (info.version, info.sessions) == (4000, ())


def test_torch_digits_as_it_stands() -> None:
    out = output(start("torch_digits.py"))
    assert number(r"^test accuracy: (.*)$", out) >= 0.93


def test_torch_digits_differs_from_a_local_run_in_three_lines() -> None:
    text = (EXAMPLES / "torch_digits.py").read_text()
    assert re.findall(r"# (\d)", text) == ["1", "2", "3"]


def test_notebook_as_it_stands() -> None:
    out = output(start("notebook.py"))
    assert "version: 1000" in out
    assert (EXAMPLES / "notebook.py").read_text().count("\n# %%") == 5
