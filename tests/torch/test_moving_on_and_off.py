"""A run moves onto a server and off it, at any step: the state arrives bit for bit, and training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.torch.conftest import equal, every_kind, every_structure_with
from torch import nn

import deltaserve
from deltaserve.torch import RemoteOptimizer, RemoteSGD, model_state_of, state_dict_of
from deltaserve.torch._groups import DEFINITIONS
from deltaserve_server import LocalServer
from deltaserve_server.cli import run

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote, Side

    Params = Callable[[nn.Module], Any]


def two_groups(net: nn.Module) -> list[dict[str, Any]]:
    first, second, third, fourth = net.parameters()
    return [{"params": [first]}, {"params": [second, third, fourth]}]


NAMED: "dict[str, Params]" = {
    "by place": lambda net: net.parameters(),
    "by name": lambda net: net.named_parameters(),
    "by group": two_groups,
}
WAYS = list(zip(NAMED.values(), (1, 23, 0), strict=True))
"""Each way to name parameters, with a number of steps before the move."""

every_move = every_structure_with("way", WAYS)


def bits(state: deltaserve.ModelState, counted: bool = True) -> dict[tuple[str, str], object]:
    """Returns what two equal states have in common: names, shapes, every bit, and if they are `counted`, counts."""
    assert state.slots is not None
    vectors: dict[tuple[str, str], object] = {
        (key, name): (array.shape, array.tobytes())
        for key, values in {"weights": state.weights, **state.slots}.items()
        for name, array in values.items()
    }
    return vectors | {("update_counts", name): count for name, count in state.update_counts.items() if counted}


def blank(net: nn.Module) -> nn.Module:
    """Returns a network of the same shapes, all zero."""
    copy = deepcopy(net)
    for param in copy.parameters():
        nn.init.zeros_(param)
    return copy


def moved_on(
    side: "Side", client: deltaserve.Client, remote: "Remote", params: "Params", model: str, **options: Any
) -> tuple[nn.Module, RemoteOptimizer]:
    """Moves a side's state onto the server; returns a network and an optimizer that continue from there."""
    state, groups = model_state_of(side.optimizer), len(side.optimizer.param_groups)
    definition: Any = DEFINITIONS[type(side.optimizer)]
    client.create_model(
        model,
        state.weights,
        groups=[definition(**options)] * groups,
        group_of={name: int(name.startswith("1.")) for name in state.weights},
    ).put_state(state)
    net = blank(side.net)
    return net, remote(params(net), model=model, through=client.target, **options)


