"""`export` and `import`: a whole model goes into a file, and comes back the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tests.cli.transfer import (
    GROUP_OF,
    SHAPES,
    Command,
    bits,
    edit,
    edit_config,
    numbers,
    refusal,
    step,
)

import deltaserve
from deltaserve_server import LocalServer
from deltaserve_server.cli import saved
from deltaserve_server.cli.errors import CommandError

OTHERS: list[deltaserve.Optimizer] = [
    deltaserve.SGD(lr=0.1),
    deltaserve.SGD(lr=0.1, momentum=0.9, nesterov=True),
    deltaserve.Adagrad(lr_decay=0.1, initial_accumulator_value=0.5),
    deltaserve.RMSprop(centered=True, momentum=0.5),
    deltaserve.Adam(amsgrad=True),
    deltaserve.AdamW(weight_decay=1 / 3),
]


# --- export


def test_export_writes_all_that_a_model_is(trained: deltaserve.Model, file: Path) -> None:
    tensors, state = load_file(file), trained.pull_state()
    assert state.slots is not None
    assert len(tensors) == 12
    for name in SHAPES:
        assert np.array_equal(tensors[name], state.weights[name])
        for slot in ("square_avg", "acc_delta"):
            assert np.array_equal(tensors[f"{slot}/{name}"], state.slots[slot][name])
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("config")) == {
        "tensors": [{"name": name, "group": GROUP_OF.get(name, 0)} for name in SHAPES],
        "groups": [
            {"kind": "adadelta", "lr": 0.1 + 0.2, "rho": 0.95, "eps": 1e-3, "weight_decay": 0.0, "maximize": False},
            {"kind": "adadelta", "lr": 1 / 3, "rho": 0.9, "eps": 1e-6, "weight_decay": 1e-300, "maximize": True},
        ],
        "policy": "async:max_staleness=7,damping=true",
    }
    counts = {"update_count/z": "5", "update_count/a": "5", "update_count/m/é": "5", "update_count/b": "3"}
    assert metadata == {"model": trained.name, "version": "5", **counts}


def test_export_says_what_it_wrote_and_leaves_nothing_else(
    command: Command, target: str, trained: deltaserve.Model, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    ended = command("export", trained.name, "-o", str(file), "--target", target)
    assert ended.stdout.startswith(f"{file}: {trained.name} at version 5, ")
    assert list(tmp_path.iterdir()) == [file]


def test_export_replaces_a_file_with_force_alone(
    command: Command, target: str, trained: deltaserve.Model, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    file.write_text("mine")
    arguments = ["export", trained.name, "-o", str(file), "--target", target]
    assert (
        refusal(command(*arguments)) == f"deltaserve: {file} exists: name another file, or overwrite it with --force\n"
    )
    assert file.read_text() == "mine"
    assert command(*arguments, "--force").returncode == 0
    assert saved.read(file).name == trained.name


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            ["w", "square_avg/w"],
            "the tensors of {} have names that export uses for optimizer state: only pull can write it",
        ),
        (["w", "__metadata__"], "a tensor is named __metadata__, which a safetensors file cannot hold: rename it"),
    ],
)
def test_names_that_a_file_cannot_hold(
    command: Command, client: deltaserve.Client, model: str, tmp_path: Path, tensors: list[str], text: str
) -> None:
    client.create_model(model, {name: np.ones(1) for name in tensors})
    ended = command("export", model, "-o", str(tmp_path / "file"), "--target", client.target)
    assert refusal(ended) == f"deltaserve: {text.format(model)}\n"
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_extended_between_state_and_config_is_of_the_state(trained: deltaserve.Model) -> None:
    state = trained.pull_state()
    trained.extend({"new": np.ones(2)}, groups=[deltaserve.Adadelta()], group_of={"new": 2})
    assert b'"new' not in saved.encode(trained.info(), state)


def test_a_model_that_is_another_between_state_and_config(client: deltaserve.Client, trained: deltaserve.Model) -> None:
    state = trained.pull_state()
    trained.delete()
    other = client.create_model(trained.name, {"other": np.ones(2)})
    with pytest.raises(CommandError, match="created again during the export: export it again"):
        saved.encode(other.info(), state)


# --- import


def test_a_model_continues_on_another_server_with_the_same_bits(
    command: Command, trained: deltaserve.Model, file: Path
) -> None:
    with LocalServer() as server, deltaserve.connect(server.target, timeout_seconds=60.0) as there:
        ended = command("import", str(file), "--target", server.target)
        expected = f"imported {trained.name} from {file}, exported at version 5\n"
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, expected, "")
        moved = there.model(trained.name)
        assert (moved.tensors, moved.groups, moved.policy) == (trained.tensors, trained.groups, trained.policy)
        assert bits(moved.pull_state()) == bits(trained.pull_state())
        for model in (moved, trained):
            step(model, range(5, 12))
        assert bits(moved.pull_state()) == bits(trained.pull_state())


@pytest.mark.parametrize("optimizer", OTHERS, ids=repr)
def test_every_optimizer_continues_with_the_same_bits(
    command: Command, client: deltaserve.Client, model: str, tmp_path: Path, optimizer: deltaserve.Optimizer
) -> None:
    groups = [optimizer, replace(optimizer, lr=0.05)]
    held = client.create_model(model, numbers(0), groups=groups, group_of=GROUP_OF)
    step(held, range(3))
    file = tmp_path / "file"
    command("export", model, "-o", str(file), "--target", client.target)
    assert len(load_file(file)) == len(SHAPES) * (1 + len(optimizer.slots))
    assert command("import", str(file), "--model", f"{model}-2", "--target", client.target).returncode == 0
    moved = client.model(f"{model}-2")
    assert moved.groups == tuple(groups)
    for one in (moved, held):
        step(one, range(3, 6))
    assert bits(moved.pull_state()) == bits(held.pull_state())


def test_a_model_that_was_never_updated_under_another_name(
    command: Command, client: deltaserve.Client, model: str, tmp_path: Path
) -> None:
    held, file = client.create_model(model, numbers(0)), str(tmp_path / "file")
    command("export", model, "-o", file, "--target", client.target)
    assert command("import", file, "--model", f"{model}-2", "--target", client.target).returncode == 0
    assert bits(client.model(f"{model}-2").pull_state()) == bits(held.pull_state())


@pytest.mark.parametrize(
    "policy",
    [
        deltaserve.Async(),
        deltaserve.Bounded(slack=3),
        deltaserve.Sync(min_workers=2, quorum=3, grace_seconds=0.1 + 0.2, clip_norm=1 / 3),
        deltaserve.Sync(min_workers=3, reduction="trimmed_mean", trim=1, round_timeout_seconds=86_400.0),
    ],
    ids=str,
)
def test_policies_come_back(
    command: Command, client: deltaserve.Client, model: str, tmp_path: Path, policy: deltaserve.Sync
) -> None:
    file = str(tmp_path / "file")
    client.create_model(model, {"w": np.ones(1)}, policy=policy)
    command("export", model, "-o", file, "--target", client.target)
    client.delete_model(model)
    assert command("import", file, "--target", client.target).returncode == 0
    assert client.model(model).policy == policy


def test_tensors_named_like_state_of_tensors_that_are_not_there(
    command: Command, client: deltaserve.Client, model: str, tmp_path: Path
) -> None:
    held, file = client.create_model(model, {"acc_delta/w": np.ones(2), "square_avg/": np.zeros(3)}), tmp_path / "f"
    command("export", model, "-o", str(file), "--target", client.target)
    assert command("import", str(file), "--model", f"{model}-2", "--target", client.target).returncode == 0
    assert bits(client.model(f"{model}-2").pull_state()) == bits(held.pull_state())


def test_what_other_programs_write(command: Command, client: deltaserve.Client, model: str, file: Path) -> None:
    """Other programs may write 1 for 1.0, and add metadata of their own."""
    edit_config(file, lambda config: config["groups"][0].update(lr=1, weight_decay=0))
    edit(file, lambda _, metadata: metadata.update(format="np"))
    assert command("import", str(file), "--model", f"{model}-2", "--target", client.target).returncode == 0
    assert client.model(f"{model}-2").groups[0] == deltaserve.Adadelta(lr=1.0, rho=0.95, eps=1e-3)


# --- a model that exists


@pytest.mark.parametrize("same", [True, False])
def test_a_model_that_exists_stays_as_it_is(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path, same: bool
) -> None:
    if same:
        step(trained, range(5, 7))
    else:
        trained.delete()
        client.create_model(trained.name, {"w": np.ones(2)})
    before = client.model(trained.name).pull_state()
    ended = command("import", str(file), "--target", client.target)
    expected = (
        f"deltaserve: {trained.name} exists: choose another name with --model, or replace its state with --replace\n"
    )
    assert refusal(ended) == expected
    after = client.model(trained.name).pull_state()
    assert (after.version, bits(after)) == (before.version, bits(before))


def test_replace_changes_the_state_for_all_workers(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path
) -> None:
    before = trained.pull_state()
    with trained.worker() as worker:
        worker.step(numbers(5))
        ended = command("import", str(file), "--replace", "--target", client.target)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert worker.pull()["z"].tobytes() == before.weights["z"].tobytes()
    after = trained.pull_state()
    assert (after.version, bits(after)) == (7, bits(before))


def test_replace_keeps_optimizer_and_policy_and_says_so(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path
) -> None:
    groups, policy = [deltaserve.Adadelta()] * 2, deltaserve.Bounded(slack=1)
    trained.update(groups=groups, policy=policy)
    ended = command("import", str(file), "--replace", "--target", client.target)
    assert f"{trained.name} keeps its optimizer and policy, which differ from the file's\n" in ended.stdout
    held = client.model(trained.name)
    assert (held.groups, held.policy) == (tuple(groups), policy)


def test_replace_refuses_the_state_of_another_optimizer(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path
) -> None:
    trained.delete()
    groups: list[deltaserve.Optimizer] = [deltaserve.Adam()] * 2
    held = client.create_model(trained.name, numbers(0), groups=groups, group_of=GROUP_OF)
    before = bits(held.pull_state())
    line = refusal(command("import", str(file), "--replace", "--target", client.target))
    text = f"{trained.name} has the optimizer adam, the file adadelta"
    assert line == f"deltaserve: {text}; import it as another model with --model\n"
    assert bits(held.pull_state()) == before


def test_replace_creates_a_model_that_does_not_exist(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path
) -> None:
    before = trained.pull_state()
    trained.delete()
    assert command("import", str(file), "--replace", "--target", client.target).returncode == 0
    assert bits(client.model(trained.name).pull_state()) == bits(before)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"w": (2,)}, "tensor 0 is w [2] in group 0, not z [3, 2] in group 0"),
        ({"z": (3, 2), "a": ()}, "tensor 1 is a [] in group 0, not a [] in group 1"),
        ({"z": (3, 2)}, "it has 1 tensors, not 4"),
    ],
)
def test_replace_refuses_another_layout(
    command: Command,
    client: deltaserve.Client,
    trained: deltaserve.Model,
    file: Path,
    tensors: dict[str, tuple[int, ...]],
    text: str,
) -> None:
    trained.delete()
    held = client.create_model(trained.name, {name: np.ones(shape) for name, shape in tensors.items()})
    before = bits(held.pull_state())
    ended = command("import", str(file), "--replace", "--target", client.target)
    expected = f"the layout of {trained.name} differs from the file's: {text}; import it as another model with --model"
    assert refusal(ended) == f"deltaserve: {expected}\n"
    assert bits(held.pull_state()) == before
