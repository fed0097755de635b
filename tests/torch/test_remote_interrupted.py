"""A step that is interrupted while weights arrive: the next one restores every parameter of any type and layout."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.torch.conftest import every_kind
from torch import Tensor, nn

import deltaserve
from deltaserve._common.flat_vector import FlatVector
from deltaserve.torch import RemoteOptimizer
from deltaserve.torch._local_steps import LocalSteps

if TYPE_CHECKING:
    from tests.torch.conftest import Remote

SIZE = 700_000  # three chunks

KINDS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.zeros(SIZE),
    "float64": lambda: torch.zeros(SIZE, dtype=torch.float64),
    "not contiguous": lambda: torch.zeros(SIZE, 2)[:, 0],
}


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_next_step_skips_its_gradient_and_takes_whole_weights(
    make: Callable[[], Tensor],
    remote: "Remote",
    model: str,
    client: deltaserve.Client,
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
) -> None:
    param = nn.Parameter(make())
    optimizer = remote([param], model=model, transport="stream")
    param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(FlatVector, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    loss = (param * param).sum()
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    assert any("skipped a gradient" in warning for warning in warned())
    state = client.model(model).pull_state()
    assert state.version == 1
    np.testing.assert_array_equal(param.detach().numpy(), state.weights["0.0"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()
    assert optimizer.last_result is not None
    assert (optimizer.last_result.version, optimizer.last_result.staleness) == (2, 0)


@every_kind
@pytest.mark.parametrize(
    ("local", "interrupted"),
    [(False, (RemoteOptimizer, "_commit")), (True, (RemoteOptimizer, "_commit")), (True, (LocalSteps, "start"))],
    ids=["parameters not written", "local steps, parameters not written", "local steps, parameters written"],
)
def test_a_step_that_is_interrupted_with_the_answer_here_counts_once(
    local: bool,
    interrupted: tuple[type, str],
    remote: "Remote",
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
) -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    options: dict[str, Any] = {"local_optimizer": functools.partial(torch.optim.SGD, lr=0.1)} if local else {}
    optimizer = remote([param], **options)
    param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(*interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert optimizer.version == 1, "the gradient of outdated parameters is skipped"
    (warning,) = warned()
    assert "skipped a gradient" in warning
    assert param.abs().min() > 0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.last_result is not None
    assert (optimizer.last_result.version, optimizer.last_result.staleness) == (2, 0)