def moved_off(
    side: "Side",
    state: deltaserve.ModelState,
    params: "Params",
    torch_class: Any = torch.optim.Adadelta,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Returns a network and an optimizer that continue in this process from a model's state."""
    net = blank(side.net)
    optimizer: torch.optim.Optimizer = torch_class(params(net), **options)
    optimizer.load_state_dict(state_dict_of(state, optimizer))
    names = reversed(list(model_state_of(optimizer).weights))
    with torch.no_grad():
        for name, param in zip(names, net.parameters(), strict=True):
            param.copy_(torch.from_numpy(state.weights[name]))
    return net, optimizer


@every_move
def test_a_run_moves_onto_a_server_and_continues(
    way: "tuple[Params, int]",
    options: dict[str, Any],
    make_pair: "Callable[..., Pair]",
    remote: "Remote",
    client: deltaserve.Client,
    model: str,
) -> None:
    params, steps = way
    pair = make_pair(params=params, **options)
    pair.local.train(steps)
    before = bits(model_state_of(pair.local.optimizer))
    pair.remote.net, pair.remote.optimizer = moved_on(pair.local, client, remote, params, model, **options)
    assert bits(client.model(model).pull_state()) == before
    pair.compare(rtol=0, atol=0)
    pair.train(20)
    assert client.model(model).info().version == 1 + 20


@every_move
def test_a_run_moves_off_a_server_and_continues(
    way: "tuple[Params, int]",
    options: dict[str, Any],
    kind: type[RemoteOptimizer],
    make_pair: "Callable[..., Pair]",
    remote: "Remote",
    client: deltaserve.Client,
    model: str,
) -> None:
    params, steps = way
    pair = make_pair(params=params, **options)
    pair.remote.optimizer = remote(params(pair.remote.net), model=model, **options)
    pair.remote.train(steps)
    state = client.model(model).pull_state()
    pair.local.net, pair.local.optimizer = moved_off(pair.remote, state, params, kind._torch_class, **options)
    counted = kind is not RemoteSGD  # torch.optim.SGD does not count
    assert bits(model_state_of(pair.local.optimizer), counted) == bits(state, counted)
    pair.compare(rtol=0, atol=0)
    pair.train(20)
    counts = {steps + 20} if counted else {int("momentum" in options)}
    assert set(model_state_of(pair.local.optimizer).update_counts.values()) == counts


def test_on_and_off_again_and_again(
    make_pair: "Callable[..., Pair]", plain_remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    """One side trains here throughout; the other moves after each of these numbers of steps."""
    params = NAMED["by name"]
    pair = make_pair(params=params)
    stays, moves = pair.local, deepcopy(pair.local)
    for number, steps in enumerate((3, 1, 11, 0, 6)):
        name = f"{model}-{number}"
        pair.remote.net, pair.remote.optimizer = moved_on(moves, client, plain_remote, params, name)
        pair.train(steps)
        moves.net, moves.optimizer = moved_off(pair.remote, client.model(name).pull_state(), params)
        for side in (moves, stays):
            side.train(steps)
    assert set(model_state_of(moves.optimizer).update_counts.values()) == {42}
    pair.remote.net, pair.remote.optimizer = moved_on(moves, client, plain_remote, params, f"{model}-last")
    pair.compare()


@pytest.mark.parametrize("way", WAYS, ids=NAMED)
def test_a_run_moves_between_servers_with_the_same_bits_throughout(
    way: "tuple[Params, int]",
    make_pair: "Callable[..., Pair]",
    remote: "Remote",
    client: deltaserve.Client,
    model: str,
    tmp_path: Path,
) -> None:
    """From here to a server, through a file to another server, and back here."""
    params, steps = way
    pair = make_pair(params=params)
    one, two = pair.local, pair.remote
    one.train(5)
    one.net, one.optimizer = moved_on(one, client, remote, params, model)
    one.train(steps)
    file = str(tmp_path / "state.safetensors")
    assert run(["export", model, "-o", file, "--target", client.target]) == 0
    with LocalServer() as server, deltaserve.connect(server.target, timeout_seconds=30) as there:
        assert run(["import", file, "--target", server.target]) == 0
        two.net = blank(one.net)
        with remote(params(two.net), model=model, through=server.target) as two.optimizer:
            for _ in range(5):
                ours, theirs = there.model(model).pull_state(), client.model(model).pull_state()
                assert bits(ours) == bits(theirs)
                pair.compare(rtol=0, atol=0)
                for side in (one, two):
                    side.train(2)
            assert set(ours.update_counts.values()) == {5 + steps + 8}
            state = there.model(model).pull_state()
            one.net, one.optimizer = moved_off(two, state, params)
            assert bits(model_state_of(one.optimizer)) == bits(state)
            pair.train(5)


def test_a_parameter_without_state_among_others_with(make_pair: "Callable[..., Pair]") -> None:
    def drop(side: "Side", step: int) -> None:
        next(iter(side.net.parameters())).grad = None

    local = make_pair().local
    local.train(3, drop)
    state = model_state_of(local.optimizer)
    assert state.update_counts == {"0.0": 0, "0.1": 3, "0.2": 3, "0.3": 3}
    assert state.slots is not None
    assert not state.slots["square_avg"]["0.0"].any()
    assert sorted(state_dict_of(state, local.optimizer)["state"]) == [1, 2, 3]


def test_state_dict_of_keeps_the_hyperparameters_of_the_optimizer() -> None:
    net = nn.Linear(2, 1)
    one, two = torch.optim.Adadelta(net.parameters()), torch.optim.Adadelta(net.parameters(), lr=0.3, rho=0.5)
    two.load_state_dict(state_dict_of(model_state_of(one), two))
    assert (two.param_groups[0]["lr"], two.param_groups[0]["rho"]) == (0.3, 0.5)


def test_names_and_order_are_those_of_remote_adadelta(
    make_pair: "Callable[..., Pair]", plain_remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    for number, params in enumerate(NAMED.values()):
        net = deepcopy(make_pair().local.net)
        plain_remote(params(net), model=f"{model}-{number}")
        expected = [spec.name for spec in client.model(f"{model}-{number}").tensors]
        assert list(model_state_of(torch.optim.Adadelta(params(net))).weights) == expected


def test_both_conversions_copy(make_pair: "Callable[..., Pair]") -> None:
    local = make_pair().local
    local.train(3)
    state = model_state_of(local.optimizer)
    before = bits(state)
    local.train(3)
    assert bits(state) == before
    local.optimizer.load_state_dict(state_dict_of(state, local.optimizer))
    local.train(3)
    assert bits(state) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_travel_as_float32_and_come_back_unchanged(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    optimizer = torch.optim.Adadelta([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = model_state_of(optimizer)
    assert state.slots is not None
    assert all(array.dtype == np.float32 for array in (state.weights["0.0"], state.slots["square_avg"]["0.0"]))
    entry = state_dict_of(state, optimizer)["state"][0]
    assert entry["square_avg"].dtype is entry["acc_delta"].dtype is dtype
    assert entry["step"].dtype is torch.float32


class Changed(torch.optim.AdamW):
    """A subclass, whose step may be another one."""


def test_an_optimizer_that_is_not_served_is_refused(plain_remote: "Remote", target: str) -> None:
    """The state of a RemoteAdadelta is on the server; the object itself has none."""
    weight = nn.Parameter(torch.zeros(2, 2))
    state = model_state_of(torch.optim.Adadelta([weight]))
    others = [torch.optim.Adamax([weight]), torch.optim.LBFGS([weight]), Changed([weight]), plain_remote([weight])]
    if hasattr(torch.optim, "Muon"):
        others.append(torch.optim.Muon([weight]))
    for optimizer in others:
        text = (
            f"{type(optimizer).__name__} is not served: expected an optimizer of torch.optim that is elementwise, "
            "exactly one of Adadelta, SGD, Adagrad, RMSprop, Adam, AdamW.* Muon and LBFGS are not elementwise"
        )
        with pytest.raises(TypeError, match=text):
            model_state_of(optimizer)
        with pytest.raises(TypeError, match=text):
            state_dict_of(state, optimizer)
        with pytest.raises(TypeError, match=text):
            RemoteOptimizer.of(optimizer, target, model="m")


def test_a_state_that_does_not_fit_the_parameters() -> None:
    optimizer = torch.optim.Adadelta([torch.ones(3)])
    ones = {"0.0": np.ones(3, np.float32)}
    slots = {"square_avg": ones, "acc_delta": ones}
    state = deltaserve.ModelState(version=1, weights=ones, slots=slots, update_counts={"0.0": 1})
    assert state_dict_of(state, optimizer)["state"][0]["step"].item() == 1
    for wrong, text in (
        (replace(state, slots=None), "slots: the state has none"),
        (replace(state, slots={}), "slots: expected acc_delta, square_avg, got nothing"),
        (replace(state, slots={"sum": ones}), "slots: expected acc_delta, square_avg, got sum"),
        (replace(state, slots=slots | {"acc_delta": {}}), "acc_delta: tensor 0.0 is missing"),
        (replace(state, update_counts={}), "update_counts: tensor 0.0 is missing"),
        (
            replace(state, slots=slots | {"acc_delta": {"0.0": np.ones(2, np.float32)}}),
            r"expected tensor 0.0 of shape \(3,\), got \(2,\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            state_dict_of(wrong, optimizer)


def test_two_parameters_of_one_name() -> None:
    optimizer = torch.optim.Adadelta([torch.ones(1)])
    optimizer.add_param_group({"params": [torch.ones(1)]})
    optimizer.param_groups[1]["param_names"] = ["0.0"]
    with pytest.raises(ValueError, match="two parameters are named"):
        model_state_of(optimizer)


# --- RemoteOptimizer.of


@every_move
def test_of_puts_an_optimizer_with_groups_and_state_onto_a_server(
    way: "tuple[Params, int]",
    options: dict[str, Any],
    kind: Any,
    make_pair: "Callable[..., Pair]",
    target: str,
    model: str,
) -> None:
    params, steps = way
    pair = make_pair(params=params, **options)
    one, two = pair.local, pair.remote
    two.optimizer = kind._torch_class(params(two.net), **options)
    for side in pair.sides:
        for index, group in enumerate(side.optimizer.param_groups):
            group.update(lr=0.01 * (index + 1), weight_decay=0.1)
    for side in pair.sides:
        side.train(steps)
    state = deepcopy(two.optimizer.state_dict())
    with RemoteOptimizer.of(two.optimizer, target, model=model, timeout_seconds=30) as remote:
        assert type(remote) is kind
        assert equal(remote.state_dict(), state)
        two.optimizer = remote
        pair.train(10)
        assert equal(one.optimizer.state_dict()["param_groups"], remote.state_dict()["param_groups"])
        remote._model.delete()


@every_kind
def test_of_joins_a_model_that_exists(kind: Any, plain_remote: "Remote", target: str, model: str) -> None:
    """Its weights and its state count, not those of the optimizer that is put there."""
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    ours.grad = theirs.grad = torch.ones(3)
    first = plain_remote([ours], model=model)
    first.step()
    local = kind._torch_class([theirs])
    for _ in range(5):
        local.step()
    with RemoteOptimizer.of(local, target, model=model, worker="second") as second:
        assert torch.equal(ours, theirs)
        assert (second.version, second.rank) == (1, 1)
        assert equal(second.state_dict(), first.state_dict())


def test_all_workers_of_a_round_may_call_of_at_once(target: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second joins after the model is created and before it has its state, and pushes before that, too."""

    def trained(steps: int) -> tuple[nn.Parameter, torch.optim.Adam]:
        param = nn.Parameter(torch.ones(3))
        local = torch.optim.Adam([param], lr=0.1)
        for _ in range(steps):
            param.grad = torch.ones(3)
            local.step()
        return param, local

    def train(worker: str) -> list[float]:
        param, local = trained(3)
        policy = deltaserve.Sync(min_workers=2)
        with RemoteOptimizer.of(local, target, model=model, worker=worker, policy=policy) as remote:
            for _ in range(2):
                param.grad = torch.ones(3)
                remote.step()
            assert remote.state_dict()["state"][0]["step"] == 5
        return param.tolist()

    really = deltaserve.Model.put_state

    def put_state(first: deltaserve.Model, state: deltaserve.ModelState) -> None:
        second.append(threads.submit(train, "second"))
        while not any(session.waiting for session in first.info().sessions):
            pass  # until the second worker's push waits for its round
        really(first, state)

    second: list[Future[list[float]]] = []
    monkeypatch.setattr(deltaserve.Model, "put_state", put_state)
    with ThreadPoolExecutor(1) as threads:
        assert train("first") == second[0].result() == pytest.approx(trained(5)[0].tolist(), rel=1e-6)


def test_of_puts_a_state_without_updates_that_is_not_the_initial_one(target: str, model: str) -> None:
    """Adagrad has a state before its first update, which may come from a checkpoint with another initial value."""
    other = torch.optim.Adagrad([nn.Parameter(torch.ones(3))], initial_accumulator_value=2.0)
    local = torch.optim.Adagrad([nn.Parameter(torch.ones(3))])
    local.load_state_dict(other.state_dict())
    with RemoteOptimizer.of(local, target, model=model) as remote:
        assert equal(remote.state_dict()["state"], local.state_dict()["state"])


def test_of_warns_of_a_scheduler_that_would_change_nothing(
    target: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    local = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1.0)
    for scheduled in (False, True):
        if scheduled:
            torch.optim.lr_scheduler.StepLR(local, 1)
        with RemoteOptimizer.of(local, target, model=model):
            pass
        assert ("a scheduler of the torch optimizer does not change the drop-in" in caplog.text) == scheduled


def test_of_takes_the_options_of_the_class(target: str, model: str) -> None:
    param = nn.Parameter(torch.ones(3))
    local = torch.optim.SGD([param], lr=1.0, momentum=0.5)
    options: Any = {"local_steps": 2, "local_optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5), "worker": "w"}
    with RemoteOptimizer.of(local, target, model=model, **options) as remote:
        for _ in range(2):
            param.grad = torch.ones(3)
            remote.step()
        assert (remote.version, param.tolist()) == (1, [0.0] * 3)
        remote._model.delete()
    with pytest.raises(ValueError, match="local_steps: expected 1"):
        RemoteOptimizer.of(local, target, model=model, local_steps=2)


def test_of_leaves_nothing_behind_if_the_state_does_not_fit(client: deltaserve.Client, model: str) -> None:
    param = nn.Parameter(torch.ones(3))
    local = torch.optim.SGD([param], momentum=0.5)
    param.grad = torch.ones(3)
    local.step()
    local.param_groups[0]["momentum"] = 0
    with pytest.raises(
        ValueError, match=r"the state of parameter 0\.0 does not fit the hyperparameters: expected nothing"
    ):
        RemoteOptimizer.of(local, client.target, model=model)
    local.param_groups[0]["momentum"] = 0.5
    local.state[param]["momentum_buffer"].fill_(torch.nan)
    with pytest.raises(deltaserve.RequestError, match=r"NaN or infinity in tensor 0\.0"):
        RemoteOptimizer.of(local, client.target, model=model)
    assert model not in [summary.name for summary in client.models()]
    assert param.tolist() != [1, 1, 1]


def test_the_decoupled_weight_decay_of_adam_is_adamw(target: str) -> None:
    local = torch.optim.Adam([torch.ones(1)], decoupled_weight_decay=True)
    with pytest.raises(ValueError, match="use RemoteAdamW instead"):
        RemoteOptimizer.of(local, target, model="m")


def test_a_mixture_of_structures_is_refused(target: str) -> None:
    """torch allows it."""
    groups: list[dict[str, Any]] = [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "amsgrad": True}]
    local = torch.optim.Adam(groups)
    for refused in (lambda: model_state_of(local), lambda: RemoteOptimizer.of(local, target, model="m")):
        with pytest.raises(ValueError, match="expected adam, got adam with amsgrad: all parameter groups"):
            refused()
