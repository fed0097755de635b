"""`update` and `watch` against a real server: what changes, what is shown of it as it happens, and how it ends."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import numpy as np
import pytest

import deltaserve
from deltaserve_server import LocalServer

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def made(target: str, model: str) -> Iterator[deltaserve.Model]:
    """A model of two parameter groups."""
    with deltaserve.connect(target, timeout_seconds=10.0) as client:
        yield client.create_model(
            model,
            {"w": np.zeros(2), "b": np.zeros(1)},
            groups=[deltaserve.Hyperparameters(rho=0.95), deltaserve.Hyperparameters(lr=0.25)],
            group_of={"b": 1},
        )


def step(worker: deltaserve.Worker) -> None:
    worker.step({"w": [3.0, 0.0], "b": [4.0]})


# --- update


def test_update_of_the_policy_shows_what_is_in_place(command: Command, target: str, made: deltaserve.Model) -> None:
    text = "sync:min_workers=3,quorum=4,reduction=trimmed_mean,trim=1"
    ended = command("update", made.name, "--policy", text, "--target", target)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        f"model   {made.name}",
        "from    version 1 on",
        f"policy  {text}",
        "",
        "GROUP    LR   RHO    EPS  WEIGHT_DECAY  MAXIMIZE",
        "    0   1.0  0.95  1e-06           0.0  no",
        "    1  0.25   0.9  1e-06           0.0  no",
    ]
    assert made.info().policy == deltaserve.Sync(min_workers=3, quorum=4, reduction="trimmed_mean", trim=1)


def test_update_of_hyperparameters_leaves_the_others(command: Command, target: str, made: deltaserve.Model) -> None:
    with made.worker() as worker:
        step(worker)
        ended = command("update", made.name, "--lr", "0.5", "--eps", "1e-5", "--target", target)
        assert "from    version 2 on" in ended.stdout
        assert made.info().groups == (
            deltaserve.Hyperparameters(lr=0.5, rho=0.95, eps=1e-5),
            deltaserve.Hyperparameters(lr=0.5, eps=1e-5),
        )
        step(worker)
        assert worker.last_result is not None
        assert worker.last_result.hyperparameters == made.info().groups


def test_update_of_one_group(command: Command, target: str, made: deltaserve.Model) -> None:
    arguments = ("--group", "1", "--rho", "0.5", "--weight-decay", "0.1", "--policy", "bounded:slack=2")
    assert command("update", made.name, *arguments, "--target", target).returncode == 0
    assert made.info().groups == (
        deltaserve.Hyperparameters(rho=0.95),
        deltaserve.Hyperparameters(lr=0.25, rho=0.5, weight_decay=0.1),
    )
    assert made.info().policy == deltaserve.Bounded(slack=2)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--group", "2", "--lr", "1"], 2, "--group: expected 0 to 1, got 2"),
        (["--lr", "-1"], 1, "lr: expected >= 0"),
        (["--policy", "sync:quorum=2,min_workers=3"], 1, "policy.sync.quorum: expected min_workers (3) to 65536"),
    ],
)
def test_what_is_out_of_range_is_one_line_and_changes_nothing(
    command: Command, target: str, made: deltaserve.Model, arguments: list[str], status: int, text: str
) -> None:
    ended = command("update", made.name, *arguments, "--target", target)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (status, "", 1)
    assert text in ended.stderr
    assert (made.info().groups, made.info().policy) == (made.groups, made.policy)


# --- watch


def watching(process: Process, target: str, model: str, *arguments: str) -> tuple["subprocess.Popen[str]", list[str]]:
    """Starts to watch; returns when it has told where the model stands, with those lines."""
    child = process("watch", model, "--target", target, *arguments, PYTHONUNBUFFERED="")
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(1 if "--json" in arguments else 2)]
    return child, lines


def test_watch_shows_each_update_in_a_line_as_it_happens(process: Process, target: str, made: deltaserve.Model) -> None:
    child, head = watching(process, target, made.name, "--count", "2")
    assert head[0] == f"{made.name} is at version 0, async\n"
    assert head[1].split() == ["VERSION", "LR", "UPDATE", "GRADIENTS", "STALE", "WORKERS"]
    assert child.stdout is not None
    with made.worker("ann") as ann, made.worker("bob") as bob:
        bob.pull()
        step(ann)
        # Flushed: this line is here before the next update happens.
        assert child.stdout.readline().split() == ["1", "0.25..1", "0.00454", "5", "0", "ann"]
        step(bob)
        assert child.stdout.readline().split()[3:] == ["5", "1", "bob"]
    assert child.wait(timeout=20) == 0


def test_watch_shortens_many_workers_and_fits_80_columns(process: Process, target: str, model: str) -> None:
    with deltaserve.connect(target, timeout_seconds=10.0) as client, ThreadPoolExecutor(12) as threads:
        many = client.create_model(model, {"w": np.zeros(1)}, policy=deltaserve.Sync(min_workers=12))
        child, _ = watching(process, target, model, "--count", "1")
        workers = [many.worker(f"machine-{number:02}") for number in range(12)]
        list(threads.map(lambda w: w.step({"w": [1.0 + w.rank]}), workers))
        out, err = child.communicate(timeout=20)
    assert err == ""
    assert out.rstrip().endswith("1..12      0  machine-00 and 11 more")
    assert len(out.rstrip()) <= 80


def test_watch_in_json_has_the_events_keys(process: Process, target: str, made: deltaserve.Model) -> None:
    child, head = watching(process, target, made.name, "--json", "--count", "1")
    keys = [field.name for field in fields(deltaserve.ModelEvent)]
    first = json.loads(head[0])
    assert list(first) == keys
    assert (first["version"], first["contributions"], first["update_norm"]) == (0, [], None)
    with made.worker("ann") as worker:
        step(worker)
        out, _ = child.communicate(timeout=20)
        assert out.count("\n") == 1
        event = json.loads(out)
        assert list(event) == keys
        assert event["hyperparameters"] == [asdict(group) for group in made.groups]
        (push,) = event["contributions"]
        assert (push["worker"], push["sequence"], push["weight"], push["gradient_norm"]) == ("ann", 1, 1.0, 5.0)


def test_watch_tells_a_version_without_an_update_and_does_not_count_it(
    process: Process, target: str, made: deltaserve.Model
) -> None:
    child, _ = watching(process, target, made.name, "--count", "1")
    made.put_state(made.pull_state())
    with made.worker() as worker:
        step(worker)
        out, _ = child.communicate(timeout=20)
    first, second = out.splitlines()
    assert first.startswith("        1  no update: ")
    assert second.split()[0] == "2"


def test_watch_tells_what_was_missed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real path needs a slower reader than any pipe makes; here the events are made up."""
    push = deltaserve.Contribution(worker="a", epoch=1, sequence=9, staleness=0, weight=1.0, gradient_norm=2.0)
    group = (deltaserve.Hyperparameters(),)
    events = [
        deltaserve.ModelEvent(version=1, contributions=(), hyperparameters=(), update_norm=None, missed=0),
        deltaserve.ModelEvent(version=9, contributions=(push,), hyperparameters=group, update_norm=1e-5, missed=7),
    ]
    monkeypatch.setattr(deltaserve.Model, "watch", lambda _: iter(events))
    with LocalServer() as server, deltaserve.connect(server.target) as client:
        client.create_model("m", {"w": [1.0]})
        out = command("watch", "m", "--target", server.target).stdout
    assert out.splitlines()[2:] == [
        "      ...  7 missed, too fast to be told",
        "        9       1     1e-05             2      0  a",
    ]


