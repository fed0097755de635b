"""A server, and ways to run commands: in this process for what they print, as processes for signals and exit."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

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
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process, without the environment's settings."""
    for name in [name for name in os.environ if name.startswith("DELTASERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        status = run(arguments)
        written = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, written.out, written.err)

    return call


@pytest.fixture
def process() -> Iterator[Process]:
    """Starts a command as a process; what is left of it at the end is killed."""
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
