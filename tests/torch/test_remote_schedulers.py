"""Learning-rate schedulers act on RemoteAdadelta as on torch.optim.Adadelta, from the next step on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import deltaserve

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=7, gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=0.01),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=2.0, total_steps=60, cycle_momentum=False),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.97**epoch),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.95),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 20)], milestones=[5]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=10),
}


@pytest.mark.parametrize(
    "tensor_lr", [pytest.param(False, id="number"), pytest.param(True, id="tensor", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler(
    make: Callable[[torch.optim.Optimizer], Any], tensor_lr: bool, make_pair: "Callable[..., Pair]"
) -> None:
    pair = make_pair()
    if tensor_lr:  # a scheduler changes the tensor in place, so each side has its own
        for side in pair.sides:
            side.optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    schedulers = [make(side.optimizer) for side in pair.sides]
    for _ in range(25):
        for side, scheduler in zip(pair.sides, schedulers, strict=True):
            side.train(1)
            scheduler.step()
    pair.compare()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() != [1.0]


def test_reduce_on_plateau(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    schedulers = [lr_scheduler.ReduceLROnPlateau(side.optimizer, patience=2) for side in pair.sides]
    for _ in range(15):
        for side, scheduler in zip(pair.sides, schedulers, strict=True):
            side.train(1)
            scheduler.step(1.0)
    pair.compare()
    assert pair.remote.optimizer.param_groups[0]["lr"] < 1e-3


def test_a_push_carries_the_present_rate(remote: "Remote") -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = remote([param], lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for _ in range(4):
        param.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        assert optimizer.last_result is not None
        rates += [group.lr for group in optimizer.last_result.hyperparameters]
    assert rates == [1.0, 0.5, 0.25, 0.125]


def test_a_scheduler_does_not_change_the_rate_of_the_model(
    remote: "Remote", model: str, client: deltaserve.Client
) -> None:
    """So a worker that joins later with the rate that the first one started with is no mismatch."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = remote([param], model=model, lr=1.0)
    lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.param_groups[0]["lr"] = 0.1
    param.grad = torch.ones(3)
    optimizer.step()
    assert client.model(model).groups[0].lr == 1.0
    remote([torch.nn.Parameter(torch.zeros(3))], model=model, lr=1.0)
