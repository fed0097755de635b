"""`export` and `import`: a whole model goes into a file, and comes back the same."""

import json
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

import deltaserve
from deltaserve_server import LocalServer
from deltaserve_server.cli import saved
from deltaserve_server.cli.errors import CommandError

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
Edit = Callable[[Arrays, dict[str, str]], object]

NOWHERE = "127.0.0.1:9"
SHAPES = {"z": (3, 2), "a": (), "m/é": (0, 3), "b": (5,)}
"""A layout whose order safetensors, which sorts by name, does not keep."""

GROUPS = [
    deltaserve.Adadelta(lr=0.1 + 0.2, rho=0.95, eps=1e-3),
    deltaserve.Adadelta(lr=1 / 3, weight_decay=1e-300, maximize=True),
]
OTHERS: list[deltaserve.Optimizer] = [
    deltaserve.SGD(lr=0.1),
    deltaserve.SGD(lr=0.1, momentum=0.9, nesterov=True),
    deltaserve.Adagrad(lr_decay=0.1, initial_accumulator_value=0.5),
    deltaserve.RMSprop(centered=True, momentum=0.5),
    deltaserve.Adam(amsgrad=True),
    deltaserve.AdamW(weight_decay=1 / 3),
]
GROUP_OF = {"a": 1, "b": 1}


