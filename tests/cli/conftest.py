"""A server for all tests, and ways to run commands: in this process, or as processes for signals and exits."""

import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.cli.transfer import GROUP_OF, GROUPS, numbers, step

import deltaserve
from deltaserve_server import LocalServer
from deltaserve_server.cli import run

DELTASERVE = [sys.executable, "-m", "deltaserve"]


Command = Callable[..., "subprocess.CompletedProcess[str]"]
Process = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    with LocalServer() as server:
        yield server.target


@pytest.fixture
def model() -> str:
    return f"model-{secrets.token_hex(6)}"


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the settings of the environment, and restores what a command sets there."""
    for name in [name for name in os.environ if name.startswith("DELTASERVE_")]:
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs a command in this process."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        status = run(arguments)
        written = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, written.out, written.err)

    level = logging.getLogger().level
    yield call
    logging.getLogger().setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def process() -> Iterator[Process]:
    """Starts commands as processes, and kills those that are left at the end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DELTASERVE_")}
    with ExitStack() as started:

        def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
            child = subprocess.Popen(
                [*DELTASERVE, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**clean, "PYTHONUNBUFFERED": "1", **environment},
            )
            started.callback(child.communicate)
            started.callback(child.kill)
            return child

        yield start


@pytest.fixture
def client(target: str, model: str) -> Iterator[deltaserve.Client]:
    """A client. The models of a test are deleted after it, because the server takes 64."""
    with deltaserve.connect(target, timeout_seconds=60.0) as connected:
        yield connected
        for held in connected.models():
            if held.name.startswith(model):
                connected.delete_model(held.name)


@pytest.fixture
def trained(client: deltaserve.Client, model: str) -> deltaserve.Model:
    """A model of four tensors in two groups, after five updates, of which one tensor had three."""
    policy = deltaserve.Async(max_staleness=7, damping=True)
    made = client.create_model(model, numbers(0), groups=GROUPS, group_of=GROUP_OF, policy=policy)
    step(made, range(5))
    return made


@pytest.fixture
def file(command: Command, target: str, trained: deltaserve.Model, tmp_path: Path) -> Path:
    """What export wrote of `trained`."""
    path = tmp_path / "state.safetensors"
    assert command("export", trained.name, "-o", str(path), "--target", target).returncode == 0
    return path
