"""The drop-ins as torch.optim.Optimizer: autograd, hooks, copies, printing and errors."""

import copy
import doctest
import inspect
import pickle
import re
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import KINDS, every_kind
from torch import Tensor, nn

from deltaserve.torch import (
    RemoteAdadelta,
    RemoteAdagrad,
    RemoteAdam,
    RemoteAdamW,
    RemoteOptimizer,
    RemoteRMSprop,
    RemoteSGD,
    _optimizers,
    _remote,
    _states,
)

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote

# --- autograd


@pytest.mark.parametrize(
    "make", [lambda: torch.ones(3, 3), lambda: torch.ones(3, 3, dtype=torch.float64), lambda: torch.ones(3, 6)[:, ::2]]
)
def test_a_graph_from_before_the_step_cannot_be_used_after_it(make: Callable[[], Tensor], remote: "Remote") -> None:
    """As with torch: the values that backward needs are gone, and the new ones must not be used instead."""
    for optimize in (torch.optim.Adadelta, remote):
        param = nn.Parameter(make())
        optimizer = optimize([param])
        loss = (param @ param).sum()
        param.grad = torch.ones_like(param)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_graph_from_before_the_optimizer_cannot_be_used_after_weights_were_pulled(remote: "Remote") -> None:
    param = nn.Parameter(torch.ones(3, 3))
    loss = (param @ param).sum()
    remote([param])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_is_not_part_of_the_graph(remote: "Remote") -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4)[::2])]
    optimizer = remote(params)
    for param in params:
        param.grad = torch.ones(2, requires_grad=True)
    optimizer.step()
    assert all(param.is_leaf and param.requires_grad and param.grad_fn is None for param in params)


def test_parameters_keep_their_identity_and_memory(remote: "Remote") -> None:
    param = nn.Parameter(torch.ones(5))
    address = param.data_ptr()
    optimizer = remote([param])
    param.grad = torch.ones(5)
    optimizer.step()
    assert param.data_ptr() == address
    assert optimizer.param_groups[0]["params"][0] is param


# --- hooks


def test_a_pre_hook_can_change_the_gradients(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()

    def double(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad.mul_(2)

    for side in pair.sides:
        side.optimizer.register_step_pre_hook(double)
    pair.train(8)


def test_hooks_of_state_dicts(make_pair: "Callable[..., Pair]") -> None:
    """A pre-hook sees the state; what the hooks change takes effect, as with torch's own optimizers."""
    pair = make_pair()
    pair.train(3)
    seen: list[Any] = []

    def before(optimizer: torch.optim.Optimizer) -> None:
        seen.append(sorted(state["step"].item() for state in optimizer.state.values()))

    def after(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "extra": len(state["state"])}

    def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state["param_groups"][0]["lr"] = 0.25
        return state

    def loaded(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["square_avg"].fill_(0.5)

    for side in pair.sides:
        side.optimizer.register_state_dict_pre_hook(before)
        side.optimizer.register_state_dict_post_hook(after)
        side.optimizer.register_load_state_dict_pre_hook(load)
        side.optimizer.register_load_state_dict_post_hook(loaded)
    ours, theirs = (side.optimizer.state_dict() for side in pair.sides)
    assert seen == [[3.0] * 4] * 2
    assert ours["extra"] == theirs["extra"] == 4
    for side in pair.sides:
        side.optimizer.load_state_dict(side.optimizer.state_dict())
        assert side.optimizer.param_groups[0]["lr"] == 0.25
        assert (side.optimizer.state_dict()["state"][0]["square_avg"] == 0.5).all()
    pair.train(3)


def test_entries_that_hooks_add_to_the_state_stay(remote: "Remote") -> None:
    def mark(optimizer: torch.optim.Optimizer) -> None:
        state: dict[Any, Any] = optimizer.state
        state["loaded"] = True

    param = nn.Parameter(torch.ones(2))
    for optimizer in (remote([param]), torch.optim.Adadelta([param])):
        optimizer.register_load_state_dict_post_hook(mark)
        optimizer.load_state_dict(optimizer.state_dict())
        assert dict(optimizer.state) == {"loaded": True}
        assert optimizer.state_dict()["state"] == {"loaded": True}


# --- copies and printing


def test_the_base_class_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"use one of them, or RemoteOptimizer\.of\(\)"):
        RemoteOptimizer([nn.Parameter(torch.ones(1))], "localhost:1", {}, model="m")


@every_kind
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, pickle.dumps, lambda optimizer: torch.save(optimizer, "/dev/null")]
)
def test_a_copy_is_refused_with_what_to_do_instead(duplicate: Callable[[Any], Any], remote: "Remote") -> None:
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: save its state_dict\(\) instead"):
        duplicate(remote([torch.zeros(1)]))


