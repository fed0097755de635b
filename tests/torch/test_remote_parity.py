"""The drop-ins make the steps of the optimizers of torch.optim: weights, state and step counts agree."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import every_kind, every_structure, every_structure_with
from torch import nn

from deltaserve.torch import (
    RemoteAdadelta,
    RemoteAdagrad,
    RemoteAdam,
    RemoteAdamW,
    RemoteOptimizer,
    RemoteRMSprop,
    RemoteSGD,
)

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Side

STEPS = 30

OWN: dict[type[RemoteOptimizer], list[dict[str, Any]]] = {
    RemoteAdadelta: [
        {"lr": 0.1}, {"lr": 0.0}, {"maximize": True, "lr": 0.1}, {"rho": 0.5}, {"rho": 0.0}, {"rho": 1.0},
        {"eps": 1e-3}, {"lr": 0.5, "rho": 0.95, "eps": 1e-5, "weight_decay": 0.01},
    ],
    RemoteSGD: [
        {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.5, "dampening": 1.0},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True}, {"momentum": 1.0}, {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "weight_decay": torch.tensor(0.01)},
    ],
    RemoteAdagrad: [
        {"lr": 0.1}, {"lr_decay": 0.5}, {"initial_accumulator_value": 0.5}, {"eps": 1e-3},
        {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-5},
    ],
    RemoteRMSprop: [
        {"lr": 0.001}, {"alpha": 0.5, "lr": 0.001}, {"alpha": 0.0}, {"alpha": 1.0, "eps": 1.0}, {"momentum": 0.9},
        {"centered": True, "eps": 1e-2}, {"centered": True, "momentum": 0.5, "eps": 1e-2, "weight_decay": 0.01},
    ],
    RemoteAdam: [
        {"lr": 0.01}, {"betas": (0.5, 0.9)}, {"betas": (0.0, 0.0)}, {"betas": (0.3, 0.9999)}, {"eps": 1e-3},
        {"amsgrad": True}, {"amsgrad": True, "lr": 0.01, "weight_decay": 0.1},
        {"betas": (torch.tensor(0.8), torch.tensor(0.95))},
    ],
    RemoteAdamW: [
        {"lr": 0.01}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.0}, {"weight_decay": 0.5, "lr": 0.01},
        {"amsgrad": True, "weight_decay": 0.1},
    ],
}  # fmt: skip
"""Arguments of each optimizer. Steps are small enough for a difference in rounding to stay small in 100 of them."""

SHARED: list[dict[str, Any]] = [
    {}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1, "lr": torch.tensor(0.01)},
]  # fmt: skip
"""Arguments of all optimizers."""

CASES = [
    # The fast tier has the defaults, and the cases that combine the most.
    pytest.param(kind, options, id=f"{kind.__name__}-{options}", marks=[] if is_fast else pytest.mark.deep)
    for kind, own in OWN.items()
    for options in SHARED + own
    for is_fast in [options in (SHARED[0], SHARED[-1], own[-1])]
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_hundred_steps_are_those_of_torch(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    make_pair(**options).train(100)


@every_structure
def test_groups_have_their_own_hyperparameters(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        weight_1, bias_1, weight_2, bias_2 = net.parameters()
        return [
            {"params": [weight_1], "lr": 0.003, "weight_decay": 0.1},
            {"params": [bias_1, bias_2], "rho": 0.5, "alpha": 0.5, "betas": [0, 0.9], "lr_decay": 0.5},
            {"params": weight_2, "maximize": True, "lr": 0.001, "eps": 1e-2},
        ]

    make_pair(params=groups, **{"lr": 0.002, **options}).train(STEPS)


@pytest.mark.parametrize("kind", [RemoteAdagrad])
def test_a_groups_own_initial_sum_is_ignored_as_in_torch(make_pair: "Callable[..., Pair]") -> None:
    """torch fills the sums of all groups, and of groups that are added, with the constructor's value."""

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        weight, bias = net[2].parameters()  # type: ignore[index]
        return [{"params": [weight], "initial_accumulator_value": 5.0}, {"params": [bias]}]

    pair = make_pair(params=groups, initial_accumulator_value=0.5)
    pair.train(5)
    for side in pair.sides:
        side.optimizer.add_param_group({"params": side.net[0].parameters(), "initial_accumulator_value": 7.0})  # type: ignore[index]
    pair.train(5)


