"""A whole model as a safetensors file, which other tools can read too.

Tensors, float32: `NAME` holds the weights, `SLOT/NAME` each slot of the optimizer state, such as `square_avg/NAME`.
Metadata, all of it text: `model`, `version`, `update_count/NAME`, and `config`, which is JSON:

    {
        "tensors": [{"name": "w", "group": 0}],
        "groups": [{"kind": "adadelta", "lr": 1.0, "rho": 0.9, "eps": 1e-06, "weight_decay": 0.0, "maximize": false}],
        "policy": "sync:min_workers=4"
    }

"tensors" is the layout, because a safetensors file does not keep the order of its tensors. "groups" are the
hyperparameters of an optimizer, whose "kind" is the same in all of them. "policy" is text as on the command line.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_type_hints

import msgspec
import typer
from safetensors import SafetensorError, safe_open

from deltaserve import ModelInfo, ModelState, Optimizer, TensorSpec
from deltaserve._common.element_types import Array
from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve_server.cli import output
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.settings import Policy, format_policy, parse_policy

COUNT_PREFIX = "update_count/"
MAX_UPDATES = (1 << 63) - 1
"""The largest version and update count that the protocol allows in a state."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The content of a file: a model's name, layout, hyperparameters by parameter group, policy and state."""

    name: str
    tensors: tuple[TensorSpec, ...]
    groups: tuple[Optimizer, ...]
    policy: Policy
    state: ModelState


# Unknown fields are refused: a newer version may have written them, and dropping them would change the model.
class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    group: int


def _group(kind: str, optimizer: type[Optimizer]) -> Any:
    """Returns a strict type for the hyperparameters of an optimizer, all of which a file must have."""
    hints = get_type_hints(optimizer)
    members = [(name, hints[name]) for name in hyperparameters(optimizer)]
    return msgspec.defstruct(kind, members, tag_field="kind", tag=kind, forbid_unknown_fields=True)


_Group: Any = Union[tuple(_group(kind, optimizer) for kind, optimizer in OPTIMIZERS.items())]  # noqa: UP007


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    tensors: list[_Tensor]
    groups: Annotated[list[_Group], msgspec.Meta(min_length=1)]  # encoded from optimizers, which have the same fields
    policy: str


def encode(info: ModelInfo, state: ModelState) -> bytes:
    """Returns the content of a model's file.

    Args:
        info: The model, requested after its state. It may have got more tensors meanwhile; they are not written.
        state: Its weights and optimizer state.

    Raises:
        CommandError: The name of a tensor conflicts with the format, or the model was replaced meanwhile.
    """
    assert state.slots is not None
    vectors = {"": state.weights, **{f"{slot}/": state.slots[slot] for slot in state.slots}}
    tensors = {prefix + name: array for prefix, vector in vectors.items() for name, array in vector.items()}
    if len(tensors) != len(vectors) * len(state.weights):  # a tensor "square_avg/w" beside a tensor "w"
        raise CommandError(
            f"the tensors of {info.name} have names that export uses for optimizer state: only pull can write it"
        )
    layout = info.tensors[: len(state.weights)]
    if [spec.name for spec in layout] != list(state.weights):
        raise CommandError(f"{info.name} was deleted and created again during the export: export it again")
    specs = [_Tensor(spec.name, spec.group) for spec in layout]
    config = _Config(tensors=specs, groups=list(info.groups), policy=format_policy(info.policy))
    metadata = {"model": info.name, "version": str(state.version), "config": msgspec.json.encode(config).decode()}
    metadata |= {COUNT_PREFIX + name: str(count) for name, count in state.update_counts.items()}
    return output.encode(tensors, metadata)


