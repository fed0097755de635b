"""`deltaserve serve` as a process: what it says, its settings, how it stops."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import deltaserve

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]

BIND = ("serve", "--bind", "127.0.0.1:0", "--device", "cpu")


def read_target(child: "subprocess.Popen[str]") -> str:
    """Reads what a server says when it has started; returns the address it gives to connect to."""
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(4)]
    target = lines[2].split('"')[1]
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", target)
    assert lines == [
        f"deltaserve {deltaserve.__version__} listens on {target}\n",
        lines[1],
        f'connect  deltaserve.connect("{target}")\n',
        f"try      deltaserve train digits --workers 2 --target {target}\n",
    ]
    assert re.fullmatch(r"device   cpu: .+, \d+ threads?\n", lines[1])
    return target


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_until_a_signal_and_stops_in_good_order(process: Process, number: int, status: int) -> None:
    child = process(*BIND)
    target = read_target(child)
    with deltaserve.connect(target, timeout_seconds=20.0) as client:
        with client.create_model("m", {"w": np.ones(3, np.float32)}).worker() as worker:
            assert worker.step({"w": np.ones(3, np.float32)})["w"][0] < 1
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert child.returncode == status
    assert out == ""
    assert "Traceback" not in err
    assert f"{signal.Signals(number).name}: stopping; rounds go on for at most 5 s\n" in err


def wait_until_stopping(child: "subprocess.Popen[str]") -> None:
    assert child.stderr is not None
    while "stopping" not in (line := child.stderr.readline()):
        assert line


def wait_until_waiting(model: deltaserve.Model) -> None:
    while not any(session.waiting for session in model.info().sessions):
        time.sleep(0.01)


def test_a_round_under_way_is_finished_before_it_stops(process: Process) -> None:
    child = process(*BIND, "--grace-seconds", "20")
    gradients = {"w": np.ones(3, np.float32)}
    with (
        deltaserve.connect(read_target(child), timeout_seconds=20.0) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        model = client.create_model("m", gradients, policy=deltaserve.Sync())
        one, two = model.worker("one"), model.worker("two")
        first = threads.submit(one.step, gradients)
        wait_until_waiting(model)
        child.send_signal(signal.SIGTERM)
        wait_until_stopping(child)
        assert not first.done()
        two.close()
        assert first.result()["w"][0] < 1
        assert one.version == 1
        assert child.wait(timeout=15) == 0


def test_a_second_signal_ends_at_once(process: Process) -> None:
    child = process(*BIND, "--grace-seconds", "60")
    gradients = {"w": np.ones(3, np.float32)}
    with (
        deltaserve.connect(read_target(child), timeout_seconds=6.0) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        model = client.create_model("m", gradients, policy=deltaserve.Sync(min_workers=2))
        first = threads.submit(model.worker("one").step, gradients)
        wait_until_waiting(model)
        child.send_signal(signal.SIGINT)
        wait_until_stopping(child)
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 130
        assert time.monotonic() - began < 10
        assert isinstance(first.exception(), deltaserve.Error)


def test_flags_beat_the_environment_and_the_winner_is_logged(process: Process) -> None:
    child = process(
        *BIND,
        DELTASERVE_BIND="127.0.0.1:1",
        DELTASERVE_MEMORY_BYTES="1GiB",
        DELTASERVE_SESSIONS="7",
        DELTASERVE_THREADS="1",
    )
    with deltaserve.connect(read_target(child), timeout_seconds=20.0) as client:
        info = client.server_info()
    child.terminate()
    err = child.communicate(timeout=20)[1]
    assert (info.limits.memory_bytes, info.limits.sessions, info.threads) == (1 << 30, 7, 1)
    assert "bind = 127.0.0.1:0, from --bind" in err
    assert "memory_bytes = 1073741824, from DELTASERVE_MEMORY_BYTES" in err
    assert "sessions = 7, from DELTASERVE_SESSIONS" in err
    assert "127.0.0.1:1," not in err


def test_the_log_level_is_kept(process: Process) -> None:
    child = process(*BIND, "--log-level", "warning")
    read_target(child)
    child.terminate()
    assert child.communicate(timeout=20)[1] == ""


def test_a_port_that_is_taken_is_one_line(process: Process) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        child = process("serve", "--bind", f"127.0.0.1:{port}", "--log-level", "warning")
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (1, "")
    assert err.startswith(f"deltaserve: cannot listen on 127.0.0.1:{port}")
    assert err.count("\n") == 1
    assert "--bind HOST:PORT" in err


def test_a_setting_from_the_environment_that_is_wrong_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTASERVE_SESSIONS", "many")
    ended = command("serve")
    assert ended.returncode == 2
    assert "--sessions" in ended.stderr
    assert ended.stderr.count("\n") == 1
