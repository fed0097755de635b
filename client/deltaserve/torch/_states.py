"""Conversion between the state of torch optimizers and that of models."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve._common.element_types import Array
from deltaserve._common.optimizers import Optimizer
from deltaserve._types import ModelState
from deltaserve.torch._groups import check_structure, optimizers_of, torch_class_of
from deltaserve.torch._tensors import to_host


def state_dict_of(state: ModelState, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns a model's optimizer state as a state dict that `optimizer.load_state_dict` takes.

    The hyperparameters stay those of `optimizer`. The parameters are not touched: copy `state.weights` into them
    yourself.

    Args:
        state: A model's state, as `Model.pull_state()` returns it.
        optimizer: A `torch.optim` optimizer of the model's kind and structure, whose parameters match the model's
            tensors in name and shape. A parameter is named as a `RemoteOptimizer` names it: by its own name if the
            optimizer was given named parameters, else by group and position, such as "0.1".

    Raises:
        TypeError: `optimizer` is not of a class that is served, which are Adadelta, SGD, Adagrad, RMSprop, Adam and
            AdamW.
        ValueError: `state` lacks a part, is that of another optimizer or has a tensor of another shape, or two
            parameters have the same name.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.Adadelta([("w", weight)])
        >>> optimizer.load_state_dict(state_dict_of(model_state_of(optimizer), optimizer))
    """
    structure, params = _structure_of(optimizer), _params_of(optimizer)
    entries = to_torch(state, structure, params)
    return {
        "state": {index: deepcopy(entries[p]) for index, p in enumerate(params.values()) if p in entries},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def model_state_of(optimizer: torch.optim.Optimizer) -> ModelState:
    """Returns an optimizer's parameters and state in the form that `Model.put_state` takes.

    To continue a run on a server, create the model from the returned `weights` with `Client.create_model`, then call
    `put_state`; or use `RemoteOptimizer.of`. The weights are in the order in which a `RemoteOptimizer` lays them out.
    Everything is a float32 copy.

    Args:
        optimizer: A `torch.optim` optimizer whose parameters are named as `state_dict_of` describes.

    Raises:
        TypeError: `optimizer` is not of a class that is served; see `state_dict_of`. The state of a `RemoteOptimizer`
            is on the server.
        ValueError: Two parameters have the same name, parameter groups differ in structure, or the state does not fit
            the hyperparameters.
    """
    structure, params = _structure_of(optimizer), _params_of(optimizer)
    # Reversed is the order of a RemoteOptimizer's layout: about that in which backward computes gradients.
    return deepcopy(from_torch(optimizer.state, structure, dict(reversed(params.items()))))


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


def to_torch(state: ModelState, optimizer: Optimizer, params: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """Returns the `state` of a torch optimizer: an entry for each parameter for which torch would have one.

    The tensors may share memory with the arrays of `state`.

    Args:
        state: The model's state.
        optimizer: An optimizer of the model's structure.
        params: The parameters by tensor name.

    Raises:
        ValueError: `state` lacks a part, is that of another optimizer or has a tensor of another shape.
    """
    if state.slots is None:
        raise ValueError("slots: the state has none; pull it with optimizer_state=True")
    expected = {slot.name for slot in optimizer.slots}
    if state.slots.keys() != expected:
        raise ValueError(f"slots: expected {_listed(expected)}, got {_listed(state.slots.keys())}")
    entries = {}
    for name, param in params.items():
        count = _part(state.update_counts, "update_counts", name)
        # torch has no entry before a parameter's first update, except in Adagrad, which makes them when it is created.
        if count or optimizer.kind == "adagrad":
            vectors = {key: _vector(values, key, name, param) for key, values in state.slots.items()}
            step = {"step": torch.tensor(float(count))} if _has_step(optimizer) else {}
            entries[param] = {**step, **vectors}
    return {param: entry for param, entry in entries.items() if entry}  # SGD without momentum has no state


def from_torch(
    entries: Mapping[Tensor, Mapping[str, Any]], optimizer: Optimizer, params: Mapping[str, Tensor]
) -> ModelState:
    """Returns parameters and the `state` of a torch optimizer as a model's state.

    A parameter without an entry gets the initial state. The arrays may share memory with the tensors.

    Args:
        entries: The `state` of the torch optimizer.
        optimizer: An optimizer of the model's structure.
        params: The parameters by tensor name.

    Raises:
        ValueError: An entry lacks a part of the state, or has one that the optimizer does not have.
    """
    entry_of = {name: _entry(entries.get(param, {}), optimizer, name) for name, param in params.items()}
    return ModelState(
        version=0,
        weights={name: to_host(param) for name, param in params.items()},
        slots={
            slot.name: {
                name: to_host(entry_of[name][slot.name])
                if slot.name in entry_of[name]
                else np.full(tuple(param.shape), slot.initial, np.float32)
                for name, param in params.items()
            }
            for slot in optimizer.slots
        },
        update_counts={name: _update_count(entry) for name, entry in entry_of.items()},
    )


def _entry(entry: Mapping[str, Any], optimizer: Optimizer, name: str) -> Mapping[str, Any]:
    """Returns the state of a parameter without what is None, such as the momentum of SGD before the first update."""
    present = {key: value for key, value in entry.items() if value is not None}
    expected = {slot.name for slot in optimizer.slots} | ({"step"} if _has_step(optimizer) else set())
    if present and present.keys() != expected:
        raise ValueError(
            f"the state of parameter {name} does not fit the hyperparameters: expected {_listed(expected)}, "
            f"got {_listed(present.keys())}"
        )
    return present


def _has_step(optimizer: Optimizer) -> bool:
    """Whether the torch optimizer counts the updates of a parameter."""
    return optimizer.kind != "sgd"


def _update_count(entry: Mapping[str, Any]) -> int:
    # With a momentum buffer, which may be all that there is, the first update is over.
    return int(entry.get("step", 1)) if entry else 0


def _structure_of(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Returns the hyperparameters of a torch optimizer's first group, whose structure all groups must have."""
    first, *others = optimizers_of(torch_class_of(optimizer), optimizer.param_groups, optimizer.defaults)
    check_structure(first, others)
    return first


def _params_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        assign_names(names, index, group)
    return {name: param for param, name in names.items()}


def _part(values: Mapping[str, Any], key: str, name: str) -> Any:
    """Returns the entry of tensor `name` in the part of a state that is called `key`."""
    if name not in values:
        raise ValueError(f"{key}: tensor {name} is missing")
    return values[name]


def _vector(values: Mapping[str, Array], key: str, name: str, param: Tensor) -> Tensor:
    array = _part(values, key, name)
    if array.shape != tuple(param.shape):
        raise ValueError(f"{key}: expected tensor {name} of shape {tuple(param.shape)}, got {array.shape}")
    return torch.from_numpy(array).to(param)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
