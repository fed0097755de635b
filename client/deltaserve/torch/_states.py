"""Conversion between the state of `torch.optim.Adadelta` and that of a model."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from deltaserve._common.element_types import Array
from deltaserve._types import ModelState
from deltaserve.torch._tensors import to_host

_VECTORS = ("square_avg", "acc_delta")


def state_dict_of(state: ModelState, optimizer: torch.optim.Adadelta) -> dict[str, Any]:
    """Returns a model's optimizer state as a state dict that `optimizer.load_state_dict` takes.

    The hyperparameters stay those of `optimizer`. The parameters are not touched: copy `state.weights` into them
    yourself.

    Args:
        state: A model's state, as `Model.pull_state()` returns it.
        optimizer: An optimizer whose parameters match the model's tensors in name and shape. A parameter is named as
            `RemoteAdadelta` names it: by its own name if the optimizer was given named parameters, else by group and
            position, such as "0.1".

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Adadelta`.
        ValueError: `state` lacks a part or has a tensor of another shape, or two parameters have the same name.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.Adadelta([("w", weight)])
        >>> optimizer.load_state_dict(state_dict_of(model_state_of(optimizer), optimizer))
    """
    params = _params_of(optimizer)
    entries = to_torch(state, params)
    return {
        "state": {index: deepcopy(entries[p]) for index, p in enumerate(params.values()) if p in entries},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def model_state_of(optimizer: torch.optim.Adadelta) -> ModelState:
    """Returns an optimizer's parameters and state in the form that `Model.put_state` takes.

    To continue a run on a server, create the model from the returned `weights` with `Client.create_model`, then call
    `put_state`. The weights are in the order in which `RemoteAdadelta` lays them out. Everything is a float32 copy.

    Args:
        optimizer: An optimizer whose parameters are named as `state_dict_of` describes.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Adadelta`. The state of a `RemoteAdadelta` is on the server.
        ValueError: Two parameters have the same name.
    """
    # Reversed is the order of a RemoteAdadelta's layout: about that in which backward computes gradients.
    return deepcopy(from_torch(optimizer.state, dict(reversed(_params_of(optimizer).items()))))


def assign_names(names: dict[Tensor, str], index: int, group: Mapping[str, Any]) -> None:
    """Adds the tensor names of a group's parameters to `names`.

    A parameter that the user gave no name is named by group and position.

    Args:
        names: The names of all parameters so far.
        index: The group's index.
        group: The group, as in `param_groups`.

    Raises:
        ValueError: Two parameters have the same name.
    """
    given = group.get("param_names") or [f"{index}.{position}" for position in range(len(group["params"]))]
    new = dict(zip(group["params"], given, strict=True))  # torch allows a parameter twice in a group
    taken = {name for param, name in names.items() if param not in new}
    for name in new.values():
        if name in taken:
            raise ValueError(f"two parameters are named {name}")
        taken.add(name)
    names.update(new)


def to_torch(state: ModelState, params: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """Returns the `state` of a `torch.optim.Adadelta`: an entry for each parameter that has had an update.

    The tensors may share memory with the arrays of `state`.

    Raises:
        ValueError: `state` lacks a part or has a tensor of another shape.
    """
    entries = {}
    for name, param in params.items():
        count = _part(state, "update_counts", name)
        if count:  # torch has no entry for a parameter before its first update
            vectors = {key: _vector(_part(state, key, name), key, name, param) for key in _VECTORS}
            entries[param] = {"step": torch.tensor(float(count)), **vectors}
    return entries


def from_torch(entries: Mapping[Tensor, Mapping[str, Any]], params: Mapping[str, Tensor]) -> ModelState:
    """Returns parameters and the `state` of a `torch.optim.Adadelta` as a model's state.

    A parameter without an entry gets zeros. The arrays may share memory with the tensors.
    """
    entry_of = {name: entries.get(param, {}) for name, param in params.items()}
    vectors = {
        key: {name: to_host(entry_of[name].get(key, torch.zeros_like(param))) for name, param in params.items()}
        for key in _VECTORS
    }
    return ModelState(
        version=0,
        weights={name: to_host(param) for name, param in params.items()},
        square_avg=vectors["square_avg"],
        acc_delta=vectors["acc_delta"],
        update_counts={name: int(entry.get("step", 0)) for name, entry in entry_of.items()},
    )


def _params_of(optimizer: torch.optim.Adadelta) -> dict[str, Tensor]:
    if not isinstance(optimizer, torch.optim.Adadelta):
        raise TypeError(f"expected a torch.optim.Adadelta, got {type(optimizer).__name__}")
    names: dict[Tensor, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        assign_names(names, index, group)
    return {name: param for param, name in names.items()}


def _part(state: ModelState, key: str, name: str) -> Any:
    """Returns the entry of tensor `name` in the part of `state` called `key`."""
    values = getattr(state, key)
    if values is None:
        raise ValueError(f"{key}: the state has none; pull it with optimizer_state=True")
    if name not in values:
        raise ValueError(f"{key}: tensor {name} is missing")
    return values[name]


def _vector(array: Array, key: str, name: str, param: Tensor) -> Tensor:
    if array.shape != tuple(param.shape):
        raise ValueError(f"{key}: expected tensor {name} of shape {tuple(param.shape)}, got {array.shape}")
    return torch.from_numpy(array).to(param)
