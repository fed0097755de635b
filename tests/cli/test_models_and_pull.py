"""`models`, `status`, `delete` and `pull`."""

import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import deltaserve
from deltaserve_server.cli.display import format_bytes, format_seconds, table

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def trained(target: str, model: str) -> str:
    """A model of two tensors and two updates."""
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        tensors = {"w": np.ones((3, 2), np.float32), "b": np.zeros((), np.float32)}
        policy = deltaserve.Sync(round_timeout_seconds=9.0)
        created = client.create_model(model, tensors, optimizer=deltaserve.Adadelta(rho=0.95), policy=policy)
        with created.worker() as worker:
            for _ in range(2):
                worker.step({"w": np.ones((3, 2), np.float32), "b": np.array(0.5, np.float32)})
    return model


def test_models_lists_each_in_a_line(command: Command, target: str, trained: str) -> None:
    lines = command("models", "--target", target).stdout.splitlines()
    assert lines[0].split() == ["MODEL", "ELEMENTS", "TENSORS", "SESSIONS", "VERSION", "DURABLE", "OPTIMIZER", "POLICY"]
    line = next(line for line in lines if line.startswith(trained))
    assert line.split() == [trained, "7", "2", "0", "2", "none", "adadelta", "sync:round_timeout_seconds=9"]