def test_named_parameters(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(params=lambda net: net.named_parameters())
    pair.train(STEPS)
    assert pair.remote.optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@every_structure
def test_hyperparameters_that_change_between_steps(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(**options)

    def change(side: "Side", step: int) -> None:
        (group,) = side.optimizer.param_groups
        group.update(lr=0.1 / (step + 1), weight_decay=step / 300, maximize=step % 10 == 9)
        for name in {"rho", "alpha"} & group.keys():
            group[name] = 0.5 + step / 75
        if "betas" in group:
            group["betas"] = (0.5 + step / 75, 0.9 + step / 500)
        if group.get("momentum") and not group.get("nesterov"):
            group["momentum"] = 0.5 + step / 75

    pair.train(STEPS, change)


@every_structure_with("set_to_none", [True, False])
def test_both_ways_to_zero_gradients(
    set_to_none: bool, options: dict[str, Any], make_pair: "Callable[..., Pair]"
) -> None:
    """With zeros, a parameter that has no part in the loss is updated; with None, it is left out."""
    pair = make_pair(**options)
    for side in pair.sides:
        for step in range(STEPS):
            side.optimizer.zero_grad(set_to_none=set_to_none)
            part = side.net[0] if step % 3 == 1 else side.net  # type: ignore[index]
            part(torch.ones(2, 4)).sum().backward()
            side.optimizer.step()
    pair.compare()
    assert set(pair.counts()) == ({30, 20} if set_to_none else {30})


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    losses: dict[int, list[float]] = {}
    for index, side in enumerate(pair.sides):

        def closure(side: "Side" = side) -> float:
            assert torch.is_grad_enabled()
            side.optimizer.zero_grad()
            return side.backward(torch.ones(3, 4)).item()

        losses[index] = [side.optimizer.step(closure) for _ in range(20)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    pair.compare()


def test_a_closure_that_raises_makes_no_step(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()

    def closure() -> float:
        raise ArithmeticError("as planned")

    for side in pair.sides:
        with pytest.raises(ArithmeticError, match="as planned"):
            side.optimizer.step(closure)
    pair.train(5)


def test_gradient_clipping(make_pair: "Callable[..., Pair]") -> None:
    def clip(side: "Side", step: int) -> None:
        clip_by = torch.nn.utils.clip_grad_norm_ if step % 2 else torch.nn.utils.clip_grad_value_
        clip_by(side.net.parameters(), 0.01)

    make_pair().train(STEPS, clip)


def test_accumulated_gradients(make_pair: "Callable[..., Pair]") -> None:
    make_pair().train(STEPS, lambda side, step: [side.backward(torch.full((2, 4), float(k))) for k in range(3)])


def test_mixed_precision_without_a_scaler(make_pair: "Callable[..., Pair]") -> None:
    """Parameters stay float32; rounding to bfloat16 amplifies differences, hence the larger tolerance."""
    pair = make_pair()
    for side in pair.sides:
        for _ in range(20):
            side.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = side.net(torch.ones(2, 4)).pow(2).mean()
            loss.backward()
            side.optimizer.step()
    pair.compare(rtol=2e-2, atol=1e-3)


@every_kind
def test_a_step_does_not_change_the_gradients(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(weight_decay=0.1, maximize=True)
    pair.remote.backward(torch.ones(2, 4))
    before = [param.grad.clone() for param in pair.remote.net.parameters() if param.grad is not None]
    pair.remote.optimizer.step()
    for param, gradient in zip(pair.remote.net.parameters(), before, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, gradient)


@every_structure
def test_parameters_without_gradient_in_some_steps(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    """What depends on the number of updates depends on that of each parameter: Adam's corrections, first momentum."""

    def drop(side: "Side", step: int) -> None:
        for index, param in enumerate(side.net.parameters()):
            if step % (index + 2) == 0:
                param.grad = None

    pair = make_pair(weight_decay=0.1, **options)
    pair.train(STEPS, drop)
    assert pair.counts() == [15, 20, 22, 24]


@every_structure
def test_parameters_that_are_frozen_and_later_unfrozen(
    options: dict[str, Any], make_pair: "Callable[..., Pair]"
) -> None:
    pair = make_pair(weight_decay=0.1, **options)
    for frozen in (True, False, True, False):
        for side in pair.sides:
            for param in side.net[0].parameters():  # type: ignore[index]
                param.requires_grad_(not frozen)
        pair.train(8)
    assert pair.counts() == [16, 16, 32, 32]