def test_an_interrupt_ends_watch_quietly(process: Process, target: str, made: deltaserve.Model) -> None:
    child, _ = watching(process, target, made.name)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (130, "", "")


def test_a_reader_that_leaves_ends_watch_quietly(process: Process, target: str, made: deltaserve.Model) -> None:
    child, _ = watching(process, target, made.name)
    assert child.stdout is not None
    child.stdout.close()
    with made.worker() as worker:
        deadline = time.monotonic() + 20
        while child.poll() is None and time.monotonic() < deadline:
            step(worker)
    assert child.returncode == 1
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stdout = None  # or communicate() would read it at the end


def test_a_model_that_is_deleted_ends_watch(process: Process, target: str, made: deltaserve.Model) -> None:
    child, _ = watching(process, target, made.name)
    made.delete()
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (1, "", f"deltaserve: no model is named '{made.name}'\n")


def test_a_server_that_is_gone_ends_watch(process: Process) -> None:
    with LocalServer() as server, deltaserve.connect(server.target) as client:
        client.create_model("m", {"w": [1.0]})
        target = server.target
        child, _ = watching(process, target, "m")
    out, err = child.communicate(timeout=40)
    assert (child.returncode, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"deltaserve: cannot reach a server at {target}: is it running there?")
    assert "Traceback" not in err
