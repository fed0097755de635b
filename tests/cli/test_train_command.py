"""`deltaserve train` as a user runs it: the demo, its interrupts, lost servers and workers on their own."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.ports import held_port

import deltaserve

Process = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def made_up_airfoil(tmp_path: Path) -> Path:
    file = tmp_path / "airfoil_self_noise.dat"
    rows = np.random.default_rng(7).standard_normal((1503, 6))
    file.write_text("".join("\t".join(f"{value:.6g}" for value in row) + "\n" for row in rows))
    return file


def until_training(child: "subprocess.Popen[str]") -> list[str]:
    """Waits until worker 0 tells of steps it has done; returns what was told so far."""
    told = []
    assert child.stderr is not None
    for line in child.stderr:
        told.append(line)
        if re.match(r"worker 0: step [1-9]", line):
            return told
    raise AssertionError("".join(told))


def workers_of(parent: int) -> list[int]:
    """Worker processes that `parent` has started."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_worker(folder, parent)]


def is_worker(folder: Path, parent: int) -> bool:
    try:
        line, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
    except OSError:
        return False
    # After the name in parentheses: state, parent.
    return b"spawn_main" in line and int(stat.rpartition(")")[2].split()[1]) == parent


def all_gone(pids: list[int]) -> bool:
    """Waits until the processes have ended; a zombie has no command line any more."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_the_demo(process: Process) -> None:
    child = process("train", "digits", "--workers", "2", "--policy", "sync")
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    accuracy = re.search(r"^test accuracy: (0\.\d{3})$", out, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.95
    assert re.search(r"^loss: \d\.\d{3}, \d+\.\d{3} sec/epoch$", out, re.MULTILINE)
    assert "updates applied: 1800 (the model is at version 1800)" in out
    assert re.search(r"^samples/s: \d+$", out, re.MULTILINE)
    # No terminal: plain lines, each worker to its end.
    assert "\x1b" not in out + err
    assert re.search(r"^worker 0: step 1800 of 1800, loss 0\.\d+$", err, re.MULTILINE)
    assert re.search(r"^worker 1: step 1800 of 1800$", err, re.MULTILINE)


def test_workers_have_one_thread_each(process: Process) -> None:
    child = process("train", "digits", "--workers", "2", OMP_NUM_THREADS="2")
    until_training(child)
    for pid in workers_of(child.pid):
        assert b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{pid}/environ").read_bytes()


def test_late_gradients_are_counted(process: Process) -> None:
    child = process("train", "digits", "--workers", "3", "--policy", "sync:quorum=1")
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert "3 workers, sync:quorum=1, batches of 8 each" in out
    assert "updates applied: 1200 (the model is at version 1200)" in out
    found = re.search(
        r"^came too late: (\d+) of (\d+) gradients; (\d+) parts of batches were skipped", out, re.MULTILINE
    )
    assert found is not None
    assert int(found[2]) + int(found[3]) == 3600
    assert int(found[2]) - int(found[1]) >= 1200
    assert re.search(r"^worker [12]: step 1200 of 1200, \d+ too late$", err, re.MULTILINE)


def test_the_concise_recipe_counts_them_quietly(process: Process, made_up_airfoil: Path) -> None:
    arguments = ("--recipe", "concise", "--workers", "2", "--policy", "async:max_staleness=0")
    child = process("train", "airfoil", *arguments, "--data", str(made_up_airfoil))
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    assert re.search(r"^came too late: \d+ of 600 gradients$", out, re.MULTILINE)
    assert [line for line in err.splitlines() if not line.startswith("worker ")] == []


def test_a_policy_that_the_server_refuses_is_one_line(process: Process) -> None:
    child = process("train", "digits", "--policy", "sync:reduction=trimmed_mean,trim=1")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    last = err.splitlines()[-1]
    assert re.fullmatch(
        r"deltaserve: worker \d: policy\.sync\.trim: expected less than half of min_workers \(2\)", last
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_everything_quietly(process: Process, number: int, status: int) -> None:
    child = process("train", "digits", "--workers", "2")
    until_training(child)
    workers = workers_of(child.pid)
    assert len(workers) == 2
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == status
    assert "Traceback" not in out + err
    assert [line for line in err.splitlines() if not line.startswith("worker ")] == []
    assert all_gone(workers)


def test_a_killed_worker_is_told_and_everything_stops(process: Process) -> None:
    child = process("train", "digits", "--workers", "2")
    until_training(child)
    workers = workers_of(child.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 1
    last = err.splitlines()[-1]
    assert re.fullmatch(r"deltaserve: worker \d was ended by signal 9 \(Killed\); the others were stopped", last)
    assert all_gone(workers)


def test_workers_do_not_outlive_a_killed_parent(process: Process) -> None:
    child = process("train", "digits", "--workers", "2")
    until_training(child)
    workers = workers_of(child.pid)
    assert len(workers) == 2
    child.kill()
    assert all_gone(workers)


def serve(process: Process, port: int = 0) -> tuple["subprocess.Popen[str]", str]:
    child = process("serve", "--bind", f"127.0.0.1:{port}", "--device", "cpu", "--log-level", "warning")
    assert child.stdout is not None
    return child, [child.stdout.readline() for _ in range(4)][2].split('"')[1]


def test_a_server_that_dies_ends_the_workers_with_its_address(process: Process) -> None:
    server, target = serve(process)
    child = process("train", "digits", "--workers", "2", "--target", target, "--timeout", "3")
    until_training(child)
    workers = workers_of(child.pid)
    server.kill()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("deltaserve: worker ")
    assert target in last
    assert "Traceback" not in err
    assert all_gone(workers)


def test_a_server_that_comes_later_is_waited_for(process: Process) -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        child = process("train", "digits", "--workers", "2", "--target", f"127.0.0.1:{port}")
        assert child.stderr is not None
        assert "trying for" in child.stderr.readline()
        serve(process, port)
        until_training(child)


def test_a_server_that_was_restarted_tells_what_was_lost(process: Process) -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        server, target = serve(process, port)
        child = process("train", "digits", "--workers", "2", "--target", target, "--timeout", "20")
        until_training(child)
        server.kill()
        server.wait()
        serve(process, port)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert re.search(r"^deltaserve: worker \d: .*restarted.*lost.*digits", err, re.MULTILINE)


def test_single_workers_of_several_commands_train_one_model(process: Process, target: str, model: str) -> None:
    arguments = ("train", "digits", "--workers", "1", "--policy", "sync", "--target", target, "--model", model)
    children = [process(*arguments) for _ in range(2)]
    ended = [(*child.communicate(timeout=110), child.returncode) for child in children]
    assert [status for *_, status in ended] == [0, 0], ended
    for out, *_ in ended:
        found = re.search(r"^test accuracy: (0\.\d{3})$", out, re.MULTILINE)
        assert found is not None
        assert float(found[1]) >= 0.95
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        # Each took 3600 steps; those they took together were one update.
        assert 3600 <= client.model(model).info().version < 7200
        client.delete_model(model)
