"""Local steps: an optimizer of the worker's own, and the difference of the weights as one push."""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltaserve
from deltaserve import Async, Sync
from deltaserve.torch import RemoteAdadelta

if TYPE_CHECKING:
    from tests.torch.conftest import Remote

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def descend(optimizer: torch.optim.Optimizer, param: Tensor, goal: float = 0.0) -> None:
    optimizer.zero_grad()
    (param - goal).pow(2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_push_is_the_difference_that_the_local_steps_make(remote: "Remote", dtype: torch.dtype) -> None:
    ours, theirs = parameter(1.0, -2.0, dtype=dtype), parameter(1.0, -2.0, dtype=dtype)
    optimizer = remote([ours], eps=1e-3, local_steps=3, local_optimizer=SGD)
    inner, outer = SGD([theirs]), torch.optim.Adadelta([theirs], eps=1e-3)
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
    assert optimizer.last_result
    assert optimizer.last_result.version == 4


def test_workers_differences_are_averaged_by_the_weight_of_their_steps(target: str) -> None:
    def train(name: str, goal: float, weight: float) -> Tensor:
        param = parameter(0.0)
        make = functools.partial(torch.optim.SGD, lr=0.5)
        optimizer = RemoteAdadelta(
            [param], target, model="weighted", eps=1e-3, worker=name, local_steps=2, local_optimizer=make,
            policy=Sync(min_workers=2),
        )  # fmt: skip
        with optimizer:
            for _ in range(2):
                optimizer.zero_grad()
                (param - goal).sum().backward()
                param.grad = torch.full_like(param, goal)
                optimizer.step(weight=weight)
        return param.detach()

    with ThreadPoolExecutor() as threads:
        a, b = threads.map(train, ("a", "b"), (1.0, 4.0), (3.0, 1.0))
    torch.testing.assert_close(a, b)
    theirs = parameter(0.0)
    theirs.grad = torch.tensor([(1.0 * 6 + 4.0 * 2) / 8])
    torch.optim.Adadelta([theirs], eps=1e-3).step()
    torch.testing.assert_close(a, theirs.detach())


def test_flush_pushes_what_is_left_and_nothing_twice(remote: "Remote") -> None:
    param = parameter(1.0)
    optimizer = remote([param], local_steps=5, local_optimizer=SGD)
    results = []
    for _ in range(2):
        optimizer.flush()
        results.append(optimizer.last_result)
        descend(optimizer, param)
        optimizer.flush()
        optimizer.flush()
        results.append(optimizer.last_result)
    assert [result and result.version for result in results] == [None, 1, 1, 2]


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
    assert optimizer.last_result.gradient_norm == pytest.approx(2.0, abs=1e-3), "it went all the way to 3"


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


def test_steps_that_lead_nowhere_are_refused_and_taken_back(remote: "Remote") -> None:
    param = parameter(1.0)
    optimizer = remote([param], local_steps=2, local_optimizer=functools.partial(torch.optim.SGD, lr=1e30))
    descend(optimizer, param)
    with pytest.raises(deltaserve.RequestError, match=r"too large|NaN or infinity"):
        descend(optimizer, param)
    assert param.item() == 1.0
    assert optimizer.local_optimizer
    optimizer.local_optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        descend(optimizer, param)
    assert optimizer.last_result
    assert optimizer.last_result.version == 1


def test_a_difference_whose_answer_was_lost_is_pushed_again_as_it_was(remote: "Remote", target: str) -> None:
    param = parameter(1.0)
    optimizer = remote([param], model="two", local_steps=1, local_optimizer=SGD, policy=Sync(min_workers=2))
    optimizer._client._connection.timeout_seconds = 1.0
    with pytest.raises(deltaserve.UnavailableError, match="did not answer"):
        descend(optimizer, param)
    optimizer._client._connection.timeout_seconds = 30
    with deltaserve.connect(target) as client, ThreadPoolExecutor() as threads:
        with client.model("two").worker("other") as other:
            other.pull()
            pushed = threads.submit(other.step, {"0.0": np.zeros(1)})
            descend(optimizer, param)
            pushed.result()
        held = client.model("two").pull_state()
    assert held.version == 1
    assert param.item() == held.weights["0.0"].item()
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
    assert optimizer.last_result
    assert optimizer.last_result.version == 2
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]


def test_what_does_not_go_together_is_said(remote: "Remote") -> None:
    with pytest.raises(ValueError, match="local_steps: expected 1, or more with a local_optimizer, got 4"):
        remote([parameter(1.0)], local_steps=4)
    with pytest.raises(ValueError, match="got 0"):
        remote([parameter(1.0)], local_steps=0, local_optimizer=SGD)
    with pytest.raises(ValueError, match="maximize belongs to the local optimizer"):
        remote([parameter(1.0)], maximize=True, local_optimizer=SGD)


def test_a_gradient_that_is_too_old_is_left_out(remote: "Remote", caplog: pytest.LogCaptureFixture) -> None:
    mine, others = parameter(1.0), parameter(1.0)
    a = remote([mine], model="fresh", worker="a", policy=Async(max_staleness=0))
    b = remote([others], model="fresh", worker="b", policy=Async(max_staleness=0))
    mine.grad, others.grad = torch.tensor([1.0]), torch.tensor([1.0])
    b.step()
    with caplog.at_level(logging.WARNING, "deltaserve"):
        a.step()
    assert "worker a: a gradient is left out: of version 0, which is too old: version 1 is here now" in caplog.text
    results = [a.last_result]
    assert mine.item() == others.item() != 1.0
    a.step()
    results.append(a.last_result)
    assert [result and result.version for result in results] == [None, 2]
