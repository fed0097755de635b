"""Learning-rate schedulers act on RemoteAdadelta as on torch.optim.Adadelta, from the next step on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import deltaserve
from deltaserve.torch import RemoteAdadelta

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


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler(
    make: Callable[[torch.optim.Optimizer], Any], lr: "float | torch.Tensor", make_pair: "Callable[..., Pair]"
) -> None:
    number = float(lr)
    pair = make_pair(lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
    if isinstance(lr, torch.Tensor):  # a scheduler changes it in place: each side has its own
        pair.local.optimizer.param_groups[0]["lr"] = torch.tensor(number)
    schedulers = [make(side.optimizer) for side in pair.sides]
    for _ in range(50):
        for side, scheduler in zip(pair.sides, schedulers, strict=True):
            side.train(1)
            scheduler.step()
    pair.compare()
    optimizer = pair.remote.optimizer
    assert isinstance(optimizer, RemoteAdadelta)
    assert optimizer.last_result is not None
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() != [number]


def test_reduce_on_plateau(make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair()
    schedulers = [lr_scheduler.ReduceLROnPlateau(side.optimizer, patience=2) for side in pair.sides]
    for _ in range(20):
        for side, scheduler in zip(pair.sides, schedulers, strict=True):
            side.train(1)
            scheduler.step(1.0)
    pair.compare()
    assert pair.remote.optimizer.param_groups[0]["lr"] < 1e-3


def test_the_server_uses_the_rate_of_the_moment(remote: "Remote") -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = remote([param], lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    seen = []
    for _ in range(4):
        param.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        assert optimizer.last_result is not None
        seen += [group.lr for group in optimizer.last_result.hyperparameters]
    assert seen == [1.0, 0.5, 0.25, 0.125]


def test_a_scheduler_leaves_the_models_own_rate_alone(remote: "Remote", target: str) -> None:
    """So that a worker that comes later, with the rate that the first began with, is no mismatch."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = remote([param], model="shared", lr=1.0)
    lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.param_groups[0]["lr"] = 0.1
    param.grad = torch.ones(3)
    optimizer.step()
    with deltaserve.connect(target) as client:
        assert client.model("shared").groups[0].lr == 1.0
    remote([torch.nn.Parameter(torch.zeros(3))], model="shared", lr=1.0)
