"""`deltaserve train`: its output, progress, errors and signals, and that no process is left behind."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tests.support.ports import held_port

import deltaserve
from deltaserve_server.recipes.data import AIRFOIL_FILE, Examples

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def airfoil_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic airfoil data of 300 rows."""
    rows = np.random.default_rng(7).standard_normal((300, 6))
    file = tmp_path_factory.mktemp("data") / AIRFOIL_FILE
    file.write_text("".join("\t".join(f"{value:.6g}" for value in row) + "\n" for row in rows))
    return file


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the digits by 48 examples of noise, which makes a run of 60 steps with two workers."""
    random = np.random.default_rng(3)
    examples = Examples(features=random.random((48, 64), np.float32), labels=random.integers(0, 10, 48))
    monkeypatch.setattr("deltaserve_server.recipes.data.load_digits", lambda: (examples, examples))


# --- in this process, with real workers


@pytest.mark.usefixtures("few_digits")
def test_a_run_on_a_server_prints_its_result_and_the_next_command(command: Command, target: str, model: str) -> None:
    ended = command("train", "digits", "--workers", "2", "--policy", "sync", "--target", target, "--model", model)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == f"server: {target}, deltaserve {deltaserve.__version__}"
    assert lines[1] == "digits: 48 examples, 20 epochs, 2 workers, sync:min_workers=2, batches of 8 each"
    assert lines[2] == "optimizer: adadelta:rho=0.95"
    assert re.fullmatch(r"test accuracy: [01]\.\d{3}", lines[3])
    assert re.fullmatch(r"loss: \d\.\d{3}, \d+\.\d{3} sec/epoch", lines[4])
    assert lines[5] == "updates applied: 60 (the model is at version 60)"
    assert re.fullmatch(r"samples/s: \d+", lines[6])
    assert lines[7] == f"get the weights: deltaserve pull {model} --target {target} -o {model}.safetensors"
    # Without a terminal, progress is plain lines.
    assert "\x1b" not in ended.stdout + ended.stderr
    assert re.search(r"^worker 0: step 60 of 60, loss \d\.\d+$", ended.stderr, re.MULTILINE)
    assert re.search(r"^worker 1: step 60 of 60$", ended.stderr, re.MULTILINE)


@pytest.mark.usefixtures("few_digits")
def test_an_optimizer_has_the_recipes_settings_unless_others_are_given(
    command: Command, target: str, model: str
) -> None:
    arguments = ("--optimizer", "momentum:lr=0.02,nesterov=true", "--workers", "1")
    ended = command("train", "digits", *arguments, "--target", target, "--model", model)
    assert ended.returncode == 0, ended.stderr
    assert "optimizer: sgd:lr=0.02,momentum=0.9,nesterov=true\n" in ended.stdout
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        assert client.model(model).groups == (deltaserve.SGD(lr=0.02, momentum=0.9, nesterov=True),)


@pytest.mark.usefixtures("few_digits")
def test_late_gradients_are_counted(command: Command, target: str, model: str) -> None:
    arguments = ("train", "digits", "--workers", "2", "--policy", "sync:quorum=1", "--target", target)
    ended = command(*arguments, "--model", model)
    assert ended.returncode == 0, ended.stderr
    assert "updates applied: 60 (the model is at version 60)" in ended.stdout
    found = re.search(r"^late gradients: (\d+) of (\d+)(?:; (\d+) batches were skipped|$)", ended.stdout, re.MULTILINE)
    late, pushes, skipped = (int(number or 0) for number in found.groups()) if found else (0, 120, 0)
    assert pushes + skipped == 120
    assert pushes - late >= 60


def test_a_policy_that_the_server_refuses_is_one_line(
    command: Command, target: str, model: str, airfoil_file: Path
) -> None:
    policy = "sync:reduction=trimmed_mean,trim=1"
    arguments = ("--workers", "2", "--policy", policy, "--data", str(airfoil_file), "--target", target)
    ended = command("train", "airfoil", *arguments, "--model", model)
    assert ended.returncode == 1
    assert re.fullmatch(r"deltaserve: worker \d: .*trim: .*\n", ended.stderr)


def test_the_scratch_recipe_draws_the_books_figure(
    command: Command, target: str, model: str, airfoil_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTASERVE_DATA", str(airfoil_file.parent))
    figure = tmp_path / "figure.png"
    ended = command("train", "airfoil", "--plot", str(figure), "--target", target, "--model", model)
    assert ended.returncode == 0, ended.stderr
    assert "airfoil-scratch: 300 examples, 2 epochs, 1 worker, sync" in ended.stdout
    assert "updates applied: 60 " in ended.stdout
    assert f"figure: {figure}\n" in ended.stdout
    assert imread(figure).shape[:2] == (500, 700)  # 3.5 x 2.5 inches at 200 dots per inch


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "/no/such/file"], "no such file: /no/such/file; give the file with --data FILE or DELTASERVE_DATA"),
        (["--plot", "figure.docx"], "end the name with one of"),
        (["--plot", "/no/such/folder/figure.png"], "the folder /no/such/folder does not exist"),
    ],
)
def test_errors_are_found_before_the_training(command: Command, arguments: list[str], text: str) -> None:
    ended = command("train", "airfoil", *arguments)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("deltaserve: ")
    assert ended.stderr.count("\n") == 1
    assert text in ended.stderr


# --- as a process


def workers_of(parent: int) -> list[int]:
    """Returns the worker processes that `parent` has started."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_worker(folder, parent)]


