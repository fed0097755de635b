"""add_param_group during training: state is kept, other workers go on, a refusal leaves nothing behind."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import every_structure, every_structure_with
from torch import nn

import deltaserve
from deltaserve import Adadelta, Sync
from deltaserve.torch import RemoteAdadelta, RemoteAdam, RemoteOptimizer, RemoteRMSprop, RemoteSGD
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote


def head(net: nn.Module) -> Any:
    return net[2].parameters()  # type: ignore[index]


def body(net: nn.Module) -> Any:
    return net[0].parameters()  # type: ignore[index]


@every_structure_with("own", [{}, {"lr": 0.1, "weight_decay": 0.1}, {"maximize": True, "lr": 0.01}])
def test_a_group_that_is_added_later(
    options: dict[str, Any], own: dict[str, Any], make_pair: "Callable[..., Pair]"
) -> None:
    """Its first update is the first, with Adam's corrections and SGD's momentum as of the first update."""
    pair = make_pair(params=head, **options)
    pair.train(8)
    for side in pair.sides:
        side.optimizer.add_param_group({"params": body(side.net), **own})
    pair.train(8)
    assert pair.counts() == [16, 16, 8, 8]


def test_named_groups_are_added_later(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(params=lambda net: [("head", next(head(net)))])
    pair.train(3)
    for side in pair.sides:
        side.optimizer.add_param_group({"params": [("body", next(body(side.net)))]})
    pair.train(3)


def test_several_groups_one_after_the_other(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(params=lambda net: [next(head(net))])
    for index, param in enumerate(["2.bias", "0.weight", "0.bias"]):
        pair.train(5)
        for side in pair.sides:
            side.optimizer.add_param_group({"params": dict(side.net.named_parameters())[param], "lr": 1 / (index + 2)})
    pair.train(5)
    assert len(pair.remote.optimizer.state_dict()["param_groups"]) == 4


@every_structure
def test_its_state_moves_to_torch_and_back(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(params=head, **options)
    pair.train(5)
    for side in pair.sides:
        side.optimizer.add_param_group({"params": body(side.net)})
    pair.train(5)
    pair.remote.optimizer.load_state_dict(pair.local.optimizer.state_dict())
    pair.train(5)


def test_another_worker_goes_on_and_may_add_the_same(remote: "Remote", client: deltaserve.Client, model: str) -> None:
    ones = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    one, two = remote([ones[0]], model=model), remote([ones[1]], model=model)

    def step(optimizer: torch.optim.Optimizer, *params: nn.Parameter) -> None:
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()

    step(one, ones[0])
    one.add_param_group({"params": [ones[2]], "lr": 0.5})
    step(one, ones[0], ones[2])
    step(two, ones[1])
    assert ones[1].tolist() != [1, 1, 1]
    two.add_param_group({"params": [ones[3]], "lr": 0.5})
    assert torch.equal(ones[3], ones[2]), "it starts from the server's weights"
    step(two, ones[1], ones[3])
    shared = client.model(model)
    assert shared.pull_state().update_counts == {"0.0": 4, "1.0": 2}
    assert shared.groups == (Adadelta(), Adadelta(lr=0.5))
    assert sorted(session.rank for session in shared.info().sessions) == [0, 1]


def test_another_worker_that_adds_something_else_gets_an_error(remote: "Remote", model: str) -> None:
    ones = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    one, two = remote([ones[0]], model=model), remote([ones[1]], model=model)
    one.add_param_group({"params": [ones[2]], "lr": 0.5})
    other = nn.Parameter(torch.ones(4))
    with pytest.raises(deltaserve.ConflictError, match="2 tensors in 2 groups"):
        two.add_param_group({"params": [other]})
    assert len(two.param_groups) == 1
    ones[1].grad = torch.ones(3)
    two.step()


def test_workers_add_groups_at_their_own_pace(remote: "Remote", model: str) -> None:
    """One worker is two groups ahead of another; a third starts when the model has all three."""
    paces: dict[RemoteOptimizer, list[nn.Parameter]] = {}

    def begin() -> RemoteOptimizer:
        params = [nn.Parameter(torch.ones(2))]
        optimizer = remote(params, model=model)
        paces[optimizer] = params
        return optimizer

    def grow(optimizer: RemoteOptimizer) -> None:
        paces[optimizer].append(nn.Parameter(torch.ones(2)))
        optimizer.add_param_group({"params": paces[optimizer][-1:], "lr": 1 / len(paces[optimizer])})

    def step(optimizer: RemoteOptimizer) -> None:
        for param in paces[optimizer]:
            param.grad = torch.ones(2)
        optimizer.step()

    first, second = begin(), begin()
    for _ in range(2):
        grow(first)
        step(first)
    third = begin()
    for optimizer in (second, third):
        for _ in range(2):
            step(optimizer)
            grow(optimizer)
        step(optimizer)
    step(first)
    assert [int(state["step"]) for state in third.state_dict()["state"].values()] == [9, 7, 4]
    second.load_state_dict(second.state_dict())
    values = [[param.tolist() for param in paces[optimizer]] for optimizer in (first, third)]
    step(third)
    assert values[0] != [param.tolist() for param in paces[third]]


def test_in_a_synchronous_model(remote: "Remote") -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = remote([params[0]], policy=Sync())
    for index, param in enumerate(params):
        param.grad = torch.ones(2)
        optimizer.step()
        if not index:
            optimizer.add_param_group({"params": [params[1]]})
    assert optimizer.state_dict()["state"][0]["step"].item() == 2


@pytest.mark.parametrize(
    ("group", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"rho": 2.0}, ValueError, "Invalid rho value: 2.0"),
        ({"params": [torch.ones(2, dtype=torch.complex64)]}, TypeError, "real floating-point parameters"),
        (
            {"params": [torch.full((2,), torch.nan)]},
            deltaserve.RequestError,
            "tensor 1.0 at element 0",
        ),
        ({"lr": float("inf")}, ValueError, "lr: expected .*, got inf"),
        ({"differentiable": True}, ValueError, "differentiable: expected False, got True"),
    ],
)
def test_a_group_that_is_refused_leaves_nothing_behind(
    group: dict[str, Any], error: type[Exception], text: str, make_pair: "Callable[..., Pair]"
) -> None:
    pair = make_pair(params=head)
    pair.train(3)
    with pytest.raises(error, match=text):
        pair.remote.optimizer.add_param_group({"params": body(pair.remote.net), **group})
    assert len(pair.remote.optimizer.param_groups) == 1
    pair.train(3)
    for side in pair.sides:
        side.optimizer.add_param_group({"params": body(side.net)})
    pair.train(3)


DIFFERENT: "list[tuple[type[RemoteOptimizer], dict[str, Any], dict[str, Any], str]]" = [
    (RemoteSGD, {}, {"momentum": 0.9}, "expected sgd, got sgd with momentum"),
    (
        RemoteSGD,
        {"momentum": 0.9},
        {"nesterov": True},
        "expected sgd with momentum, got sgd with momentum, nesterov",
    ),
    (RemoteRMSprop, {"momentum": 0.5}, {"momentum": 0}, "expected rmsprop with momentum, got rmsprop"),
    (RemoteRMSprop, {}, {"centered": True}, "expected rmsprop, got rmsprop with centered"),
    (RemoteAdam, {"amsgrad": True}, {"amsgrad": False}, "expected adam with amsgrad, got adam"),
]


@pytest.mark.parametrize(("kind", "options", "group", "text"), DIFFERENT, ids=[text for *_, text in DIFFERENT])
def test_a_group_of_another_structure_is_refused(
    options: dict[str, Any], group: dict[str, Any], text: str, make_pair: "Callable[..., Pair]", remote: "Remote"
) -> None:
    pair = make_pair(params=head, **options)
    pair.train(2)
    with pytest.raises(ValueError, match=f"{text}: all parameter groups of a model have the same"):
        pair.remote.optimizer.add_param_group({"params": body(pair.remote.net), **group})
    pair.train(2)
    with pytest.raises(ValueError, match=text):
        remote([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], **group}], **options)


def test_a_group_that_does_not_reach_the_server_leaves_nothing_behind() -> None:
    param = nn.Parameter(torch.ones(2))
    with LocalServer() as server:
        optimizer = RemoteAdadelta([param], server.target, model="m", timeout_seconds=30)
    optimizer._client._connection.timeout_seconds = 0.1
    with pytest.raises(deltaserve.UnavailableError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    optimizer.close()
