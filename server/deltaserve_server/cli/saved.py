"""A whole model as a safetensors file, which other tools read too.

Its tensors, float32: `NAME` has the weights, `square_avg/NAME` and `acc_delta/NAME` the optimizer state. Its metadata,
all of it text: `model`, `version`, `update_count/NAME`, and `config`, which is JSON:

    {
        "tensors": [{"name": "w", "group": 0}],
        "groups": [{"lr": 1.0, "rho": 0.9, "eps": 1e-06, "weight_decay": 0.0, "maximize": false}],
        "policy": "sync:min_workers=4"
    }

"tensors" is the layout, whose order a safetensors file does not keep by itself; "policy" is as on the command line.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deltaserve_server.cli import output
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.policy import format_policy, parse_policy

if TYPE_CHECKING:
    import deltaserve
    from deltaserve._common.element_types import Array
    from deltaserve._types import Policy

PREFIXES = {"weights": "", "square_avg": "square_avg/", "acc_delta": "acc_delta/"}
COUNT_PREFIX = "update_count/"
MOST_UPDATES = (1 << 63) - 1
"""So many updates the protocol allows a state to come with."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a file says of a model.

    Attributes:
        name: The model's name.
        tensors: Its layout.
        groups: Its hyperparameters by parameter group.
        policy: When a push becomes an update.
        state: Its numbers.
    """

    name: str
    tensors: "tuple[deltaserve.TensorSpec, ...]"
    groups: "tuple[deltaserve.Hyperparameters, ...]"
    policy: "Policy"
    state: "deltaserve.ModelState"


def encode(info: "deltaserve.ModelInfo", state: "deltaserve.ModelState") -> bytes:
    """Returns the file of a model.

    Args:
        info: The model, asked for after its state: it may have been extended meanwhile.
        state: Its numbers, with the optimizer's.

    Raises:
        CommandError: A tensor has a name that the file needs for something else, or the model is another by now.
    """
    held = {key: getattr(state, key) for key in PREFIXES}
    tensors = {prefix + name: array for key, prefix in PREFIXES.items() for name, array in held[key].items()}
    if len(tensors) != len(PREFIXES) * len(state.weights):
        raise CommandError(f"tensors of {info.name} are named like parts of the state: only pull can write it")
    layout = info.tensors[: len(state.weights)]
    if [spec.name for spec in layout] != list(state.weights):
        raise CommandError(f"{info.name} was deleted and made anew meanwhile: export it again")
    config = {
        "tensors": [{"name": spec.name, "group": spec.group} for spec in layout],
        "groups": [asdict(group) for group in info.groups],
        "policy": format_policy(info.policy),
    }
    metadata = {"model": info.name, "version": str(state.version), "config": json.dumps(config)}
    metadata |= {COUNT_PREFIX + name: str(count) for name, count in state.update_counts.items()}
    return output.encode(tensors, metadata)


def read(file: Path) -> SavedModel:
    """Returns what a file holds.

    Raises:
        CommandError: It does not hold a whole model. Whether numbers and names are in range is the server's to say.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CommandError(f"there is no file {file}")
    file.open("rb").close()  # says better than safetensors why a file cannot be read
    try:
        with safe_open(file, "np") as opened:
            return _saved(opened)
    except SafetensorError as error:
        raise CommandError(f"{file} is no safetensors file, or not all of one: {error}") from error
    except CommandError as error:
        raise CommandError(f"{file}: {error}") from error


def _saved(opened: Any) -> SavedModel:
    metadata = opened.metadata() or {}
    config = _config(_text(metadata, "config"))
    groups = tuple(map(_hyperparameters, config["groups"]))
    places = dict(_place(value, len(groups)) for value in config["tensors"])
    if len(places) != len(config["tensors"]):
        raise CommandError("config: two tensors have one name")
    policy = _policy(config["policy"])
    state = _state(opened, metadata, places)
    return SavedModel(
        name=_text(metadata, "model"), tensors=_layout(state, places), groups=groups, policy=policy, state=state
    )