def test_the_target_comes_from_the_environment_unless_a_flag_is_given(
    command: Command, target: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTASERVE_TARGET", target)
    assert trained in command("models").stdout
    assert command("models", "--target", "127.0.0.1:9").returncode == 1


def test_status_of_the_server(command: Command, target: str, trained: str) -> None:
    out = command("status", "--target", target).stdout
    assert f"server    {target}, deltaserve {deltaserve.__version__}, up " in out
    assert "device    cpu: " in out
    assert "free" in out
    assert trained in out


def test_status_of_a_model_shows_its_workers(command: Command, target: str, trained: str) -> None:
    with (
        deltaserve.connect(target, timeout_seconds=60.0) as client,
        client.model(trained).worker("some-worker") as worker,
    ):
        worker.pull()
        out = command("status", trained, "--target", target).stdout
    assert "version    2, durable: none" in out
    assert "optimizer  adadelta\n" in out
    assert "policy     sync:round_timeout_seconds=9\n" in out
    assert "weights    7 float32 elements, 28 bytes" in out
    assert "0.95" in out
    assert ["w", "3", "x", "2", "0"] in [line.split() for line in out.splitlines()]
    assert ["b", "scalar", "0"] in [line.split() for line in out.splitlines()]
    session = next(line.split() for line in out.splitlines() if line.startswith("some-worker"))
    assert session[1:4] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("optimizer", "header", "row"),
    [
        (deltaserve.Adadelta(), "LR  RHO    EPS  WEIGHT_DECAY  MAXIMIZE", "1.0  0.9  1e-06  0.0  no"),
        (
            deltaserve.SGD(lr=0.1, momentum=0.9, nesterov=True),
            "LR  MOMENTUM  DAMPENING  WEIGHT_DECAY  NESTEROV  MAXIMIZE",
            "0.1  0.9  0.0  0.0  yes  no",
        ),
        (deltaserve.Adagrad(), "LR  LR_DECAY  WEIGHT_DECAY  INITIAL_ACCUMULATOR_VALUE  EPS  MAXIMIZE", "0.01"),
        (deltaserve.RMSprop(), "LR  ALPHA  EPS  WEIGHT_DECAY  MOMENTUM  CENTERED  MAXIMIZE", "0.01  0.99"),
        (deltaserve.Adam(), "LR  BETA1  BETA2  EPS  WEIGHT_DECAY  AMSGRAD  MAXIMIZE", "0.001  0.9  0.999"),
        (
            deltaserve.AdamW(),
            "LR  BETA1  BETA2  EPS  WEIGHT_DECAY  AMSGRAD  MAXIMIZE",
            "0.001  0.9  0.999  1e-08  0.01",
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_every_optimizer_is_shown_with_its_hyperparameters(
    command: Command, target: str, model: str, optimizer: deltaserve.Optimizer, header: str, row: str
) -> None:
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        client.create_model(model, {"w": [1.0]}, optimizer=optimizer)
        line = next(line for line in command("models", "--target", target).stdout.splitlines() if model in line)
        lines = command("status", model, "--target", target).stdout.splitlines()
        client.delete_model(model)
    assert line.split()[-2:] == [optimizer.kind, "async"]
    assert f"optimizer  {optimizer.kind}" in lines
    place = next(number for number, line in enumerate(lines) if line.startswith("GROUP"))
    assert lines[place].split()[1:] == header.split()
    assert lines[place + 1].split()[: 1 + len(row.split())] == ["0", *row.split()]


def test_a_model_that_is_not_there(command: Command, target: str) -> None:
    for arguments in (
        ["status", "nope"],
        ["delete", "nope"],
        ["pull", "nope", "-o", "nope.safetensors"],
        ["export", "nope", "-o", "nope.safetensors"],
        ["update", "nope", "--set", "lr=1"],
        ["watch", "nope"],
    ):
        ended = command(*arguments, "--target", target)
        assert (ended.returncode, ended.stderr) == (1, "deltaserve: no model is named 'nope'\n")
    assert not Path("nope.safetensors").exists()


def test_delete(command: Command, target: str, trained: str) -> None:
    assert command("delete", trained, "--target", target).stdout == f"deleted {trained} at version 2\n"
    assert trained not in command("models", "--target", target).stdout


def test_delete_spares_a_model_in_use_unless_forced(command: Command, target: str, trained: str) -> None:
    with deltaserve.connect(target, timeout_seconds=60.0) as client, client.model(trained).worker():
        ended = command("delete", trained, "--target", target)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "live session" in ended.stderr
        assert "--force" in ended.stderr
        assert trained in command("models", "--target", target).stdout
        assert command("delete", trained, "--force", "--target", target).returncode == 0


def test_pull_writes_the_weights_of_the_version(command: Command, target: str, trained: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    ended = command("pull", trained, "-o", str(file), "--target", target)
    assert ended.stdout.startswith(f"{file}: {trained} at version 2, ")
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        expected = client.model(trained).pull_state()
    loaded = load_file(file)
    assert loaded.keys() == {"w", "b"}
    assert all(np.array_equal(loaded[name], expected.weights[name]) for name in loaded)
    assert loaded["b"].shape == ()
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"model": trained, "version": "2"}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_pull_refuses_to_overwrite_without_force(command: Command, target: str, trained: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_text("mine")
    ended = command("pull", trained, "-o", str(file), "--target", target)
    assert (ended.returncode, file.read_text()) == (1, "mine")
    assert ended.stderr == f"deltaserve: {file} exists: name another file, or overwrite it with --force\n"
    assert command("pull", trained, "-o", str(file), "--force", "--target", target).returncode == 0
    assert load_file(file).keys() == {"w", "b"}


def test_pulled_files_are_as_readable_as_any_other(command: Command, target: str, trained: str, tmp_path: Path) -> None:
    file, other = tmp_path / "weights.safetensors", tmp_path / "other"
    other.touch()
    command("pull", trained, "-o", str(file), "--target", target)
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_pull_and_export_check_the_file_before_the_transfer(command: Command, tmp_path: Path) -> None:
    # The file is checked before the server, which does not exist.
    for file, text in ((tmp_path, "is a directory"), (tmp_path / "no" / "file", "does not exist")):
        for name in ("pull", "export"):
            ended = command(name, "m", "-o", str(file), "--target", "127.0.0.1:9")
            assert ended.returncode == 1
            assert text in ended.stderr


def test_pull_writes_tensors_of_any_name_except_one(command: Command, target: str, model: str, tmp_path: Path) -> None:
    with deltaserve.connect(target, timeout_seconds=60.0) as client:
        client.create_model(model, {"w": np.ones(1), "square_avg/w": np.ones(1)})
        client.create_model(f"{model}-2", {"__metadata__": np.ones(1)})
    file = tmp_path / "file"
    assert command("pull", model, "-o", str(file), "--target", target).returncode == 0
    assert load_file(file).keys() == {"w", "square_avg/w"}
    ended = command("pull", f"{model}-2", "-o", str(tmp_path / "other"), "--target", target)
    assert (ended.returncode, ended.stderr) == (
        1,
        "deltaserve: a tensor is named __metadata__, which a safetensors file cannot hold: rename it\n",
    )
    assert list(tmp_path.iterdir()) == [file]


def test_tables_are_as_wide_as_their_cells_and_never_truncated() -> None:
    long = "x" * 200
    assert table(("NAME", "COUNT"), [(long, 5), ("y", 12345)]).splitlines() == [
        f"{'NAME':<200}  COUNT",
        f"{long}      5",
        f"{'y':<200}  12345",
    ]


def test_numbers_have_suitable_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 38440, 8 << 30, 5 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "37.5 KiB",
        "8.0 GiB",
        "5.0 TiB",
    ]
    assert [format_seconds(s) for s in (0.4, 59, 61, 3600, 90061)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "1 d 1 h",
    ]
