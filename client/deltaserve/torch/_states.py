"""The state of `torch.optim.Adadelta` and that of a model, each made of the other."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from deltaserve._common.element_types import Array
from deltaserve._types import ModelState
from deltaserve.torch._tensors import to_host

_VECTORS = ("square_avg", "acc_delta")

Named = Iterable[tuple[str, Tensor]]
"""Parameters with the names of their tensors on the server."""


def state_dict_of(state: ModelState, optimizer: torch.optim.Adadelta) -> dict[str, Any]:
    """Returns what `optimizer.load_state_dict` takes, so that it goes on where the model was.

    The hyperparameters are the optimizer's own. The parameters are for the caller to set, from `state.weights`.

    Args:
        state: With optimizer state, as `Model.pull_state()` returns it.
        optimizer: Of parameters whose names and shapes are those of the model's tensors. They are named as
            `RemoteAdadelta` names them: as in the optimizer's named parameters, else by group and place, as in "0.1".

    Raises:
        TypeError: The optimizer is no `torch.optim.Adadelta`.
        ValueError: A part of the state is missing or has another shape, or two parameters have the same name.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.Adadelta([("w", weight)])
        >>> optimizer.load_state_dict(state_dict_of(model_state_of(optimizer), optimizer))
    """
    named = _named(optimizer)
    held = to_torch(state, named)
    return {
        "state": {index: deepcopy(held[param]) for index, (_, param) in enumerate(named) if param in held},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def model_state_of(optimizer: torch.optim.Adadelta) -> ModelState:
    """Returns an optimizer's parameters and state, as `Model.put_state` takes them.

    Its `weights` make a model that goes on where the optimizer was, by `Client.create_model` before `put_state`: in the
    order in which `RemoteAdadelta` lays them out. Everything is copied, as float32.

    Args:
        optimizer: Its parameters are named as for `state_dict_of`.

    Raises:
        TypeError: The optimizer is no `torch.optim.Adadelta`; of a `RemoteAdadelta`, the server has the state.
        ValueError: Two parameters have the same name.
    """
    return deepcopy(from_torch(optimizer.state, reversed(_named(optimizer))))


def give_names(names: dict[Tensor, str], index: int, group: Mapping[str, Any]) -> None:
    """Names a group's tensors; those without a name by group and place.

    Args:
        names: Of the parameters so far; the group's are added.
        index: The group's.
        group: As in `param_groups`.

    Raises:
        ValueError: Two tensors have the same name.
    """
    given = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
    named = dict(zip(group["params"], given, strict=True))
    taken = {name for param, name in names.items() if param not in named}
    for name in named.values():
        if name in taken:
            raise ValueError(f"two parameters are named {name}")
        taken.add(name)
    names.update(named)


def to_torch(state: ModelState, named: Named) -> dict[Tensor, dict[str, Tensor]]:
    """Returns the state that torch.optim.Adadelta would hold of every parameter that has had an update.

    It may have the memory of the arrays.

    Raises:
        ValueError: A part of the state is missing or has another shape.
    """
    held = {}
    for name, param in named:
        count = _part(state, "update_counts", name)
        if count:
            vectors = {key: _vector(_part(state, key, name), key, name, param) for key in _VECTORS}
            held[param] = {"step": torch.tensor(float(count)), **vectors}
    return held


def from_torch(held: Mapping[Tensor, Mapping[str, Any]], named: Named) -> ModelState:
    """Returns parameters and the state of torch.optim.Adadelta; zero state where it has none yet.

    It may have the memory of the tensors.
    """
    states = {name: (param, held.get(param, {})) for name, param in named}
    vectors = {
        key: {name: to_host(state.get(key, torch.zeros_like(param))) for name, (param, state) in states.items()}
        for key in _VECTORS
    }
    return ModelState(
        version=0,
        weights={name: to_host(param) for name, (param, _) in states.items()},
        square_avg=vectors["square_avg"],
        acc_delta=vectors["acc_delta"],
        update_counts={name: int(state.get("step", 0)) for name, (_, state) in states.items()},
    )


def _named(optimizer: torch.optim.Adadelta) -> list[tuple[str, Tensor]]:
    if not isinstance(optimizer, torch.optim.Adadelta):
        raise TypeError(f"expected a torch.optim.Adadelta, got {type(optimizer).__name__}")
    names: dict[Tensor, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        give_names(names, index, group)
    return [(name, param) for param, name in names.items()]


def _part(state: ModelState, what: str, name: str) -> Any:
    """Returns what a state has of a tensor."""
    values = getattr(state, what)
    if values is None:
        raise ValueError(f"{what}: the state is without it")
    if name not in values:
        raise ValueError(f"{what}: tensor {name} is missing")
    return values[name]


def _vector(array: Array, what: str, name: str, param: Tensor) -> Tensor:
    if array.shape != tuple(param.shape):
        raise ValueError(f"{what}: tensor {name} has shape {array.shape}, not {tuple(param.shape)}")
    return torch.from_numpy(array).to(param)