@every_kind
def test_it_can_be_printed(make_pair: "Callable[..., Pair]") -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        first, *rest = net.parameters()
        return [{"params": [first], "lr": 0.5}, {"params": rest, "weight_decay": 0.1}]

    pair = make_pair(params=groups)
    ours, theirs = (repr(side.optimizer) for side in pair.sides)
    assert ours.startswith("Remote")
    assert ours.removeprefix("Remote") == theirs


def test_no_public_signature_has_a_type_of_protobuf_or_grpc() -> None:
    modules = [_remote.__name__, _optimizers.__name__]
    functions = [
        function
        for kind in [RemoteOptimizer, *KINDS]
        for _, function in inspect.getmembers(kind, inspect.isfunction)
        if function.__module__ in modules
    ]
    assert {"__init__", "of", "step", "state_dict"} <= {function.__name__ for function in functions}
    for function in functions:
        if function.__name__.startswith("_") and function.__name__ != "__init__":
            continue
        for annotation in typing.get_type_hints(function).values():
            assert not str(getattr(annotation, "__module__", "")).startswith(("google", "grpc", "deltaserve.v1"))


@pytest.mark.parametrize("module", [_optimizers, _remote, _states])
def test_examples_in_docstrings(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


# --- errors, as torch words them


def error_of(make: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make()
    return type(caught.value), str(caught.value)


BAD: dict[str, Callable[[Any], Any]] = {
    "lr": lambda make: make([torch.zeros(1)], lr=-0.5),
    "lr is NaN": lambda make: make([torch.zeros(1)], lr=float("nan")),
    "lr has two elements": lambda make: make([torch.zeros(1)], lr=torch.ones(2)),
    "lr is a negative tensor": lambda make: make([torch.zeros(1)], lr=torch.tensor(-1.0)),
    "rho": lambda make: make([torch.zeros(1)], rho=1.5),
    "rho below 0": lambda make: make([torch.zeros(1)], rho=-0.1),
    "eps": lambda make: make([torch.zeros(1)], eps=-1e-6),
    "weight_decay": lambda make: make([torch.zeros(1)], weight_decay=-0.1),
    "nothing to optimize": lambda make: make([]),
    "a tensor, not a list": lambda make: make(torch.zeros(1)),
    "not a tensor": lambda make: make([1.0]),
    "a set": lambda make: make([{"params": {torch.zeros(1)}}]),
    "not a leaf": lambda make: make([torch.zeros(1, requires_grad=True) * 2]),
    "one tensor in two groups": lambda make: (lambda p: make([{"params": [p]}, {"params": [p]}]))(torch.zeros(1)),
    "names for some only": lambda make: make([("a", torch.zeros(1)), torch.zeros(1)]),
    "not a dict": lambda make: make([torch.zeros(1)]).add_param_group([torch.zeros(1)]),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_errors_have_the_type_and_text_of_torch(make: Callable[[Any], Any], remote: "Remote") -> None:
    assert error_of(lambda: make(remote)) == error_of(lambda: make(torch.optim.Adadelta))


BAD_OPTIONS: list[tuple[type[RemoteOptimizer], dict[str, Any]]] = [
    (RemoteAdadelta, {"eps": -1.0}),
    (RemoteAdadelta, {"rho": 2}),
    (RemoteSGD, {"lr": -1.0}),
    (RemoteSGD, {"momentum": -0.1}),
    (RemoteSGD, {"weight_decay": -0.1}),
    (RemoteSGD, {"nesterov": True}),
    (RemoteSGD, {"nesterov": True, "momentum": 0.5, "dampening": 0.5}),
    (RemoteSGD, {"fused": True, "foreach": True}),
    (RemoteAdagrad, {"lr_decay": -0.1}),
    (RemoteAdagrad, {"initial_accumulator_value": -0.1}),
    (RemoteAdagrad, {"eps": float("nan")}),
    (RemoteRMSprop, {"alpha": -0.1}),
    (RemoteRMSprop, {"momentum": float("nan")}),
    (RemoteAdam, {"betas": (1.0, 0.9)}),
    (RemoteAdam, {"betas": (0.9, 1.0)}),
    (RemoteAdam, {"betas": (0, 0.9)}),
    (RemoteAdam, {"lr": torch.tensor(1.0), "foreach": True}),
    (RemoteAdamW, {"betas": (-0.1, 0.9)}),
    (RemoteAdamW, {"weight_decay": -1}),
]


@pytest.mark.parametrize(("kind", "options"), BAD_OPTIONS, ids=str)
def test_errors_about_arguments_have_the_type_and_text_of_torch(
    kind: Any, options: dict[str, Any], remote: "Remote"
) -> None:
    params = [torch.zeros(1)]
    assert error_of(lambda: remote(params, **options)) == error_of(lambda: kind._torch_class(params, **options))


ONLY_HERE: list[tuple[str, Any, str]] = [
    ("eps", 0.0, "eps: expected"),
    ("eps", 1e-60, "eps: expected"),
    ("lr", float("inf"), "lr: expected "),
    ("weight_decay", 1e300, "weight_decay: expected"),
    ("momentum", 1e300, "momentum: expected"),
    ("dampening", 1.5, "dampening: expected in [0, 1], got 1.5"),
    ("dampening", -0.5, "dampening: expected in [0, 1], got -0.5"),
    ("alpha", 1.5, "alpha: expected in [0, 1], got 1.5"),
    ("capturable", True, "capturable: expected False, got True"),
    ("differentiable", True, "differentiable: expected False, got True"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "error"),
    [(kind, *row) for kind in KINDS for row in ONLY_HERE if row[0] in inspect.signature(kind).parameters],
)
def test_what_torch_accepts_and_a_server_does_not(
    kind: Any, name: str, value: Any, error: str, remote: "Remote"
) -> None:
    """torch may divide 0 by 0, for instance; the server promises finite weights."""
    options = {name: value}
    kind._torch_class([torch.zeros(1)], **options)
    optimizer = remote([torch.zeros(1)])
    state = optimizer.state_dict()
    state["param_groups"][0].update(options)
    for refused in (
        lambda: remote([torch.zeros(1)], **options),
        lambda: remote([{"params": [torch.zeros(1)], **options}]),
        lambda: optimizer.add_param_group({"params": [torch.zeros(1)], **options}),
        lambda: optimizer.load_state_dict(state),
    ):
        with pytest.raises(ValueError, match=re.escape(error)):
            refused()
    (group,) = optimizer.param_groups
    assert group[name] != value


@every_kind
def test_implementations_of_torch_are_accepted_and_make_the_same_update(
    kind: type[RemoteOptimizer], remote: "Remote"
) -> None:
    results = []
    options: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}]
    for option in options:
        if option.keys() <= inspect.signature(kind).parameters.keys():
            param = nn.Parameter(torch.ones(3))
            optimizer = remote([param], **option)
            assert optimizer.state_dict()["param_groups"][0].items() >= option.items()
            param.grad = torch.tensor([1.0, 2.0, 3.0])
            optimizer.step()
            results.append(param.tolist())
    assert len(results) >= 3
    assert results == results[:1] * len(results)


@pytest.mark.parametrize(("kind", "other"), [(RemoteAdam, "AdamW"), (RemoteAdamW, "Adam")])
def test_weight_decay_of_the_other_kind_is_refused(kind: type[RemoteOptimizer], other: str, remote: "Remote") -> None:
    """In torch the option makes Adam AdamW. A state dict of Adam becomes one of AdamW by being loaded there."""
    group = {"params": [torch.zeros(1)], "decoupled_weight_decay": kind is RemoteAdam}
    with pytest.raises(ValueError, match=f"decoupled_weight_decay: expected .*; use {other} or Remote{other} instead"):
        remote([group])
    state = getattr(torch.optim, other)([torch.zeros(1)]).state_dict()
    optimizer = remote([torch.zeros(1)])
    if kind is RemoteAdamW:
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
        return
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="use RemoteAdamW instead"):
        remote([torch.zeros(1)], decoupled_weight_decay=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_parameters_that_are_not_real_floating_point_numbers(dtype: torch.dtype, remote: "Remote") -> None:
    assert error_of(lambda: remote([torch.zeros(1, dtype=dtype)])) == (
        TypeError, f"RemoteAdadelta requires real floating-point parameters, got {dtype}",
    )  # fmt: skip


@every_kind
def test_a_sparse_gradient_is_refused_and_changes_nothing(remote: "Remote") -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = remote([param])
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert param.tolist() == [1, 1, 1]
