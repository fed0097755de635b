"""`deltaserve train airfoil` as a user runs it, on data of the same form and on the real file."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

COMMAND = [sys.executable, "-m", "deltaserve", "train", "airfoil"]


def train_airfoil(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DELTASERVE_")}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False, env=clean | environment
    )


@pytest.mark.parametrize(("recipe", "epochs"), [("scratch", 2), ("concise", 4)])
def test_it_prints_the_books_line_and_draws_its_figure(
    synthetic_file: Path, tmp_path: Path, recipe: str, epochs: int
) -> None:
    figure = tmp_path / "figure.png"
    ended = train_airfoil(
        *("--recipe", recipe, "--workers", "2", "--seed", "3", "--plot", str(figure)),
        DELTASERVE_DATA=str(synthetic_file.parent),
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^loss: 0\.\d{3}, \d+\.\d{3} sec/epoch$", ended.stdout, re.MULTILINE)
    assert f"airfoil-{recipe}: 1500 examples, {epochs} epochs, 2 workers, sync" in ended.stdout
    assert f"updates applied: {75 * epochs} " in ended.stdout
    picture = imread(figure)
    # 3.5 x 2.5 inches at 200 dots, and the curve's blue on it.
    assert picture.shape[:2] == (500, 700)
    assert ((picture[..., 2] > 0.6) & (picture[..., 0] < 0.3)).sum() > 500


@pytest.mark.parametrize(("recipe", "low", "high"), [("scratch", 0.2417, 0.2520), ("concise", 0.2417, 0.2440)])
def test_the_real_file_gives_the_published_loss(real_file: Path, recipe: str, low: float, high: float) -> None:
    ended = train_airfoil("--recipe", recipe, "--data", str(real_file))
    assert ended.returncode == 0, ended.stderr
    found = re.search(r"^loss: (0\.\d{3}), \d+\.\d{3} sec/epoch$", ended.stdout, re.MULTILINE)
    assert found is not None
    assert round(low, 3) <= float(found[1]) <= round(high, 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "/no/such/file"], "no such file: /no/such/file; give the file with --data FILE or DELTASERVE_DATA=FILE"),
        (["--plot", "figure.docx"], "end the name with one of"),
        (["--plot", "/no/such/folder/figure.png"], "the folder /no/such/folder does not exist"),
    ],
)
def test_what_is_wrong_is_told_before_the_training(arguments: list[str], text: str) -> None:
    ended = train_airfoil(*arguments)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("deltaserve: ")
    assert ended.stderr.count("\n") == 1
    assert text in ended.stderr


def test_on_a_terminal_each_worker_has_a_bar(synthetic_file: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["--workers", "2", "--data", str(synthetic_file)]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    ) as child:
        os.close(theirs)
        shown = read_all(ours)
        out, _ = child.communicate(timeout=100)
    assert child.returncode == 0
    assert b"loss: 0." in out
    assert b"\x1b" not in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"worker 0 ━+ 150/150 0:00:\d\d loss 0\.\d{3}", text)
    assert re.search(r"worker 1 ━+ 150/150 0:00:\d\d", text)
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", text)) <= 80


def read_all(descriptor: int) -> str:
    """Reads a terminal until its other end is closed, which Linux tells by an error."""
    parts = []
    try:
        while part := os.read(descriptor, 65536):
            parts.append(part)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return b"".join(parts).decode()
