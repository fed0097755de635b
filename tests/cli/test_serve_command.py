"""`deltaserve serve`: what it prints and logs, its settings, and how it stops."""

import re
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy as np
import pytest

import deltaserve
from deltaserve_server import LocalServer, ServerConfig

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]

SERVE = ("serve", "--bind", "127.0.0.1:0", "--device", "cpu")
ONE = {"w": np.ones(3, np.float32)}


def read_target(child: "subprocess.Popen[str]", directory: Path | None = None, durability: str = "") -> str:
    """Checks what a started server prints, and returns its address."""
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(4 if directory is None else 5)]
    if directory is not None:
        assert lines.pop(2) == f"durable  {durability} in {directory}\n"
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


def wait_for_line(child: "subprocess.Popen[str]", text: str) -> None:
    assert child.stderr is not None
    while text not in (line := child.stderr.readline()):
        assert line


def train(target: str, steps: int) -> deltaserve.ModelState:
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        model = client.create_model("m", ONE)
        with model.worker("a") as worker:
            for _ in range(steps):
                worker.step(ONE)
        return model.pull_state()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_it_after_the_open_round(process: Process, number: int, status: int) -> None:
    child = process(*SERVE, "--grace-seconds", "60")
    with (
        deltaserve.connect(read_target(child), timeout_seconds=60.0) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        model = client.create_model("m", ONE, policy=deltaserve.Sync())
        one, two = model.worker("one"), model.worker("two")
        first = threads.submit(one.step, ONE)
        while not any(session.waiting for session in model.info().sessions):
            sleep(0.01)
        child.send_signal(number)
        wait_for_line(child, f"{signal.Signals(number).name}: stopping; waits at most 60 s for open rounds\n")
        assert not first.done()
        two.close()  # the round closes without it
        assert first.result()["w"][0] < 1
        assert one.version == 1
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (status, "")
    assert "Traceback" not in err


def test_a_second_signal_ends_it_at_once(process: Process) -> None:
    child = process(*SERVE, "--grace-seconds", "600")
    with deltaserve.connect(read_target(child), timeout_seconds=60.0) as client, ThreadPoolExecutor(1) as threads:
        model = client.create_model("m", ONE, policy=deltaserve.Sync(min_workers=2))
        with deltaserve.connect(client.target, timeout_seconds=0.1) as hasty:
            threads.submit(hasty.model("m").worker("one").step, ONE)
            while not any(session.waiting for session in model.info().sessions):
                sleep(0.01)
            child.send_signal(signal.SIGINT)
            wait_for_line(child, "stopping")
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=60) == 130


def test_flags_override_the_environment_and_the_log_says_so(process: Process) -> None:
    child = process(
        *SERVE,
        DELTASERVE_BIND="127.0.0.1:1",
        DELTASERVE_MEMORY_BYTES="1GiB",
        DELTASERVE_SESSIONS="7",
        DELTASERVE_THREADS="1",
    )
    with deltaserve.connect(read_target(child), timeout_seconds=60.0) as client:
        info = client.server_info()
    child.terminate()
    err = child.communicate(timeout=60)[1]
    assert (info.limits.memory_bytes, info.limits.sessions, info.threads) == (1 << 30, 7, 1)
    assert "bind = 127.0.0.1:0, from --bind" in err
    assert "memory_bytes = 1073741824, from DELTASERVE_MEMORY_BYTES" in err
    assert "sessions = 7, from DELTASERVE_SESSIONS" in err
    assert "127.0.0.1:1," not in err


def test_a_wrong_setting_in_the_environment_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTASERVE_SESSIONS", "many")
    ended = command("serve")
    assert ended.returncode == 2
    assert "--sessions" in ended.stderr
    assert ended.stderr.count("\n") == 1


# --- addresses


def test_a_port_in_use_is_one_line(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = command("serve", "--bind", bind)
    expected = f"deltaserve: cannot listen on {bind}: the port is in use; choose another with --bind HOST:PORT\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", expected)


def test_a_socket_in_use_is_one_line(command: Command, tmp_path: Path) -> None:
    with LocalServer(ServerConfig(bind=f"unix:{tmp_path}/socket", device="cpu")) as server:
        ended = command("serve", "--bind", server.target)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"deltaserve: cannot listen on {server.target}: another server uses it; choose")


# --- the data directory


def refused(command: Command, *options: str) -> tuple[int, str]:
    """Returns the exit status of a server that does not start, and its error line."""
    ended = command(*SERVE, "--log-level", "warning", *options)
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1  # at this log level the error is all
    return ended.returncode, ended.stderr


def test_a_stop_takes_last_snapshots(process: Process, tmp_path: Path) -> None:
    child = process(*SERVE, "--data-dir", str(tmp_path))
    train(read_target(child, tmp_path, "snapshot"), 5)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert re.search(r"model m: .*snapshot.* version 5", err)
    assert "SIGTERM: stopping; waits at most 5 s for open rounds, then takes last snapshots\n" in err


def test_snapshots_are_listed_and_taken(command: Command, tmp_path: Path) -> None:
    with LocalServer(ServerConfig(device="cpu", bind="127.0.0.1:0", data_dir=tmp_path)) as server:
        train(server.target, 3)
        listed = command("snapshots", "m", "--target", server.target)
        saved = command("snapshots", "m", "--save", "--target", server.target)
        status = command("status", "--target", server.target)
    assert listed.returncode == 0
    header, first = listed.stdout.splitlines()
    assert header.split() == ["SNAPSHOT", "VERSION", "SIZE", "TAKEN", "AT"]
    assert first.split()[:2] == ["1", "0"]
    assert [line.split()[1] for line in saved.stdout.splitlines()[1:]] == ["0", "3"]
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", saved.stdout)
    assert "durable   the last snapshot of each model\n" in status.stdout