def read(file: Path) -> SavedModel:
    """Returns the content of a file.

    Raises:
        CommandError: The file does not hold a whole model. The server checks the ranges of numbers and names.
        OSError: The file cannot be read.
    """
    if not file.is_file():
        raise CommandError(f"there is no file {file}")
    file.open("rb").close()  # raises a clearer error than safetensors if the file cannot be read
    try:
        with safe_open(file, "np") as opened:
            return _decode(opened)
    except SafetensorError as error:
        raise CommandError(f"{file} is not a complete safetensors file: {error}") from error
    except CommandError as error:
        raise CommandError(f"{file}: {error}") from error


def _decode(opened: Any) -> SavedModel:
    metadata = opened.metadata() or {}
    try:
        config = msgspec.json.decode(_text(metadata, "config"), type=_Config)
        policy = parse_policy(config.policy).make()
    except (msgspec.DecodeError, RecursionError) as error:  # RecursionError: very many nested brackets
        raise CommandError(f"config: {error}") from error
    except typer.BadParameter as error:
        raise CommandError(f"config: policy: {error.message}") from error
    groups = tuple(OPTIMIZERS[group.__struct_config__.tag](**msgspec.structs.asdict(group)) for group in config.groups)
    slots = tuple(slot.name for slot in groups[0].slots)
    group_of = {tensor.name: tensor.group for tensor in config.tensors}
    if len(group_of) != len(config.tensors):
        raise CommandError("config: two tensors have the same name")
    for name, group in group_of.items():
        if group not in range(len(groups)):
            raise CommandError(f"config: tensor {name!r} is in group {group}, but there are {len(groups)} groups")
    # The vectors come last: whatever is wrong with the metadata costs no reading of gigabytes.
    version = _count(metadata, "version")
    counts = {name: _count(metadata, COUNT_PREFIX + name) for name in group_of}
    _check_tensors(opened, group_of, slots)
    weights: dict[str, Array] = {name: _tensor(opened, name) for name in group_of}
    state = ModelState(
        version=version,
        weights=weights,
        slots={slot: {name: _tensor(opened, f"{slot}/{name}") for name in group_of} for slot in slots},
        update_counts=counts,
    )
    tensors = tuple(TensorSpec(name, state.weights[name].shape, group) for name, group in group_of.items())
    return SavedModel(name=_text(metadata, "model"), tensors=tensors, groups=groups, policy=policy, state=state)


def _text(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise CommandError(f"its metadata has no {key!r}: import needs a file that deltaserve export wrote")
    return metadata[key]


def _count(metadata: Mapping[str, str], key: str) -> int:
    text = _text(metadata, key)
    # int() also takes signs, blanks and underscores.
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or int(text) > MAX_UPDATES:
        raise CommandError(f"{key!r}: expected a whole number of at most {MAX_UPDATES}, got {text!r}")
    return int(text)


def _check_tensors(opened: Any, names: Collection[str], slots: Sequence[str]) -> None:
    """Raises CommandError unless the file has exactly the model's tensors, as float32, in matching shapes."""
    prefixes = ["", *(f"{slot}/" for slot in slots)]
    expected = {prefix + name: name for name in names for prefix in prefixes}
    present = set(opened.keys())
    if len(expected) != len(prefixes) * len(names):
        raise CommandError("config: tensors have names that are used for optimizer state")
    for wrong, keys in (("missing", expected.keys() - present), ("unexpected", present - expected.keys())):
        if keys:
            raise CommandError(f"{wrong} tensor {min(keys)!r}")
    for key, name in expected.items():
        # A slice tells type and shape before anything of it is read.
        found, weights = opened.get_slice(key), opened.get_slice(name)
        if found.get_dtype() != "F32":
            raise CommandError(f"tensor {key!r}: expected type F32, got {found.get_dtype()}")
        if found.get_shape() != weights.get_shape():
            raise CommandError(f"tensor {key!r}: expected shape {weights.get_shape()}, got {found.get_shape()}")


def _tensor(opened: Any, key: str) -> Array:
    array: Array
    try:
        array = opened.get_tensor(key)
    except ValueError as error:  # the format allows more dimensions, and larger empty arrays, than numpy does
        raise CommandError(f"tensor {key!r}: {error}") from error
    return array
