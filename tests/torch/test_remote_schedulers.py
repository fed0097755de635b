"""Schedulers act on the drop-ins as on the optimizers of torch.optim, from the next step on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import every_kind
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import deltaserve
from deltaserve.torch import RemoteAdam, RemoteAdamW, RemoteOptimizer, RemoteRMSprop, RemoteSGD

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


CYCLES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.01, step_size_up=7, cycle_momentum=True),
}
MOMENTA: "list[tuple[type[RemoteOptimizer], dict[str, Any]]]" = [
    (RemoteSGD, {"momentum": 0.9}),
    (RemoteSGD, {"momentum": 0.9, "nesterov": True}),
    (RemoteRMSprop, {"momentum": 0.9}),
    (RemoteAdam, {}),
    (RemoteAdamW, {"amsgrad": True}),
]


@pytest.mark.parametrize("make", CYCLES.values(), ids=CYCLES)
@pytest.mark.parametrize(("kind", "options"), MOMENTA, ids=[f"{kind.__name__}-{options}" for kind, options in MOMENTA])
def test_a_scheduler_that_cycles_momentum_or_betas(
    make: Callable[[torch.optim.Optimizer], Any], options: dict[str, Any], make_pair: "Callable[..., Pair]"
) -> None:
    pair = make_pair(**options)
    schedulers = [make(side.optimizer) for side in pair.sides]
    seen = set()
    for _ in range(25):
        for side, scheduler in zip(pair.sides, schedulers, strict=True):
            side.train(1)
            scheduler.step()
        group = pair.remote.optimizer.param_groups[0]
        seen.add(group["betas"][0] if "betas" in group else group["momentum"])
    assert len(seen) > 5
    pair.compare()


@pytest.mark.parametrize("kind", [RemoteSGD])
def test_momentum_that_a_scheduler_introduces_is_refused(remote: "Remote") -> None:
    """torch would begin to use momentum; a model without it has no buffer."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = remote([param])
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    param.grad = torch.ones(3)
    with pytest.raises(deltaserve.Error, match="sgd with momentum"):
        optimizer.step()
    assert param.tolist() == [1, 1, 1]


@every_kind
def test_a_tensor_as_learning_rate(make_pair: "Callable[..., Pair]") -> None:
    """A scheduler changes it in place."""
    pair = make_pair()
    for side in pair.sides:
        side.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    schedulers = [lr_scheduler.ExponentialLR(side.optimizer, gamma=0.5) for side in pair.sides]
    for _ in range(5):
        for side, scheduler in zip(pair.sides, schedulers, strict=True):
            side.train(1)
            scheduler.step()
    pair.compare()
    assert pair.remote.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 / 32)


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