def _text(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise CommandError(f"its metadata has no {key!r}: import takes what deltaserve export wrote")
    return metadata[key]


def _count(metadata: Mapping[str, str], key: str) -> int:
    text = _text(metadata, key)
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or int(text) > MOST_UPDATES:
        raise CommandError(f"{key!r}: expected a whole number of at most {MOST_UPDATES}, got {text!r}")
    return int(text)


def _config(text: str) -> dict[str, Any]:
    try:
        # What other programs write has 1 for 1.0; and an integer may be larger than any float.
        config = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        raise CommandError("config: expected JSON") from None
    kinds = {"tensors": list, "groups": list, "policy": str}
    if not isinstance(config, dict) or _kinds(config) != kinds:
        raise CommandError("config: expected tensors and groups, which are lists, and policy, which is text")
    return config


def _kinds(values: Mapping[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in values.items()}


def _hyperparameters(value: Any) -> "deltaserve.Hyperparameters":
    from deltaserve import Hyperparameters

    kinds = {field.name: type(field.default) for field in fields(Hyperparameters)}
    if not isinstance(value, dict) or _kinds(value) != kinds:
        names = ", ".join(name for name, kind in kinds.items() if kind is float)
        raise CommandError(f"config: groups: expected numbers {names}, and maximize, true or false")
    return Hyperparameters(**value)


def _place(value: Any, groups: int) -> tuple[str, int]:
    """Returns a tensor's name and the index of its group."""
    if not isinstance(value, dict) or _kinds(value) != {"name": str, "group": float}:
        raise CommandError("config: tensors: expected name, which is text, and group, which is a number")
    if value["group"] not in range(groups):
        raise CommandError(f"config: tensor {value['name']!r} is in group {value['group']:g}, and there are {groups}")
    return value["name"], int(value["group"])


def _policy(text: str) -> "Policy":
    try:
        return parse_policy(text).policy()
    except typer.BadParameter as error:
        raise CommandError(f"config: policy: {error.message}") from error


def _state(opened: Any, metadata: Mapping[str, str], names: Collection[str]) -> "deltaserve.ModelState":
    """Reads the numbers, after everything that can be found without them."""
    from deltaserve import ModelState

    version = _count(metadata, "version")
    counts = {name: _count(metadata, COUNT_PREFIX + name) for name in names}
    _check_tensors(opened, names)
    vectors: dict[str, dict[str, Array]] = {
        key: {name: _tensor(opened, prefix + name) for name in names} for key, prefix in PREFIXES.items()
    }
    return ModelState(version=version, update_counts=counts, **vectors)


def _check_tensors(opened: Any, names: Collection[str]) -> None:
    """Raises CommandError unless the file has all its tensors and no others, float32, in shapes that fit together."""
    expected = {prefix + name: name for name in names for prefix in PREFIXES.values()}
    present = set(opened.keys())
    if len(expected) != len(PREFIXES) * len(names):
        raise CommandError("config: tensors are named like parts of the state")
    for word, wrong in (("lacks", expected.keys() - present), ("has, beside its model,", present - expected.keys())):
        if wrong:
            raise CommandError(f"it {word} tensor {min(wrong)!r}")
    for key, name in expected.items():
        found, weights = opened.get_slice(key), opened.get_slice(name)
        if found.get_dtype() != "F32":
            raise CommandError(f"tensor {key!r} is {found.get_dtype()}, not F32")
        if found.get_shape() != weights.get_shape():
            raise CommandError(f"tensor {key!r} has shape {found.get_shape()}, not {weights.get_shape()}")


def _tensor(opened: Any, key: str) -> "Array":
    array: Array
    try:
        array = opened.get_tensor(key)
    except ValueError as error:  # numpy has no arrays of more dimensions, nor of larger ones that are empty
        raise CommandError(f"tensor {key!r}: {error}") from error
    return array


def _layout(state: "deltaserve.ModelState", places: Mapping[str, int]) -> "tuple[deltaserve.TensorSpec, ...]":
    from deltaserve import TensorSpec

    return tuple(TensorSpec(name, state.weights[name].shape, group) for name, group in places.items())
