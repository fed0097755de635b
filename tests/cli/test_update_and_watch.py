"""`update` and `watch`: what changes, what is shown of updates as they happen, and how watching ends."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from queue import SimpleQueue
from time import monotonic

import numpy as np
import pytest

import deltaserve
from deltaserve_server import LocalServer
from deltaserve_server.cli import run

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def created(target: str, model: str) -> Iterator[deltaserve.Model]:
    """A model of two parameter groups."""
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        yield client.create_model(
            model,
            {"w": np.zeros(2), "b": np.zeros(1)},
            groups=[deltaserve.Adadelta(rho=0.95), deltaserve.Adadelta(lr=0.25)],
            group_of={"b": 1},
        )


def step(worker: deltaserve.Worker) -> None:
    worker.step({"w": [3.0, 0.0], "b": [4.0]})


# --- update


def test_update_of_the_policy_shows_the_new_settings(command: Command, target: str, created: deltaserve.Model) -> None:
    text = "sync:min_workers=3,quorum=4,reduction=trimmed_mean,trim=1"
    ended = command("update", created.name, "--policy", text, "--target", target)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        f"model      {created.name}",
        "from       version 1 on",
        "optimizer  adadelta",
        f"policy     {text}",
        "",
        "GROUP    LR   RHO    EPS  WEIGHT_DECAY  MAXIMIZE",
        "    0   1.0  0.95  1e-06           0.0  no",
        "    1  0.25   0.9  1e-06           0.0  no",
    ]
    assert created.info().policy == deltaserve.Sync(min_workers=3, quorum=4, reduction="trimmed_mean", trim=1)


def test_update_of_hyperparameters_leaves_the_others(command: Command, target: str, created: deltaserve.Model) -> None:
    with created.worker() as worker:
        step(worker)
        ended = command("update", created.name, "--set", "lr=0.5,eps=1e-5", "--target", target)
        assert "from       version 2 on" in ended.stdout
        assert created.info().groups == (
            deltaserve.Adadelta(lr=0.5, rho=0.95, eps=1e-5),
            deltaserve.Adadelta(lr=0.5, eps=1e-5),
        )
        step(worker)
        assert worker.last_result is not None
        assert worker.last_result.hyperparameters == created.info().groups


def test_update_of_one_group(command: Command, target: str, created: deltaserve.Model) -> None:
    arguments = ("--group", "1", "--set", "rho=0.5,weight_decay=0.1", "--policy", "bounded:slack=2")
    assert command("update", created.name, *arguments, "--target", target).returncode == 0
    assert created.info().groups == (
        deltaserve.Adadelta(rho=0.95),
        deltaserve.Adadelta(lr=0.25, rho=0.5, weight_decay=0.1),
    )
    assert created.info().policy == deltaserve.Bounded(slack=2)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--group", "2", "--set", "lr=1"], 2, "--group: expected 0 to 1, got 2"),
        (["--set", "lr=-1"], 1, "lr"),
        (["--set", "lr=much"], 2, "--set: lr: expected a number, got 'much'"),
        (["--set", "lr"], 2, "--set: lr: expected lr=VALUE, once"),
        (
            ["--set", "momentum=0.9"],
            2,
            "--set: adadelta has no setting 'momentum'; its settings are lr, rho, eps, weight_decay, maximize",
        ),
        (["--policy", "sync:quorum=2,min_workers=3"], 1, "policy.sync.quorum"),
    ],
)
def test_a_value_out_of_range_is_one_line_and_changes_nothing(
    command: Command, target: str, created: deltaserve.Model, arguments: list[str], status: int, text: str
) -> None:
    ended = command("update", created.name, *arguments, "--target", target)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (status, "", 1)
    assert text in ended.stderr
    assert (created.info().groups, created.info().policy) == (created.groups, created.policy)


def test_update_checks_against_the_models_own_optimizer(
    command: Command, client: deltaserve.Client, model: str
) -> None:
    made = client.create_model(model, {"w": [1.0]}, optimizer=deltaserve.AdamW())
    arguments = ("update", model, "--target", client.target, "--set")
    changed = command(*arguments, "beta2=0.99,weight_decay=0")
    assert (changed.returncode, changed.stderr) == (0, "")
    assert "optimizer  adamw\n" in changed.stdout
    assert made.info().groups == (deltaserve.AdamW(beta2=0.99, weight_decay=0.0),)
    unknown = command(*arguments, "rho=0.9")
    assert unknown.returncode == 2
    assert "adamw has no setting 'rho'; its settings are lr, beta1, beta2, eps" in unknown.stderr
    # Whether there is a slot for it is fixed when a model is created.
    fixed = command(*arguments, "amsgrad=true")
    assert (fixed.returncode, fixed.stderr.count("\n")) == (1, 1)
    assert "adamw with amsgrad" in fixed.stderr
    assert made.info().groups == (deltaserve.AdamW(beta2=0.99, weight_decay=0.0),)


# --- watch


class Lines(io.StringIO):
    """A standard output whose lines can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._lines.put(line)
        return len(text)

    def next(self) -> str:
        return self._lines.get(timeout=60)

    def left(self) -> list[str]:
        return [self._lines.get_nowait() for _ in range(self._lines.qsize())]


Watch = Callable[..., tuple[Lines, "Future[int]", list[str]]]


