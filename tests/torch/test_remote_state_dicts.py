"""State dicts have the form of those of torch.optim and are exchanged with it, also through files."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import equal, every_kind, every_structure, every_structure_with
from torch import nn

import deltaserve
from deltaserve.torch import RemoteAdam, RemoteAdamW, RemoteOptimizer, RemoteRMSprop, RemoteSGD

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote, Side


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@every_structure
def test_it_has_the_form_of_torch(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(**{"lr": 0.01, **options})
    ours, theirs = (side.optimizer.state_dict() for side in pair.sides)
    assert equal(ours, theirs), "no state before the first step, except in Adagrad"
    pair.train(3)
    ours, theirs = (side.optimizer.state_dict() for side in pair.sides)
    assert ours.keys() == theirs.keys() == {"state", "param_groups"}
    assert [group.keys() for group in ours["param_groups"]] == [group.keys() for group in theirs["param_groups"]]
    for key, state in ours["state"].items():
        assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
            name: (value.dtype, value.shape) for name, value in theirs["state"][key].items()
        }


@every_kind
def test_it_is_a_copy(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    pair.train(3)
    state = pair.remote.optimizer.state_dict()
    saved = deepcopy(state)
    pair.train(3)
    assert equal(state, saved)


@every_structure_with("steps", [10, 0, 1])
def test_training_moves_to_torch_and_back(
    options: dict[str, Any], steps: int, kind: type[RemoteOptimizer], make_pair: "Callable[..., Pair]"
) -> None:
    """One side uses torch throughout; the other starts on the server, moves to torch and back, through files."""
    pair = make_pair(weight_decay=0.1, **options)
    pair.train(steps)
    make_optimizer: Any = kind._torch_class
    here = make_optimizer(pair.remote.net.parameters(), lr=9.0)
    here.load_state_dict(through_a_file(pair.remote.optimizer.state_dict()))
    away = pair.remote.optimizer
    pair.remote.optimizer = here
    pair.train(steps)
    away.load_state_dict(through_a_file(here.state_dict()))
    pair.remote.optimizer = away
    pair.train(10)


@every_structure
def test_a_checkpoint_continues_in_a_new_model_on_the_server(
    options: dict[str, Any], make_pair: "Callable[..., Pair]", remote: "Remote"
) -> None:
    pair = make_pair(weight_decay=0.1, **options)
    pair.train(8)
    checkpoint = through_a_file({"net": pair.remote.net.state_dict(), "optimizer": pair.remote.optimizer.state_dict()})
    net = deepcopy(pair.remote.net)
    for param in net.parameters():
        nn.init.zeros_(param)
    net.load_state_dict(checkpoint["net"])
    optimizer = remote(net.parameters(), **options)
    optimizer.load_state_dict(checkpoint["optimizer"])
    pair.train(8)
    type(pair.remote)(net, optimizer).train(8)
    for ours, theirs in zip(net.parameters(), pair.remote.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert equal(optimizer.state_dict(), pair.remote.optimizer.state_dict())


@every_structure
def test_a_state_that_is_loaded_is_what_comes_back(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(lr=0.01, **options)
    pair.train(7)
    state = pair.local.optimizer.state_dict()
    saved = deepcopy(state)
    pair.remote.optimizer.load_state_dict(state)
    assert equal(state, saved), "the caller's dict is not changed"
    back = pair.remote.optimizer.state_dict()
    assert equal(back["state"], state["state"])
    assert back["param_groups"] == state["param_groups"]


@every_structure
def test_an_earlier_state_is_restored(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(**options)
    pair.train(5)
    saved = [(deepcopy(side.net.state_dict()), deepcopy(side.optimizer.state_dict())) for side in pair.sides]
    pair.train(5)
    for side, (weights, state) in zip(pair.sides, saved, strict=True):
        side.net.load_state_dict(weights)
        side.optimizer.load_state_dict(state)
    pair.compare()
    pair.train(10)


@every_structure
def test_an_empty_state_starts_over(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(**options)
    fresh = deepcopy(pair.remote.optimizer.state_dict())
    pair.train(5)
    for side in pair.sides:
        side.optimizer.load_state_dict(fresh)
    assert equal(pair.remote.optimizer.state_dict()["state"], fresh["state"])
    pair.train(5)


@every_structure
def test_a_parameter_without_state_among_others_with(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    def drop(side: "Side", step: int) -> None:
        next(iter(side.net.parameters())).grad = None

    pair = make_pair(**options)
    pair.train(5, drop)
    pair.remote.optimizer.load_state_dict(pair.local.optimizer.state_dict())
    pair.train(5)


@every_kind
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


STRUCTURES_APART: "list[tuple[type[RemoteOptimizer], dict[str, Any], dict[str, Any], str]]" = [
    (RemoteSGD, {}, {"momentum": 0.9}, "expected sgd, got sgd with momentum"),
    (RemoteSGD, {"momentum": 0.9}, {}, "expected sgd with momentum, got sgd"),
    (RemoteSGD, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, "got sgd with momentum, nesterov"),
    (RemoteRMSprop, {}, {"centered": True}, "expected rmsprop, got rmsprop with centered"),
    (RemoteRMSprop, {"centered": True}, {"momentum": 0.5}, "expected rmsprop with centered, got rmsprop with momentum"),
    (RemoteAdam, {}, {"amsgrad": True}, "expected adam, got adam with amsgrad"),
    (RemoteAdamW, {"amsgrad": True}, {}, "expected adamw with amsgrad, got adamw"),
]


@pytest.mark.parametrize(
    ("kind", "options", "others", "text"), STRUCTURES_APART, ids=[text for *_, text in STRUCTURES_APART]
)
def test_a_state_of_another_structure_is_refused_and_changes_nothing(
    options: dict[str, Any], others: dict[str, Any], text: str, kind: Any, make_pair: "Callable[..., Pair]"
) -> None:
    pair = make_pair(**options)
    pair.train(3)
    saved, version = deepcopy(pair.remote.optimizer.state_dict()), pair.remote.optimizer.version  # type: ignore[attr-defined]
    other = kind._torch_class(deepcopy(pair.local.net).parameters(), **others)
    with pytest.raises(ValueError, match=text):
        pair.remote.optimizer.load_state_dict(other.state_dict())
    # The hyperparameters may fit where the state does not.
    state = deepcopy(saved)
    for entry in state["state"].values():
        entry["other"] = entry.popitem()[1]
    if state["state"]:
        with pytest.raises(ValueError, match=r"the state of parameter 0\.0 does not fit the hyperparameters"):
            pair.remote.optimizer.load_state_dict(state)
    assert equal(pair.remote.optimizer.state_dict(), saved)
    assert pair.remote.optimizer._model.info().version == version  # type: ignore[attr-defined]
    pair.train(3)


def test_a_state_of_another_optimizer_is_refused(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    pair.train(3)
    for other in (torch.optim.SGD, torch.optim.Adam):
        state = other(deepcopy(pair.local.net).parameters()).state_dict()
        with pytest.raises(ValueError, match=r"a parameter group lacks .*; is it one of another optimizer\?"):
            pair.remote.optimizer.load_state_dict(state)
    pair.train(3)


@pytest.mark.parametrize("kind", [RemoteSGD])
def test_momentum_of_none_is_that_of_a_parameter_before_its_first_update(make_pair: "Callable[..., Pair]") -> None:
    """Older versions of torch write None; the first update with dampening differs from the others."""
    pair = make_pair(momentum=0.9, dampening=0.5)
    pair.train(3)
    for side in pair.sides:
        state = deepcopy(side.optimizer.state_dict())
        state["state"][0]["momentum_buffer"] = None
        del state["state"][1]
        side.optimizer.load_state_dict(state)
    assert pair.counts() == [0, 0, 1, 1]
    pair.train(3)
    assert pair.counts() == [3, 3, 4, 4]


@every_structure
def test_a_state_dict_of_an_older_version_of_torch(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    """It lacks options that did not exist, and its steps are numbers."""
    pair = make_pair(**options)
    pair.train(3)
    state = deepcopy(pair.local.optimizer.state_dict())
    newer = ["foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"]
    for name in newer + [name for name in ("amsgrad", "nesterov", "centered") if name not in options]:
        state["param_groups"][0].pop(name, None)
    for entry in state["state"].values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
    for side in pair.sides:
        side.optimizer.load_state_dict(deepcopy(state))
    pair.train(3)


@pytest.mark.parametrize("kind", [RemoteAdam])
def test_updates_are_counted_beyond_the_integers_of_float32(remote: "Remote") -> None:
    """The step of torch, a float32, stays at 2**24."""
    param = nn.Parameter(torch.ones(3))
    optimizer, local = remote([param]), torch.optim.Adam([param])
    param.grad = torch.ones(3)
    local.step()
    state = local.state_dict()
    state["state"][0]["step"] = torch.tensor(2.0**24)
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step()
    assert optimizer._model.pull_state().update_counts == {"0.0": 2**24 + 3}


@pytest.mark.parametrize("kind", [RemoteRMSprop])
def test_a_variance_that_rounding_makes_negative_counts_as_0(remote: "Remote") -> None:
    """torch's weights become NaN."""
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, local = remote([ours], centered=True), torch.optim.RMSprop([theirs], centered=True)
    ours.grad, theirs.grad = torch.ones(3), torch.ones(3)
    local.step()
    state = local.state_dict()
    state["state"][0].update(square_avg=torch.ones(3), grad_avg=torch.full((3,), 1 + 2.0**-20))
    for loaded in (optimizer, local):
        loaded.load_state_dict(deepcopy(state))
        loaded.step()
    assert theirs.isnan().all()
    assert ours.isfinite().all()


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
