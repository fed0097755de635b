"""`deltaserve serve --data-dir` as a user meets it: what it keeps, what it says when it cannot, and its snapshots."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deltaserve

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]

ONE = {"w": np.ones(3, np.float32)}


class Serving:
    """A server on a data directory."""

    def __init__(self, process: Process, folder: Path, *options: str) -> None:
        serve = ("serve", "--bind", "127.0.0.1:0", "--device", "cpu", "--data-dir", str(folder), *options)
        self.child = process(*serve)
        assert self.child.stdout
        self.lines = [self.child.stdout.readline() for _ in range(5)]
        self.target = self.lines[3].split('"')[1]

    def kill(self) -> None:
        self.child.kill()
        self.child.communicate()


def refused(process: Process, *options: str) -> tuple[int, str]:
    """Returns the status of a server that does not start, and the last line of what it says."""
    child = process("serve", "--bind", "127.0.0.1:0", "--device", "cpu", *options)
    out, err = child.communicate(timeout=30)
    assert out == ""
    assert "Traceback" not in err
    return child.returncode, err.splitlines()[-1]


def trained(target: str, steps: int) -> deltaserve.ModelState:
    with deltaserve.connect(target, timeout_seconds=20) as client:
        model = client.create_model("m", ONE)
        with model.worker("a") as worker:
            for _ in range(steps):
                worker.step(ONE)
        return model.pull_state()


def test_it_says_what_it_keeps_and_a_killed_server_has_it_again(process: Process, tmp_path: Path) -> None:
    serving = Serving(process, tmp_path, "--durability", "fsync")
    assert serving.lines[2] == f"keeps    fsync in {tmp_path}\n"
    state = trained(serving.target, 5)
    serving.kill()
    again = Serving(process, tmp_path, "--durability", "fsync")
    with deltaserve.connect(again.target, timeout_seconds=20) as client:
        kept = client.model("m").pull_state()
    assert kept.version == 5
    np.testing.assert_array_equal(kept.weights["w"], state.weights["w"])


def test_a_folder_is_kept_by_snapshots_unless_more_is_asked_for(process: Process, tmp_path: Path) -> None:
    serving = Serving(process, tmp_path, "--snapshot-updates", "2")
    assert serving.lines[2] == f"keeps    snapshot in {tmp_path}\n"
    trained(serving.target, 5)
    serving.child.send_signal(signal.SIGTERM)
    _, err = serving.child.communicate(timeout=20)
    assert serving.child.returncode == 0
    assert re.search(r"model m: snapshot \d+ of version 5", err)
    assert "SIGTERM: stopping; rounds go on for at most 5 s, then last snapshots are written\n" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_stops_while_it_still_reads(process: Process, tmp_path: Path, number: int, status: int) -> None:
    """Nothing changes by that: neither what a model is, nor who works on it."""
    serving = Serving(process, tmp_path, "--durability", "journal")
    with deltaserve.connect(serving.target, timeout_seconds=20) as client:
        client.create_model("first", ONE)
    trained(serving.target, 12)
    serving.kill()
    options = ("serve", "--bind", "127.0.0.1:0", "--device", "cpu", "--data-dir", str(tmp_path))
    child = process(*options, "--durability", "journal", DELTASERVE_FAILPOINTS="recovery.replay=sleep(1)")
    assert child.stderr
    while "model first recovered" not in (line := child.stderr.readline()):
        assert line
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (status, "")
    assert f"{signal.Signals(number).name}: stopping, before all models were read" in err
    assert "Traceback" not in err
    assert "model m" not in err
    again = Serving(process, tmp_path, "--durability", "journal")
    with deltaserve.connect(again.target, timeout_seconds=20) as client:
        assert [(model.name, model.version) for model in client.models()] == [("first", 0), ("m", 12)]


def test_snapshots_are_listed_and_taken(process: Process, command: Command, tmp_path: Path) -> None:
    serving = Serving(process, tmp_path, "--durability", "journal")
    trained(serving.target, 3)
    listed = command("snapshots", "m", "--target", serving.target)
    assert listed.returncode == 0
    header, first = listed.stdout.splitlines()
    assert header.split() == ["SNAPSHOT", "VERSION", "SIZE", "TAKEN", "AT"]
    assert first.split()[:2] == ["1", "0"]
    saved = command("snapshots", "m", "--save", "--target", serving.target)
    assert [line.split()[1] for line in saved.stdout.splitlines()[1:]] == ["0", "3"]
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", saved.stdout)


def test_without_a_data_directory_there_are_none(command: Command, target: str, model: str) -> None:
    with deltaserve.connect(target) as client:
        client.create_model(model, ONE)
    answer = command("snapshots", model, "--target", target)
    assert answer.returncode == 1
    assert "the server has no data directory: start it with --data-dir to have snapshots" in answer.stderr


def test_a_directory_has_one_server(process: Process, tmp_path: Path) -> None:
    serving = Serving(process, tmp_path)
    status, line = refused(process, "--data-dir", str(tmp_path))
    assert status == 1
    assert f"data directory {tmp_path} is in use by another server (process {serving.child.pid}): give each its" in line
    serving.kill()
    Serving(process, tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--durability", "journal"],
            "durability journal: needs a data directory; name one, as in --data-dir DIR",
        ),
        (["--copy-to", "file:///tmp/copies"], "copy_to: needs a data directory"),
        (["--snapshot-updates", "5"], "snapshot_updates: needs a data directory"),
        (["--accept-data-loss"], "accept_data_loss: needs a data directory"),
        (
            ["--data-dir", ".", "--durability", "none"],
            "durability: expected snapshot, journal or fsync with a data directory, got none",
        ),
        (["--data-dir", ""], "'' is no folder"),
    ],
)
def test_settings_that_need_a_directory_say_so(process: Process, options: list[str], text: str) -> None:
    status, line = refused(process, *options)
    assert status == 2
    assert text in line


def test_a_place_for_copies_that_nobody_knows_is_told(process: Process, tmp_path: Path) -> None:
    status, line = refused(process, "--data-dir", str(tmp_path), "--copy-to", "nowhere://at/all")
    assert status == 1
    assert "copies: nowhere://at/all: Protocol not known: nowhere" in line


def test_a_directory_that_is_a_file_is_told(process: Process, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    status, line = refused(process, "--data-dir", str(file))
    assert status == 1
    assert f"data directory {file}: " in line


def test_what_is_corrupt_stops_the_start_and_is_named(process: Process, tmp_path: Path) -> None:
    serving = Serving(process, tmp_path, "--durability", "journal")
    trained(serving.target, 5)
    serving.kill()
    journal = max((tmp_path / "models" / "m").glob("journal-*"))
    content = bytearray(journal.read_bytes())
    content[1000] ^= 1
    journal.write_bytes(content)
    status, line = refused(process, "--data-dir", str(tmp_path), "--durability", "journal")
    assert status == 1
    assert re.search(
        rf"corrupt: {journal}: the (checksum of record \d is wrong|record at byte \d+ is bad); start", line
    )
    assert "start with --accept-data-loss to go on with what is good" in line
    again = Serving(process, tmp_path, "--durability", "journal", "--accept-data-loss")
    with deltaserve.connect(again.target, timeout_seconds=20) as client:
        assert client.model("m").info().version < 5
    assert journal.with_name(journal.name + ".corrupt").read_bytes() == content


def test_snapshots_are_copied_and_the_copies_are_a_data_directory(process: Process, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    serving = Serving(process, tmp_path / "data", "--copy-to", f"file://{copies}")
    state = trained(serving.target, 4)
    serving.child.send_signal(signal.SIGTERM)
    _, err = serving.child.communicate(timeout=20)
    assert f"snapshot 2 of model m is at file://{copies}" in err
    again = Serving(process, copies)
    with deltaserve.connect(again.target, timeout_seconds=20) as client:
        kept = client.model("m").pull_state()
    assert kept.version == 4
    np.testing.assert_array_equal(kept.weights["w"], state.weights["w"])
