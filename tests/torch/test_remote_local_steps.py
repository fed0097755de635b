"""Local steps: the worker's own optimizer makes steps, and one push carries how far the weights have moved."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.torch.conftest import every_kind, every_structure_with, version_of
from torch import Tensor, nn

import deltaserve
from deltaserve import Async, Sync
from deltaserve.torch import RemoteSGD

if TYPE_CHECKING:
    from tests.torch.conftest import Remote

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def descend(optimizer: torch.optim.Optimizer, param: Tensor, goal: float = 0.0) -> None:
    optimizer.zero_grad()
    (param - goal).pow(2).sum().backward()
    optimizer.step()


@every_structure_with("dtype", [torch.float32, torch.float64])
def test_the_push_is_the_difference_that_the_local_steps_make(
    remote: "Remote", kind: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, theirs = parameter(1.0, -2.0, dtype=dtype), parameter(1.0, -2.0, dtype=dtype)
    options = options if kind is RemoteSGD else {"eps": 1e-3, **options}
    optimizer = remote([ours], local_steps=3, local_optimizer=SGD, **options)
    inner, outer = SGD([theirs]), kind._torch_class([theirs], **options)
    for _ in range(4):
        before = theirs.detach().clone()
        for step in range(3):
            descend(optimizer, ours)
            descend(inner, theirs)
            if step < 2:
                torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            theirs.grad = before - theirs
            theirs.copy_(before)
        outer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert version_of(optimizer) == 4


def test_the_weights_of_local_steps_weight_the_mean_of_a_round(remote: "Remote", model: str) -> None:
    params = parameter(0.0), parameter(0.0)
    options = {"eps": 1e-3, "local_steps": 2, "local_optimizer": functools.partial(torch.optim.SGD, lr=0.5)}
    optimizers = [remote([param], model=model, policy=Sync(min_workers=2), **options) for param in params]

    def train(index: int, gradient: float, weight: float) -> None:
        for _ in range(2):
            params[index].grad = torch.full((1,), gradient)
            optimizers[index].step(weight=weight)

    with ThreadPoolExecutor() as threads:
        list(threads.map(train, (0, 1), (1.0, 4.0), (3.0, 1.0)))
    a, b = (param.detach() for param in params)
    torch.testing.assert_close(a, b)
    theirs = parameter(0.0)
    theirs.grad = torch.tensor([(1.0 * 6 + 4.0 * 2) / 8])
    torch.optim.Adadelta([theirs], eps=1e-3).step()
    torch.testing.assert_close(a, theirs.detach())


@every_kind
def test_flush_pushes_the_rest_and_nothing_twice(remote: "Remote") -> None:
    param = parameter(1.0)
    optimizer = remote([param], local_steps=5, local_optimizer=SGD)
    versions = []
    for _ in range(2):
        optimizer.flush()
        versions.append(version_of(optimizer))
        descend(optimizer, param)
        optimizer.flush()
        optimizer.flush()
        versions.append(version_of(optimizer))
    assert versions == [None, 1, 1, 2]


def test_a_parameter_without_gradient_in_all_steps_has_none_in_the_push(remote: "Remote") -> None:
    used, unused = parameter(1.0), parameter(1.0)
    optimizer = remote([used, unused], local_steps=2, local_optimizer=SGD)
    for _ in range(2):
        descend(optimizer, used)
    assert list(optimizer.state_dict()["state"]) == [0]


def test_a_closure_goes_to_the_local_optimizer(remote: "Remote") -> None:
    param = parameter(5.0)
    optimizer = remote([param], local_steps=1, local_optimizer=lambda groups: torch.optim.LBFGS(groups[0]["params"]))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param - 3.0).pow(2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert optimizer.last_result
    assert optimizer.last_result.gradient_norm == pytest.approx(2.0, abs=1e-3), (
        "the local optimizer went all the way to 3"
    )


def test_the_local_optimizer_is_there_for_schedulers(remote: "Remote") -> None:
    param = parameter(1.0)
    optimizer = remote([param], local_steps=1, local_optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    assert optimizer.local_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.local_optimizer, step_size=1, gamma=0.5)
    norms = []
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()
        assert optimizer.last_result
        norms.append(optimizer.last_result.gradient_norm)
    assert norms == pytest.approx([1.0, 0.5, 0.25], rel=1e-5)


def test_steps_that_diverge_are_refused_and_undone(remote: "Remote") -> None:
    param = parameter(1.0)
    optimizer = remote([param], local_steps=2, local_optimizer=functools.partial(torch.optim.SGD, lr=1e30))
    descend(optimizer, param)
    with pytest.raises(deltaserve.RequestError, match=r"tensor 0\.0"):
        descend(optimizer, param)
    assert param.item() == 1.0
    assert optimizer.local_optimizer
    optimizer.local_optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        descend(optimizer, param)
    assert version_of(optimizer) == 1


def test_a_difference_whose_answer_was_lost_is_pushed_again_unchanged(
    remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    param = parameter(1.0)
    optimizer = remote([param], model=model, local_steps=1, local_optimizer=SGD, policy=Sync(min_workers=2))
    optimizer._client._connection.timeout_seconds = 0.2
    with pytest.raises(deltaserve.UnavailableError):
        descend(optimizer, param)
    optimizer._client._connection.timeout_seconds = 30
    with client.model(model).worker("other") as other, ThreadPoolExecutor() as threads:
        other.pull()
        pushed = threads.submit(other.step, {"0.0": np.zeros(1)})
        descend(optimizer, param)
        pushed.result()
    state = client.model(model).pull_state()
    assert state.version == 1
    assert param.item() == state.weights["0.0"].item()
    assert optimizer.last_result
    assert optimizer.last_result.contributors == 2


def test_a_group_that_is_added_starts_with_a_push(remote: "Remote") -> None:
    first, second = parameter(1.0), parameter(1.0)
    optimizer = remote([first], local_steps=2, local_optimizer=SGD)
    descend(optimizer, first)
    optimizer.add_param_group({"params": [second]})
    for _ in range(2):
        optimizer.zero_grad()
        (first + second).pow(2).sum().backward()
        optimizer.step()
    assert version_of(optimizer) == 2
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]


def test_options_that_exclude_each_other(remote: "Remote") -> None:
    with pytest.raises(ValueError, match="local_steps: expected 1, or more with a local_optimizer, got 4"):
        remote([parameter(1.0)], local_steps=4)
    with pytest.raises(ValueError, match="got 0"):
        remote([parameter(1.0)], local_steps=0, local_optimizer=SGD)
    with pytest.raises(ValueError, match="maximize: set it on the local optimizer"):
        remote([parameter(1.0)], maximize=True, local_optimizer=SGD)


def test_a_gradient_that_is_too_stale_is_skipped(remote: "Remote", model: str, warned: Callable[[], list[str]]) -> None:
    mine, others = parameter(1.0), parameter(1.0)
    a = remote([mine], model=model, worker="a", policy=Async(max_staleness=0))
    b = remote([others], model=model, worker="b", policy=Async(max_staleness=0))
    mine.grad, others.grad = torch.tensor([1.0]), torch.tensor([1.0])
    b.step()
    a.step()
    assert warned() == ["worker a: skipped a gradient: it is of version 0, which is too stale; now at 1"]
    assert version_of(a) is None
    assert mine.item() == others.item() != 1.0
    a.step()
    assert version_of(a) == 2
