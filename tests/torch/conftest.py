"""One model twice, trained by torch's Adadelta here and by RemoteAdadelta on a server, and compared."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaserve
from deltaserve.torch import RemoteAdadelta
from deltaserve_server import LocalServer

RTOL, ATOL = 1e-4, 1e-5
"""How far float32 may come apart in 100 steps: torch rounds in another order, differences grow from step to step."""

Remote = Callable[..., RemoteAdadelta]


class Side:
    """A model and its optimizer."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net = net
        self.optimizer = optimizer

    def backward(self, x: Tensor) -> Tensor:
        """Computes the gradients of a loss that depends on the parameters alone."""
        loss: Tensor = self.net(x).pow(2).mean()
        loss.backward()
        return loss

    def train(self, steps: int, before_step: Callable[["Side", int], object] = lambda side, step: None) -> None:
        """Makes steps, each on its own batch; `before_step` is called when the gradients are there."""
        for step in range(steps):
            self.optimizer.zero_grad()
            self.backward(batch(step))
            before_step(self, step)
            self.optimizer.step()


class Pair:
    """The same model on both sides.

    Args:
        make: Makes the model, with the same weights each time.
        remote: Makes the server's side.
        params: What of the model the optimizer is given.
        options: Of both optimizers.
    """

    def __init__(
        self,
        remote: Remote,
        make: Callable[[], nn.Module],
        params: Callable[[nn.Module], Any] = lambda net: net.parameters(),
        **options: Any,
    ) -> None:
        ours, theirs = make(), make()
        self.remote = Side(ours, remote(params(ours), **options))
        self.local = Side(theirs, torch.optim.Adadelta(params(theirs), **options))
        self.sides = (self.remote, self.local)

    def train(self, steps: int, before_step: Callable[[Side, int], object] = lambda side, step: None) -> None:
        """Makes the same steps on both sides, and compares."""
        for side in self.sides:
            side.train(steps, before_step)
        self.compare()

    def compare(self, rtol: float = RTOL, atol: float = ATOL) -> None:
        """Compares the weights, the state, and how many updates each parameter has had."""
        for ours, theirs in zip(self.remote.net.parameters(), self.local.net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
        compare_state(self.remote.optimizer.state_dict(), self.local.optimizer.state_dict(), rtol, atol)


def compare_state(ours: dict[str, Any], theirs: dict[str, Any], rtol: float = RTOL, atol: float = ATOL) -> None:
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys(), "a parameter without gradient has no state"
    for key, mine in ours["state"].items():
        other = theirs["state"][key]
        assert mine.keys() == other.keys()
        assert mine["step"].dtype == other["step"].dtype
        assert mine["step"].item() == other["step"].item()
        for name in ("square_avg", "acc_delta"):
            torch.testing.assert_close(mine[name], other[name], rtol=10 * rtol, atol=atol)


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1000 + step))


def network() -> nn.Module:
    """Returns a small network with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    """One server for all tests of this folder: every optimizer has a model of its own."""
    with LocalServer() as server:
        yield server.target


@pytest.fixture
def remote(target: str) -> Iterator[Remote]:
    """Makes RemoteAdadelta, by default of a model of its own; after the test it is closed and its model deleted."""
    with ExitStack() as stack:
        client = stack.enter_context(deltaserve.connect(target, timeout_seconds=30))

        def delete(name: str) -> None:
            with suppress(deltaserve.RequestError):  # shared by two optimizers, or never made
                client.delete_model(name)

        def make(params: Any, *, model: str | None = None, **options: Any) -> RemoteAdadelta:
            name = model or f"model-{secrets.token_hex(8)}"
            stack.callback(delete, name)
            options = {"timeout_seconds": 30, **options}
            return stack.enter_context(RemoteAdadelta(params, target, model=name, **options))

        yield make


@pytest.fixture
def make_pair(remote: Remote) -> Callable[..., Pair]:
    def make(make: Callable[[], nn.Module] = network, **arguments: Any) -> Pair:
        return Pair(remote, make, **arguments)

    return make