def test_a_server_without_a_data_directory_has_no_snapshots(command: Command, target: str, model: str) -> None:
    with deltaserve.connect(target) as client:
        client.create_model(model, ONE)
    ended = command("snapshots", model, "--target", target)
    assert ended.returncode == 1
    assert "--data-dir" in ended.stderr


def test_a_directory_in_use_is_one_line(command: Command, tmp_path: Path) -> None:
    with LocalServer(ServerConfig(device="cpu", bind="127.0.0.1:0", data_dir=tmp_path)):
        status, line = refused(command, "--data-dir", str(tmp_path))
    assert status == 1
    assert f"data directory {tmp_path} is in use by another server (process " in line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--durability", "journal"], "durability"),
        (["--copy-to", "file:///tmp/copies"], "copy_to"),
        (["--snapshot-updates", "5"], "snapshot_updates"),
        (["--accept-data-loss"], "accept_data_loss"),
        (["--data-dir", ".", "--durability", "none"], "durability"),
        (["--data-dir", ""], "expected a directory, got ''"),
    ],
)
def test_settings_that_need_a_directory(command: Command, options: list[str], text: str) -> None:
    status, line = refused(command, *options)
    assert status == 2
    assert text in line


def test_an_unknown_url_for_copies_is_one_line(command: Command, tmp_path: Path) -> None:
    status, line = refused(command, "--data-dir", str(tmp_path), "--copy-to", "nowhere://at/all")
    assert status == 1
    assert "copies: nowhere://at/all: Protocol not known: nowhere" in line


def test_a_directory_that_is_a_file_is_one_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    status, line = refused(command, "--data-dir", str(file))
    assert status == 1
    assert f"data directory {file}: " in line


@pytest.mark.deep
def test_a_killed_server_recovers_every_acknowledged_push(process: Process, tmp_path: Path) -> None:
    options = ("--data-dir", str(tmp_path), "--durability", "fsync")
    child = process(*SERVE, *options)
    state = train(read_target(child, tmp_path, "fsync"), 5)
    child.kill()
    child.wait()
    again = process(*SERVE, *options)
    with deltaserve.connect(read_target(again, tmp_path, "fsync"), timeout_seconds=60.0) as client:
        recovered = client.model("m").pull_state()
    assert recovered.version == 5
    np.testing.assert_array_equal(recovered.weights["w"], state.weights["w"])


@pytest.mark.deep
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_it_during_recovery_without_loss(
    process: Process, tmp_path: Path, number: int, status: int
) -> None:
    options = ("--data-dir", str(tmp_path), "--durability", "journal")
    child = process(*SERVE, *options)
    target = read_target(child, tmp_path, "journal")
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        client.create_model("first", ONE)
    train(target, 12)
    child.kill()
    child.wait()
    child = process(*SERVE, *options, DELTASERVE_FAILPOINTS="recovery.replay=sleep(1)")
    wait_for_line(child, "model first")
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (status, "")
    assert f"{signal.Signals(number).name}: stopping before all models are recovered" in err
    assert "Traceback" not in err
    assert "model m" not in err
    again = process(*SERVE, *options)
    with deltaserve.connect(read_target(again, tmp_path, "journal"), timeout_seconds=60.0) as client:
        assert [(model.name, model.version) for model in client.models()] == [("first", 0), ("m", 12)]


@pytest.mark.deep
def test_a_corrupt_file_stops_the_start_unless_data_loss_is_accepted(
    process: Process, command: Command, tmp_path: Path
) -> None:
    options = ("--data-dir", str(tmp_path), "--durability", "journal")
    child = process(*SERVE, *options)
    train(read_target(child, tmp_path, "journal"), 5)
    child.kill()
    child.wait()
    journal = max((tmp_path / "models" / "m").glob("journal-*"))
    content = bytearray(journal.read_bytes())
    content[1000] ^= 1
    journal.write_bytes(content)
    status, line = refused(command, *options)
    assert status == 1
    assert str(journal) in line
    assert "--accept-data-loss" in line
    again = process(*SERVE, *options, "--accept-data-loss")
    with deltaserve.connect(read_target(again, tmp_path, "journal"), timeout_seconds=60.0) as client:
        assert client.model("m").info().version < 5
    assert journal.with_name(journal.name + ".corrupt").read_bytes() == content


@pytest.mark.deep
def test_copies_of_snapshots_are_a_data_directory(process: Process, tmp_path: Path) -> None:
    data, copies = tmp_path / "data", tmp_path / "copies"
    child = process(*SERVE, "--data-dir", str(data), "--copy-to", f"file://{copies}")
    state = train(read_target(child, data, "snapshot"), 4)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert f"file://{copies}" in err
    again = process(*SERVE, "--data-dir", str(copies))
    with deltaserve.connect(read_target(again, copies, "snapshot"), timeout_seconds=60.0) as client:
        recovered = client.model("m").pull_state()
    assert recovered.version == 4
    np.testing.assert_array_equal(recovered.weights["w"], state.weights["w"])
