"""`import` of files that do not hold a model: one line of error, and no model."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.transfer import (
    NOWHERE,
    Arrays,
    Command,
    Edit,
    bits,
    edit,
    edit_config,
    refusal,
)

import deltaserve
from deltaserve_server.cli import saved
from deltaserve_server.cli.errors import CommandError

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
