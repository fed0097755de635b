"""The drop-ins make the steps of the optimizers of torch.optim: weights, state and step counts agree."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Side

STEPS = 30

OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.1}, "rho": {"rho": 0.5}, "rho 0": {"rho": 0.0}, "rho 1": {"rho": 1.0},
    "eps": {"eps": 1e-3}, "weight decay": {"weight_decay": 0.1}, "maximize": {"maximize": True, "lr": 0.1},
    "maximize with weight decay": {"maximize": True, "weight_decay": 0.1, "lr": 0.1}, "lr 0": {"lr": 0.0},
    "all": {"lr": 0.5, "rho": 0.95, "eps": 1e-5, "weight_decay": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_torch(options: dict[str, Any], make_pair: "Callable[..., Pair]") -> None:
    make_pair(**options).train(STEPS)


def test_a_hundred_steps(make_pair: "Callable[..., Pair]") -> None:
    make_pair().train(100)


def test_groups_have_their_own_hyperparameters(make_pair: "Callable[..., Pair]") -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        weight_1, bias_1, weight_2, bias_2 = net.parameters()
        return [
            {"params": [weight_1], "lr": 0.1, "weight_decay": 0.1},
            {"params": [bias_1, bias_2], "rho": 0.5, "eps": 1e-4},
            {"params": weight_2, "maximize": True, "lr": 0.01},
        ]

    make_pair(params=groups, lr=0.7).train(STEPS)


def test_named_parameters(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(params=lambda net: net.named_parameters())
    pair.train(STEPS)
    assert pair.remote.optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_hyperparameters_that_change_between_steps(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()

    def change(side: "Side", step: int) -> None:
        side.optimizer.param_groups[0].update(
            lr=1.0 / (step + 1), rho=0.5 + step / 75, weight_decay=step / 300, maximize=step % 10 == 9
        )

    pair.train(STEPS, change)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_both_ways_to_zero_gradients(set_to_none: bool, make_pair: "Callable[..., Pair]") -> None:
    """With zeros, a parameter that has no part in the loss is updated; with None, it is left out."""
    pair = make_pair()
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


def test_a_step_does_not_change_the_gradients(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(weight_decay=0.1, maximize=True)
    pair.remote.backward(torch.ones(2, 4))
    before = [param.grad.clone() for param in pair.remote.net.parameters() if param.grad is not None]
    pair.remote.optimizer.step()
    for param, gradient in zip(pair.remote.net.parameters(), before, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, gradient)


def test_parameters_without_gradient_in_some_steps(make_pair: "Callable[..., Pair]") -> None:
    def drop(side: "Side", step: int) -> None:
        for index, param in enumerate(side.net.parameters()):
            if step % (index + 2) == 0:
                param.grad = None

    pair = make_pair(weight_decay=0.1)
    pair.train(STEPS, drop)
    assert pair.counts() == [15, 20, 22, 24]


def test_parameters_that_are_frozen_and_later_unfrozen(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(weight_decay=0.1)
    for frozen in (True, False, True, False):
        for side in pair.sides:
            for param in side.net[0].parameters():  # type: ignore[index]
                param.requires_grad_(not frozen)
        pair.train(8)
    assert pair.counts() == [16, 16, 32, 32]
