"""State dicts have the form of torch.optim.Adadelta and are exchanged with it, also through files."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import equal
from torch import nn

import deltaserve

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote, Side


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_it_has_the_form_of_torch(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(lr=0.5)
    ours, theirs = (side.optimizer.state_dict() for side in pair.sides)
    assert ours == theirs, "no state before the first step"
    pair.train(3)
    ours, theirs = (side.optimizer.state_dict() for side in pair.sides)
    assert ours.keys() == theirs.keys() == {"state", "param_groups"}
    assert [group.keys() for group in ours["param_groups"]] == [group.keys() for group in theirs["param_groups"]]
    for key, state in ours["state"].items():
        assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
            name: (value.dtype, value.shape) for name, value in theirs["state"][key].items()
        }


def test_it_is_a_copy(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    pair.train(3)
    state = pair.remote.optimizer.state_dict()
    saved = deepcopy(state)
    pair.train(3)
    assert equal(state, saved)
    assert not equal(pair.remote.optimizer.state_dict(), saved)


@pytest.mark.parametrize("options", [{}, {"lr": 0.3, "weight_decay": 0.1}, {"maximize": True, "lr": 0.01}])
def test_training_moves_to_torch_and_back(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    """One side uses torch throughout; the other starts on the server, moves to torch and back, through files."""
    pair = make_pair(**options)
    pair.train(10)
    here = torch.optim.Adadelta(pair.remote.net.parameters(), lr=9.0)
    here.load_state_dict(through_a_file(pair.remote.optimizer.state_dict()))
    away = pair.remote.optimizer
    pair.remote.optimizer = here
    pair.train(10)
    away.load_state_dict(through_a_file(here.state_dict()))
    pair.remote.optimizer = away
    pair.train(10)
    counts = {state["step"].item() for state in away.state_dict()["state"].values()}
    assert counts == {30.0}


def test_a_checkpoint_continues_in_a_new_model_on_the_server(
    make_pair: "Callable[..., Pair]", remote: "Remote"
) -> None:
    pair = make_pair(weight_decay=0.1)
    pair.train(8)
    checkpoint = through_a_file({"net": pair.remote.net.state_dict(), "optimizer": pair.remote.optimizer.state_dict()})
    net = deepcopy(pair.remote.net)
    for param in net.parameters():
        nn.init.zeros_(param)
    net.load_state_dict(checkpoint["net"])
    optimizer = remote(net.parameters())
    optimizer.load_state_dict(checkpoint["optimizer"])
    pair.train(8)
    type(pair.remote)(net, optimizer).train(8)
    for ours, theirs in zip(net.parameters(), pair.remote.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert equal(optimizer.state_dict(), pair.remote.optimizer.state_dict())


def test_a_state_that_is_loaded_is_what_comes_back(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(lr=0.5)
    pair.train(7)
    state = pair.local.optimizer.state_dict()
    saved = deepcopy(state)
    pair.remote.optimizer.load_state_dict(state)
    assert equal(state, saved), "the caller's dict is not changed"
    back = pair.remote.optimizer.state_dict()
    assert equal(back["state"], state["state"])
    assert back["param_groups"] == state["param_groups"]


def test_an_earlier_state_is_restored(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    pair.train(5)
    saved = [(deepcopy(side.net.state_dict()), deepcopy(side.optimizer.state_dict())) for side in pair.sides]
    pair.train(5)
    for side, (weights, state) in zip(pair.sides, saved, strict=True):
        side.net.load_state_dict(weights)
        side.optimizer.load_state_dict(state)
    pair.compare()
    pair.train(10)


def test_an_empty_state_starts_over(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    fresh = deepcopy(pair.remote.optimizer.state_dict())
    pair.train(5)
    for side in pair.sides:
        side.optimizer.load_state_dict(fresh)
    assert pair.remote.optimizer.state_dict()["state"] == {}
    pair.train(5)


def test_a_parameter_without_state_among_others_with(make_pair: "Callable[..., Pair]") -> None:
    def drop(side: "Side", step: int) -> None:
        next(iter(side.net.parameters())).grad = None

    pair = make_pair()
    pair.train(5, drop)
    assert sorted(pair.remote.optimizer.state_dict()["state"]) == [1, 2, 3]
    pair.remote.optimizer.load_state_dict(pair.local.optimizer.state_dict())
    assert sorted(pair.remote.optimizer.state_dict()["state"]) == [1, 2, 3]
    pair.train(5)


def test_the_state_is_not_kept_in_the_optimizer(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    pair.train(2)
    optimizer = pair.remote.optimizer
    state = optimizer.state_dict()
    assert not optimizer.state
    optimizer.load_state_dict(state)
    assert not optimizer.state


def test_after_loading_the_worker_has_the_new_version(remote: "Remote") -> None:
    param = nn.Parameter(torch.tensor([1 / 3], dtype=torch.float64))
    optimizer = remote([param])
    with torch.no_grad():
        param.fill_(2 / 3)
    optimizer.load_state_dict(optimizer.state_dict())
    assert param.item() == torch.tensor(2 / 3, dtype=torch.float32).item(), "the server's float32 value"
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.last_result is not None
    assert (optimizer.last_result.version, optimizer.last_result.staleness) == (2, 0)


def test_weights_loaded_into_the_module_before_the_optimizer_is_made(
    remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    net, saved = nn.Linear(2, 2), {"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)}
    net.load_state_dict(saved)
    remote(net.parameters(), model=model)
    assert (client.model(model).pull_state().weights["0.0"] == 3).all()


def test_weights_loaded_into_the_module_later_count_once_the_optimizers_state_is_loaded(remote: "Remote") -> None:
    net = nn.Linear(2, 2)
    optimizer = remote(net.parameters())
    state = optimizer.state_dict()
    net.load_state_dict({"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)})
    optimizer.load_state_dict(state)
    assert (net.weight == 3).all()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert ((net.weight - 3).abs() < 0.1).all()


@pytest.mark.parametrize("loaded_named", [True, False])
@pytest.mark.parametrize("own_named", [True, False])
def test_names_in_a_loaded_state_do_not_rename_the_servers_tensors(
    own_named: bool, loaded_named: bool, remote: "Remote", make_pair: "Callable[..., Pair]"
) -> None:
    """torch takes "param_names" from the state dict; the tensors on the server keep their names."""

    def params(net: nn.Module, named: bool, prefix: str = "") -> Any:
        return [(prefix + name, param) for name, param in net.named_parameters()] if named else net.parameters()

    pair = make_pair(params=lambda net: params(net, own_named))
    other = torch.optim.Adadelta(params(deepcopy(pair.local.net), loaded_named, "module."))
    for side in pair.sides:
        side.optimizer.load_state_dict(other.state_dict())
    if loaded_named:
        assert pair.remote.optimizer.param_groups[0]["param_names"][0] == "module.0.weight"
    pair.train(5)


def test_a_state_of_another_form_is_refused_and_changes_nothing(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    pair.train(3)
    saved = deepcopy(pair.remote.optimizer.state_dict())
    wrong = {
        "a different number of parameter groups": torch.optim.Adadelta(
            [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}]
        ),
        "doesn't match the size of optimizer's group": torch.optim.Adadelta([torch.ones(1)]),
    }
    for text, optimizer in wrong.items():
        for side in pair.sides:
            with pytest.raises(ValueError, match=text):
                side.optimizer.load_state_dict(optimizer.state_dict())
    assert equal(pair.remote.optimizer.state_dict(), saved)
    bad = deepcopy(saved)
    bad["state"][0]["square_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match="square_avg"):
        pair.remote.optimizer.load_state_dict(bad)
    bad = deepcopy(saved)
    bad["state"][0]["square_avg"][0, 0] = -1.0
    with pytest.raises(deltaserve.RequestError, match="square_avg"):
        pair.remote.optimizer.load_state_dict(bad)
    pair.train(3)


def test_a_state_that_one_worker_loads_counts_for_all(remote: "Remote", model: str) -> None:
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    one, two = remote(net.parameters(), model=model), remote(other.parameters(), model=model)
    state = torch.optim.Adadelta(net.parameters()).state_dict()
    state["state"] = {
        index: {"step": torch.tensor(9.0), "square_avg": torch.ones_like(p), "acc_delta": torch.ones_like(p)}
        for index, p in enumerate(net.parameters())
    }
    one.load_state_dict(state)
    assert equal(two.state_dict()["state"], state["state"])
    other(torch.ones(1, 2)).sum().backward()
    two.step()
    assert two.state_dict()["state"][0]["step"].item() == 10
