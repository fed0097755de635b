"""Help, usage errors, and the form of all errors."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deltaserve_server.cli import run
from deltaserve_server.cli.options import parse_bytes

Command = Callable[..., "subprocess.CompletedProcess[str]"]

COMMANDS = [
    "serve", "train", "models", "status", "watch", "update", "pull", "snapshots", "export", "import", "delete",
    "health", "doctor",
]  # fmt: skip


def test_help_names_every_command(command: Command) -> None:
    ended = command("--help")
    assert ended.returncode == 0
    assert all(f"│ {name}" in ended.stdout for name in COMMANDS)
    assert max(map(len, ended.stdout.splitlines())) <= 80


def test_no_command_prints_the_help_too(command: Command) -> None:
    assert command().stdout.strip() == command("--help").stdout.strip()


@pytest.mark.parametrize("name", [*COMMANDS, "train digits", "train airfoil"])
def test_every_command_has_a_help_that_fits_80_columns(command: Command, name: str) -> None:
    ended = command(*name.split(), "--help")
    assert ended.returncode == 0
    assert f"Usage: deltaserve {name}" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "…" not in ended.stdout  # nothing is cut off


def test_version(command: Command) -> None:
    import deltaserve

    assert command("--version").stdout == f"deltaserve {deltaserve.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see deltaserve --help"),
        (
            ["serve", "--durability", "most"],
            "'most' is not one of 'none', 'snapshot', 'journal', 'fsync'; see deltaserve serve --help",
        ),
        (["train"], "nothing to train: choose deltaserve train digits or deltaserve train airfoil"),
        (["train", "digits", "--foo"], "No such option: --foo; see deltaserve train digits --help"),
        (["train", "digits", "--workers", "0"], "--workers"),
        (
            ["train", "digits", "--policy", "maybe"],
            "expected a policy, sync, async or bounded, as in sync:min_workers=4, got 'maybe'",
        ),
        (["train", "digits", "--policy", "sync:min_workers=3"], "a round of 3 workers never closes with 2"),
        (["train", "digits", "--policy", "sync:quorum=3"], "a round of 3 workers never closes with 2"),
        (["train", "digits", "--optimizer", "adam:rho=1"], "adam has no setting 'rho'; its settings are lr, beta1"),
        (
            ["train", "airfoil", "--optimizer", "lion"],  # the server has it, the recipe does not
            "expected an optimizer, adadelta, sgd, momentum, adagrad, rmsprop, adam or adamw, as in",
        ),
        (["update", "m"], "nothing to change: give --policy or --set NAME=VALUE"),
        (["update", "m", "--group", "0", "--policy", "sync"], "--group needs a hyperparameter to change: add --set"),
        (["update", "m", "--policy", "bounded:slak=2"], "bounded has no setting 'slak'; its settings are slack"),
        (["watch"], "MODEL"),
        (["watch", "m", "--count", "0"], "--count"),
        (["train", "airfoil", "--recipe", "other"], "--recipe"),
        (["train", "digits", "--target", "nowhere"], "'nowhere' is no address"),
        (["status", "--target", "host:99999"], "'host:99999' is no address"),
        (["serve", "--memory-bytes", "lots"], "expected a number of bytes, as 1073741824 or 8GiB, got 'lots'"),
        (["pull"], "MODEL"),
        (["pull", "m"], "--output"),
        (["pull", "m", "-o", "file", "--state"], "No such option: --state"),
        (["export"], "MODEL"),
        (["export", "m"], "--output"),
        (["import"], "FILE"),
        (["delete"], "MODEL"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(command: Command, arguments: list[str], text: str) -> None:
    ended = command(*arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("deltaserve: ")
    assert ended.stderr.count("\n") == 1
    assert text in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "--target", "127.0.0.1:9"],
        ["status", "--target", "127.0.0.1:9"],
        ["status", "m", "--target", "127.0.0.1:9"],
        ["delete", "m", "--target", "127.0.0.1:9"],
        ["update", "m", "--set", "lr=1", "--target", "127.0.0.1:9"],
        ["watch", "m", "--target", "127.0.0.1:9"],
        ["export", "m", "-o", "file", "--target", "127.0.0.1:9"],
        ["health", "127.0.0.1:9"],
    ],
)
def test_no_server_is_one_line_and_status_1(command: Command, arguments: list[str]) -> None:
    ended = command(*arguments)
    assert ended.returncode == 1
    assert ended.stderr == "deltaserve: 127.0.0.1:9 does not answer (UNAVAILABLE): is a server running there?\n"


def test_training_waits_for_a_server_until_the_timeout(command: Command) -> None:
    ended = command("train", "digits", "--target", "127.0.0.1:9", "--timeout", "0.2")
    assert ended.returncode == 1
    assert ended.stderr.startswith("deltaserve: cannot reach a server at 127.0.0.1:9: is it running there?")


def test_an_unexpected_error_is_one_line_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise LookupError("of\nsome kind")

    monkeypatch.setattr("deltaserve_server.cli.command", broken)
    ended = command("models")
    assert ended.returncode == 1
    assert ended.stderr == (
        "deltaserve: LookupError: of some kind (a bug in deltaserve; DELTASERVE_TRACEBACK=1 shows the traceback)\n"
    )
    monkeypatch.setenv("DELTASERVE_TRACEBACK", "1")
    with pytest.raises(LookupError):
        run(["models"])


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "torch"), ("matplotlib.figure", "train"), ("safetensors", "server")]
)
def test_a_missing_package_is_named_with_its_extra(
    command: Command, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr("deltaserve_server.cli.command", missing)
    assert (
        command("models").stderr == f"deltaserve: this needs the package {module}: pip install 'deltaserve[{extra}]'\n"
    )


def test_interrupt_is_quiet(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deltaserve_server.cli.command", interrupted)
    ended = command("models")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "deltaserve", "serve", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.wait()
    child.stderr.close()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("4096", 4096),
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("2g", 2 * 10**9),
        ("1.5KiB", 1536),
        ("3MB", 3 * 10**6),
    ],
)
def test_numbers_of_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from deltaserve_server.cli import run; run(['--help']);"
        "sys.exit(str({'torch', 'numba', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert ended.stderr == "set()\n"