def is_worker(folder: Path, parent: int) -> bool:
    try:
        line, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
    except OSError:
        return False
    return b"spawn_main" in line and int(stat.rpartition(")")[2].split()[1]) == parent


def all_gone(pids: list[int]) -> bool:
    """Waits until the processes have ended; a zombie has no command line any more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
            return True
        time.sleep(0.01)
    return False


def wait_for_step(child: "subprocess.Popen[str]", pattern: str = r"worker 0: step [1-9]") -> None:
    """Waits for a line of progress."""
    lines = []
    assert child.stderr is not None
    for line in child.stderr:
        lines.append(line)
        if re.match(pattern, line):
            return
    raise AssertionError("".join(lines))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_everything_quietly(
    process: Process, target: str, model: str, airfoil_file: Path, number: int, status: int
) -> None:
    # The round waits for a third worker, so the run does not end by itself.
    arguments = ("--workers", "2", "--policy", "sync:min_workers=3", "--target", target, "--model", model)
    child = process("train", "airfoil", "--data", str(airfoil_file), *arguments)
    wait_for_step(child, r"worker [01]: step 0")
    wait_for_step(child, r"worker [01]: step 0")
    workers = workers_of(child.pid)
    assert len(workers) == 2
    assert all(b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{pid}/environ").read_bytes() for pid in workers)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == status
    assert "Traceback" not in out + err
    assert [line for line in err.splitlines() if not line.startswith("worker ")] == []
    assert all_gone(workers)


@pytest.mark.deep
def test_the_demo(process: Process) -> None:
    child = process("train", "digits", "--workers", "2", "--policy", "sync")
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    accuracy = re.search(r"^test accuracy: (0\.\d{3})$", out, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.95
    assert "updates applied: 1800 (the model is at version 1800)" in out


@pytest.mark.deep
@pytest.mark.parametrize(("recipe", "low", "high"), [("scratch", 0.2417, 0.2520), ("concise", 0.2417, 0.2440)])
def test_the_real_data_gives_the_published_loss(process: Process, recipe: str, low: float, high: float) -> None:
    given = Path(os.environ.get("DELTASERVE_DATA") or SHARED_DATA)
    if not given.exists():
        pytest.skip(f"{AIRFOIL_FILE} is not here: set DELTASERVE_DATA to it")
    child = process("train", "airfoil", "--recipe", recipe, "--data", str(given))
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    found = re.search(r"^loss: (0\.\d{3}), \d+\.\d{3} sec/epoch$", out, re.MULTILINE)
    assert found is not None
    assert round(low, 3) <= float(found[1]) <= round(high, 3)


@pytest.mark.deep
def test_the_concise_recipe_counts_late_gradients_quietly(process: Process, airfoil_file: Path) -> None:
    arguments = ("--recipe", "concise", "--workers", "2", "--policy", "async:max_staleness=0")
    child = process("train", "airfoil", *arguments, "--data", str(airfoil_file))
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert re.search(r"^late gradients: \d+ of 120$", out, re.MULTILINE)
    assert [line for line in err.splitlines() if not line.startswith("worker ")] == []


@pytest.mark.deep
def test_a_terminal_shows_a_bar_for_each_worker(airfoil_file: Path) -> None:
    command = [sys.executable, "-m", "deltaserve", "train", "airfoil", "--workers", "2", "--data", str(airfoil_file)]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b"".join(read_terminal(ours)).decode()
        out, _ = child.communicate(timeout=100)
    assert child.returncode == 0
    assert b"loss: 0." in out
    assert b"\x1b" not in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"worker 0 ━+ 30/30 0:00:\d\d loss 0\.\d{3}", text)
    assert re.search(r"worker 1 ━+ 30/30 0:00:\d\d", text)
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", text)) <= 80


def read_terminal(descriptor: int) -> Iterator[bytes]:
    """Reads a terminal until its other end is closed, which Linux reports as an error."""
    with suppress(OSError):
        while part := os.read(descriptor, 65536):
            yield part
    os.close(descriptor)


@pytest.mark.deep
def test_a_killed_worker_ends_the_run(process: Process) -> None:
    child = process("train", "digits", "--workers", "2")
    wait_for_step(child)
    workers = workers_of(child.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    last = err.splitlines()[-1]
    assert re.fullmatch(r"deltaserve: worker \d was ended by signal 9 \(Killed\); the other workers were stopped", last)
    assert all_gone(workers)


@pytest.mark.deep
def test_workers_end_with_their_killed_parent(process: Process) -> None:
    child = process("train", "digits", "--workers", "2")
    wait_for_step(child)
    workers = workers_of(child.pid)
    assert len(workers) == 2
    child.kill()
    assert all_gone(workers)


def serve(process: Process, port: int = 0) -> tuple["subprocess.Popen[str]", str]:
    child = process("serve", "--bind", f"127.0.0.1:{port}", "--device", "cpu", "--log-level", "warning")
    assert child.stdout is not None
    return child, [child.stdout.readline() for _ in range(4)][2].split('"')[1]


@pytest.mark.deep
def test_a_server_that_dies_ends_the_run_with_its_address(process: Process) -> None:
    server, target = serve(process)
    child = process("train", "digits", "--workers", "2", "--target", target, "--timeout", "3")
    wait_for_step(child)
    workers = workers_of(child.pid)
    server.kill()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("deltaserve: worker ")
    assert target in last
    assert "Traceback" not in err
    assert all_gone(workers)


@pytest.mark.deep
def test_a_run_waits_for_a_server_that_starts_later(process: Process) -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        child = process("train", "digits", "--workers", "2", "--target", f"127.0.0.1:{port}")
        assert child.stderr is not None
        assert "cannot reach a server" in child.stderr.readline()
        serve(process, port)
        wait_for_step(child)


@pytest.mark.deep
def test_a_server_that_lost_the_model_ends_the_run(process: Process) -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        server, target = serve(process, port)
        child = process("train", "digits", "--workers", "2", "--target", target, "--timeout", "60")
        wait_for_step(child)
        server.kill()
        server.wait()
        serve(process, port)
        _, err = child.communicate(timeout=100)
    assert child.returncode == 1
    assert re.search(r"^deltaserve: worker \d: .*lost.*digits", err, re.MULTILINE)


@pytest.mark.deep
def test_single_workers_of_two_commands_train_one_model(process: Process, target: str, model: str) -> None:
    arguments = ("train", "digits", "--workers", "1", "--policy", "sync", "--target", target, "--model", model)
    children = [process(*arguments) for _ in range(2)]
    ended = [(*child.communicate(timeout=110), child.returncode) for child in children]
    assert [status for *_, status in ended] == [0, 0], ended
    for out, *_ in ended:
        found = re.search(r"^test accuracy: (0\.\d{3})$", out, re.MULTILINE)
        assert found is not None
        assert float(found[1]) >= 0.95
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        # Each took 3600 steps; those that they took together made one update.
        assert 3600 <= client.model(model).info().version < 7200
        client.delete_model(model)