def numbers(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def step(model: deltaserve.Model, seeds: range) -> None:
    with model.worker() as worker:
        for seed in seeds:
            gradient: dict[str, Any] = {**numbers(seed), "b": None if seed % 2 else numbers(seed)["b"]}
            worker.step(gradient)


def bits(state: deltaserve.ModelState) -> dict[str, object]:
    assert state.slots is not None
    vectors = {"weights": state.weights, **state.slots}
    return {
        "update_counts": dict(state.update_counts),
        **{key: [(n, v.shape, v.tobytes()) for n, v in held.items()] for key, held in vectors.items()},
    }


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


def edit(file: Path, change: Edit) -> None:
    """Changes tensors and metadata of a file."""
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    file.write_bytes(save(tensors, metadata=metadata))


def edit_config(file: Path, change: Callable[[Any], object]) -> None:
    def changed(_: Arrays, metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        change(config)
        metadata["config"] = json.dumps(config)

    edit(file, changed)


def refusal(ended: "subprocess.CompletedProcess[str]") -> str:
    """Returns the error line of a command that failed."""
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("deltaserve: ")
    assert ended.stderr.count("\n") == 1
    assert "a bug in deltaserve" not in ended.stderr
    return ended.stderr


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


# --- invalid files, which are refused without a server


def without(name: str) -> Edit:
    return lambda tensors, metadata: (tensors.pop(name, None), metadata.pop(name, None))


def with_text(key: str, text: str) -> Edit:
    return lambda _, metadata: metadata.update({key: text})


def with_tensor(key: str, array: np.ndarray[Any, np.dtype[Any]]) -> Edit:
    return lambda tensors, _: tensors.update({key: array})


def rename_like_state(_: Arrays, metadata: dict[str, str]) -> None:
    """One tensor of the file would be both weights and optimizer state."""
    metadata["config"] = metadata["config"].replace('"b"', '"square_avg/z"')
    metadata["update_count/square_avg/z"] = "0"


SGD_SETTINGS = {
    "lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False,
}  # fmt: skip
BAD: list[tuple[Edit, str]] = [
    (without("config"), "its metadata has no 'config': import needs a file that deltaserve export wrote"),
    (without("model"), "its metadata has no 'model'"),
    (without("version"), "its metadata has no 'version'"),
    (without("update_count/b"), "its metadata has no 'update_count/b'"),
    (with_text("version", "-1"), "'version': expected a whole number of at most 9223372036854775807, got '-1'"),
    (with_text("update_count/b", str(1 << 63)), "'update_count/b': expected a whole number"),
    (with_text("update_count/b", "٣"), "'update_count/b': expected a whole number"),
    (with_text("config", "{"), "config: Input data was truncated"),
    (with_text("config", "[" * 100_000), "config: Expected `object`, got `array`"),
    (with_text("config", "[]"), "config: Expected `object`, got `array`"),
    (with_text("config", '{"tensors": []}'), "config: Object missing required field `groups`"),
    (rename_like_state, "config: tensors have names that are used for optimizer state"),
    (without("z"), "missing tensor 'z'"),
    (without("acc_delta/a"), "missing tensor 'acc_delta/a'"),
    (with_tensor("square_avg/y", np.zeros(1, np.float32)), "unexpected tensor 'square_avg/y'"),
    (with_tensor("z", np.zeros((3, 2), np.float64)), "tensor 'z': expected type F32, got F64"),
    (with_tensor("acc_delta/b", np.zeros(5, np.float16)), "tensor 'acc_delta/b': expected type F32, got F16"),
    (
        with_tensor("square_avg/b", np.zeros((5, 1), np.float32)),
        "tensor 'square_avg/b': expected shape [5], got [5, 1]",
    ),
    (with_tensor("z", np.zeros((2, 3), np.float32)), "tensor 'square_avg/z': expected shape [2, 3], got [3, 2]"),
]
BAD_CONFIG: list[tuple[Callable[[Any], object], str]] = [
    (lambda config: config.update(more=1), "config: Object contains unknown field `more`"),
    (
        lambda config: config.update(policy="maybe"),
        "config: policy: expected a policy, sync, async or bounded, as in sync:min_workers=4, got 'maybe'",
    ),
    (lambda config: config.update(policy="sync:trim=99999999999"), "config: policy: trim: 99999999999 is too large"),
    (lambda config: config["groups"][0].pop("kind"), "config: Object missing required field `kind` - at `$.groups[0]`"),
    (lambda config: config["groups"][0].update(kind="muon"), "config: Invalid value 'muon' - at `$.groups[0].kind`"),
    (lambda config: config["groups"][0].update(kind=1), "config: Expected `str` - at `$.groups[0].kind`"),
    (
        lambda config: config["groups"][0].update(kind="adam"),
        "config: Object contains unknown field `rho` - at `$.groups[0]`",
    ),
    (
        lambda config: config.update(groups=[{"kind": "sgd", **SGD_SETTINGS, "nesterov": 0}] * 2),
        "config: Expected `bool`, got `int` - at `$.groups[0].nesterov`",
    ),
    (
        lambda config: config.update(groups=[{"kind": "sgd", **SGD_SETTINGS}] * 2),
        "unexpected tensor 'acc_delta/a'",
    ),
    (
        lambda config: config.update(groups=[{"kind": "sgd", **SGD_SETTINGS, "momentum": 0.9}] * 2),
        "missing tensor 'momentum_buffer/a'",
    ),
    (lambda config: config["groups"][0].pop("lr"), "config: Object missing required field `lr` - at `$.groups[0]`"),
    (lambda config: config["groups"][0].update(lr="1"), "config: Expected `float`, got `str` - at `$.groups[0].lr`"),
    (
        lambda config: config["groups"][0].update(maximize=1),
        "config: Expected `bool`, got `int` - at `$.groups[0].maximize`",
    ),
    (lambda config: config.update(groups=[]), "config: Expected `array` of length >= 1 - at `$.groups`"),
    (lambda config: config["groups"].append([]), "config: Expected `object`, got `array` - at `$.groups[2]`"),
    (lambda config: config["groups"].pop(), "config: tensor 'a' is in group 1, but there are 1 groups"),
    (lambda config: config["tensors"][0].update(group=-1), "config: tensor 'z' is in group -1, but there are 2 groups"),
    (lambda config: config["tensors"][0].update(group=0.5), "config: Expected `int`, got `float`"),
    (lambda config: config["tensors"][0].update(group=10**400), "config: tensor 'z' is in group 10000000000"),
    (lambda config: config["tensors"][0].update(group=True), "config: Expected `int`, got `bool`"),
    (lambda config: config["tensors"][0].update(name=5), "config: Expected `str`, got `int` - at `$.tensors[0].name`"),
    (lambda config: config["tensors"].append("w"), "config: Expected `object`, got `str`"),
    (lambda config: config["tensors"].append(config["tensors"][0]), "config: two tensors have the same name"),
    (
        lambda config: config["tensors"][0].update(name="\ud800"),
        "config: JSON is malformed: unexpected end of escaped",
    ),
    (lambda config: config["tensors"].pop(), "unexpected tensor 'acc_delta/b'"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text for _, text in BAD])
def test_an_invalid_file(command: Command, file: Path, change: Edit, text: str) -> None:
    edit(file, change)
    assert refusal(command("import", str(file), "--target", NOWHERE)).startswith(f"deltaserve: {file}: {text}")


@pytest.mark.parametrize(("change", "text"), BAD_CONFIG, ids=[text for _, text in BAD_CONFIG])
def test_an_invalid_config(command: Command, file: Path, change: Callable[[Any], object], text: str) -> None:
    edit_config(file, change)
    assert refusal(command("import", str(file), "--target", NOWHERE)).startswith(f"deltaserve: {file}: {text}")


def test_a_file_of_pull_is_no_export(command: Command, target: str, trained: deltaserve.Model, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    command("pull", trained.name, "-o", str(file), "--target", target)
    assert "import needs a file that deltaserve export wrote" in refusal(
        command("import", str(file), "--target", NOWHERE)
    )


def test_a_path_that_cannot_be_read(command: Command, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "file"):
        assert refusal(command("import", str(path), "--target", NOWHERE)) == f"deltaserve: there is no file {path}\n"


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"\x80\x04]q\x00."], ids=str)
def test_a_file_in_another_format(command: Command, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    line = refusal(command("import", str(file), "--target", NOWHERE))
    assert line.startswith(f"deltaserve: {file} is not a complete safetensors file: ")


def test_a_part_of_a_file_is_refused_wherever_it_ends(file: Path, tmp_path: Path) -> None:
    content, part = file.read_bytes(), tmp_path / "part"
    for length in range(0, len(content), 7):
        part.write_bytes(content[:length])
        with pytest.raises(CommandError, match="is not a complete safetensors file"):
            saved.read(part)


def test_a_header_with_a_wrong_byte_is_read_or_refused(file: Path, tmp_path: Path) -> None:
    content, wrong = file.read_bytes(), tmp_path / "wrong"
    (size,) = struct.unpack_from("<Q", content)
    refused = 0
    for place in range(0, 8 + size, 5):
        for value in (ord("9"), ord("]")):
            wrong.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                saved.read(wrong)
            except CommandError:
                refused += 1
    assert refused > size / 5


def test_shapes_that_numpy_does_not_have(command: Command, model: str, tmp_path: Path) -> None:
    config = {"tensors": [{"name": "w", "group": 0}], "groups": [], "policy": "async"}
    config["groups"] = [{"kind": "adadelta", "lr": 1, "rho": 0.9, "eps": 1e-6, "weight_decay": 0, "maximize": False}]
    texts = {"model": model, "version": "0", "update_count/w": "0", "config": json.dumps(config)}
    for shape in ([0, 1 << 62], [0] * 70):
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        header = json.dumps({"__metadata__": texts, "w": tensor, "square_avg/w": tensor, "acc_delta/w": tensor})
        file = tmp_path / "file"
        file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
        assert f"{file}: tensor 'w': " in refusal(command("import", str(file), "--target", NOWHERE))


# --- what the server refuses


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_tensor("z", np.full((3, 2), np.nan, np.float32)), "tensor z"),
        (with_tensor("square_avg/b", np.full(5, np.inf, np.float32)), "tensor b"),
        (with_tensor("square_avg/b", np.full(5, -1, np.float32)), "square_avg of tensor b at element 0: expected >= 0"),
        (with_tensor("acc_delta/b", np.full(5, np.nan, np.float32)), "tensor b"),
        (with_text("model", "no name!"), "expected 1 to 128 characters"),
    ],
)
def test_a_state_that_the_server_refuses_leaves_no_model(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path, change: Edit, text: str
) -> None:
    edit(file, change)
    trained.delete()
    before = client.models()
    assert text in refusal(command("import", str(file), "--target", client.target))
    assert client.models() == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: config["groups"][1].update(eps=0.0), "eps"),
        (lambda config: config["groups"].append({"kind": "sgd", **SGD_SETTINGS}), "groups[2]"),
        (lambda config: config["groups"][0].update(lr=float("nan")), "config: JSON is malformed"),
        (lambda config: config.update(policy="sync:min_workers=0"), "min_workers"),
    ],
)
def test_settings_that_the_server_refuses_leave_no_model(
    command: Command,
    client: deltaserve.Client,
    trained: deltaserve.Model,
    file: Path,
    change: Callable[[Any], object],
    text: str,
) -> None:
    edit_config(file, change)
    trained.delete()
    before = client.models()
    assert text in refusal(command("import", str(file), "--target", client.target))
    assert client.models() == before


@pytest.mark.parametrize("key", ["z", "square_avg/z", "acc_delta/z"])
def test_a_refused_replacement_changes_nothing(
    command: Command, client: deltaserve.Client, trained: deltaserve.Model, file: Path, key: str
) -> None:
    edit(file, with_tensor(key, np.full((3, 2), np.nan, np.float32)))
    before = trained.pull_state()
    refusal(command("import", str(file), "--replace", "--target", client.target))
    after = trained.pull_state()
    assert (after.version, bits(after)) == (before.version, bits(before))


def test_an_interrupt_leaves_no_model_without_its_state(
    command: Command,
    client: deltaserve.Client,
    trained: deltaserve.Model,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(model: deltaserve.Model, _: deltaserve.ModelState) -> None:
        assert model.created
        raise KeyboardInterrupt

    trained.delete()
    before = client.models()
    monkeypatch.setattr(deltaserve.Model, "put_state", interrupted)
    assert command("import", str(file), "--target", client.target).returncode == 130
    assert client.models() == before