@pytest.fixture
def watch(target: str, clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Runs `watch` in a thread; returns its output, its exit status, and the lines before the first update."""
    with ThreadPoolExecutor(1) as thread:

        def start(model: str, *arguments: str, where: str = target) -> tuple[Lines, "Future[int]", list[str]]:
            out = Lines()
            monkeypatch.setattr(sys, "stdout", out)
            status = thread.submit(run, ["watch", model, "--target", where, *arguments])
            return out, status, [out.next() for _ in range(1 if "--json" in arguments else 2)]

        yield start


def test_watch_prints_a_line_for_each_update_as_it_happens(watch: Watch, created: deltaserve.Model) -> None:
    out, status, head = watch(created.name, "--count", "2")
    assert head[0] == f"{created.name} is at version 0, adadelta, async"
    assert head[1].split() == ["VERSION", "LR", "UPDATE", "GRADIENTS", "STALE", "WORKERS"]
    with created.worker("ann") as ann, created.worker("bob") as bob:
        bob.pull()
        step(ann)
        assert out.next().split() == ["1", "0.25..1", "0.00454", "5", "0", "ann"]
        step(bob)
        assert out.next().split()[3:] == ["5", "1", "bob"]
    assert status.result(60) == 0


def test_watch_abbreviates_many_workers_to_80_columns(watch: Watch, target: str, model: str) -> None:
    with deltaserve.connect(target, timeout_seconds=60.0) as client, ThreadPoolExecutor(12) as threads:
        many = client.create_model(model, {"w": np.zeros(1)}, policy=deltaserve.Sync(min_workers=12))
        out, status, _ = watch(model, "--count", "1")
        workers = [many.worker(f"machine-{number:02}") for number in range(12)]
        list(threads.map(lambda w: w.step({"w": [1.0 + w.rank]}), workers))
        assert status.result(60) == 0
    (line,) = out.left()
    assert line.endswith("1..12      0  machine-00 and 11 more")
    assert len(line) <= 80


def test_watch_in_json_has_the_events_keys(watch: Watch, created: deltaserve.Model) -> None:
    out, status, head = watch(created.name, "--json", "--count", "1")
    keys = [field.name for field in fields(deltaserve.ModelEvent)]
    first = json.loads(head[0])
    assert list(first) == keys
    assert (first["version"], first["contributions"], first["update_norm"]) == (0, [], None)
    with created.worker("ann") as worker:
        step(worker)
        assert status.result(60) == 0
    (line,) = out.left()
    event = json.loads(line)
    assert list(event) == keys
    assert event["hyperparameters"] == [asdict(group) for group in created.groups]
    (push,) = event["contributions"]
    assert (push["worker"], push["sequence"], push["weight"], push["gradient_norm"]) == ("ann", 1, 1.0, 5.0)


def test_watch_shows_a_version_without_an_update_and_does_not_count_it(watch: Watch, created: deltaserve.Model) -> None:
    out, status, _ = watch(created.name, "--count", "1")
    created.put_state(created.pull_state())
    with created.worker() as worker:
        step(worker)
        assert status.result(60) == 0
    first, second = out.left()
    assert first.startswith("        1  no update: ")
    assert second.split()[0] == "2"


def test_watch_reports_missed_events(
    command: Command, target: str, created: deltaserve.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real pipe is slow enough for this, so the events are fabricated."""
    push = deltaserve.Contribution(worker="a", epoch=1, sequence=9, staleness=0, weight=1.0, gradient_norm=2.0)
    group = (deltaserve.Adadelta(),)
    events = [
        deltaserve.ModelEvent(version=1, contributions=(), hyperparameters=(), update_norm=None, missed=0),
        deltaserve.ModelEvent(version=9, contributions=(push,), hyperparameters=group, update_norm=1e-5, missed=7),
    ]
    monkeypatch.setattr(deltaserve.Model, "watch", lambda _: iter(events))
    out = command("watch", created.name, "--target", target).stdout
    assert out.splitlines()[2:] == [
        "      ...  7 events missed: they came too fast",
        "        9       1     1e-05             2      0  a",
    ]


def test_a_deleted_model_ends_watch(watch: Watch, created: deltaserve.Model, capfd: pytest.CaptureFixture[str]) -> None:
    out, status, _ = watch(created.name)
    created.delete()
    assert (status.result(60), out.left()) == (1, [])
    assert capfd.readouterr().err == f"deltaserve: no model is named '{created.name}'\n"


def test_a_lost_server_ends_watch(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deltaserve_server.cli.watch.PATIENCE_SECONDS", 0.2)
    with LocalServer() as server, deltaserve.connect(server.target) as client:
        client.create_model("m", {"w": [1.0]})
        target = server.target
        out, status, _ = watch("m", where=target)
    assert (status.result(60), out.left()) == (1, [])
    err = capfd.readouterr().err
    assert err.splitlines()[-1].startswith(f"deltaserve: cannot reach a server at {target}: ")
    assert "Traceback" not in err


def watch_process(process: Process, target: str, model: str) -> "subprocess.Popen[str]":
    """Starts `watch` as a process; returns when it has printed the first lines, which it must flush."""
    child = process("watch", model, "--target", target, PYTHONUNBUFFERED="")
    assert child.stdout is not None
    assert child.stdout.readline().startswith(model)
    assert child.stdout.readline().split()[0] == "VERSION"
    return child


def test_an_interrupt_ends_watch_quietly(process: Process, target: str, created: deltaserve.Model) -> None:
    child = watch_process(process, target, created.name)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "")


def test_a_reader_that_leaves_ends_watch_quietly(process: Process, target: str, created: deltaserve.Model) -> None:
    child = watch_process(process, target, created.name)
    assert child.stdout is not None
    child.stdout.close()
    with created.worker() as worker:
        deadline = monotonic() + 60
        while child.poll() is None and monotonic() < deadline:
            step(worker)
    assert child.returncode == 1
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stdout = None  # or communicate() would read it at the end
