"""A step that breaks off while weights come: the next one puts every parameter right, whatever its type and layout."""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltaserve
from deltaserve._common.flat_vector import FlatVector
from deltaserve.torch import RemoteAdadelta
from deltaserve.torch._local import LocalSteps

if TYPE_CHECKING:
    from tests.torch.conftest import Remote

SIZE = 700_000  # three chunks

KINDS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.zeros(SIZE),
    "float64": lambda: torch.zeros(SIZE, dtype=torch.float64),
    "not contiguous": lambda: torch.zeros(SIZE, 2)[:, 0],
}


def interrupted(self: FlatVector, *arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_next_step_leaves_its_gradient_out_and_mends(
    make: Callable[[], Tensor],
    remote: "Remote",
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    param = nn.Parameter(make())
    optimizer = remote([param], model="broken", transport="stream")
    param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(FlatVector, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    loss = (param * param).sum()
    param.grad = torch.full_like(param, 2.0)
    with caplog.at_level(logging.WARNING, "deltaserve"):
        optimizer.step()
    assert "a gradient is left out" in caplog.text
    assert "arrived in part only" in caplog.text
    with deltaserve.connect(target) as client:
        held = client.model("broken").pull_state()
    assert held.version == 1
    np.testing.assert_array_equal(param.detach().numpy(), held.weights["0.0"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()
    assert optimizer.last_result is not None
    assert (optimizer.last_result.version, optimizer.last_result.staleness) == (2, 0)


@pytest.mark.parametrize(
    ("local", "written_first"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "local steps", "local steps, parameters written"],
)
def test_a_step_that_breaks_off_with_the_answer_here_counts_once(
    local: bool,
    written_first: bool,
    remote: "Remote",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    options: dict[str, Any] = {"local_optimizer": functools.partial(torch.optim.SGD, lr=0.1)} if local else {}
    optimizer = remote([param], **options)
    written = RemoteAdadelta._written

    def interrupted(self: RemoteAdadelta, out: Any) -> None:
        if written_first:
            monkeypatch.setattr(LocalSteps, "begin", stop)
            written(self, out)
        raise KeyboardInterrupt

    def stop(self: LocalSteps) -> None:
        raise KeyboardInterrupt

    param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteAdadelta, "_written", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING, "deltaserve"):
        optimizer.step()
    assert optimizer.version == 1, "the gradient of parameters that are behind is left out"
    assert "a gradient is left out" in caplog.text
    assert param.abs().min() > 0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.last_result is not None
    assert (optimizer.last_result.version, optimizer.last_result.staleness) == (2, 0)
