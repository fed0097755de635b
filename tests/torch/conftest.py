"""One model twice, trained by torch's Adadelta here and by RemoteAdadelta on a server, and compared."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from threading import Event
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaserve
from deltaserve._common import flat_vector
from deltaserve._transport import choice
from deltaserve.torch import RemoteAdadelta
from deltaserve.torch._overlap import Overlap
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
def plain_remote(target: str) -> Iterator[Remote]:
    """Makes RemoteAdadelta, by default of a model of its own; after the test it is closed and its model deleted."""
    with ExitStack() as stack:
        client = stack.enter_context(deltaserve.connect(target, timeout_seconds=30))

        def delete(name: str) -> None:
            with suppress(deltaserve.RequestError):  # shared by two optimizers, or never made
                client.delete_model(name)

        def make(params: Any, *, model: str | None = None, line: str = target, **options: Any) -> RemoteAdadelta:
            name = model or f"model-{secrets.token_hex(8)}"
            stack.callback(delete, name)
            options = {"timeout_seconds": 30, **options}
            return stack.enter_context(RemoteAdadelta(params, line, model=name, **options))

        yield make


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def remote(plain_remote: Remote, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """As `plain_remote`; every test that uses it is made without `overlap` and with it."""
    if not request.param:
        return plain_remote
    stream_all(monkeypatch, chunk=1024)

    def make(params: Any, **options: Any) -> RemoteAdadelta:
        return plain_remote(params, **{"overlap": "local_optimizer" not in options, "transport": "stream", **options})

    return make


@pytest.fixture
def make_pair(remote: Remote) -> Callable[..., Pair]:
    def make(make: Callable[[], nn.Module] = network, **arguments: Any) -> Pair:
        return Pair(remote, make, **arguments)

    return make


# --- overlap


def stream_all(monkeypatch: pytest.MonkeyPatch, chunk: int = 32) -> None:
    """Lets models of any size travel as a stream, in chunks of so many elements."""
    monkeypatch.setattr(choice, "_UNARY_BYTES", 0)
    monkeypatch.setattr(flat_vector, "CHUNK_ELEMENTS", chunk)


class _Pause(torch.autograd.Function):
    """The identity, which calls a function in its backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, call: Callable[[], object]) -> Tensor:
        context.call = call
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        context.call()
        return gradients[0], None


class Deep(nn.Module):
    """A network with the same weights each time.

    Attributes:
        half_way: Called by backward when it has made the gradients of `above`, and not yet those of `below`.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.below = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.above = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.half_way: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.above(_Pause.apply(self.below(x), self.half_way))  # type: ignore[no-untyped-call]
        return result


Body = Callable[[Any, RemoteAdadelta, int], object]


def plain_step(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
    optimizer.zero_grad()
    net(batch(step)).pow(2).mean().backward()
    optimizer.step()


class Twins:
    """A network twice, each with an optimizer on the server: the first overlaps, the second does not.

    Attributes:
        nets: The networks.
        optimizers: Theirs.
        fates: What became of the first's pushes: "taken", "not begun", or what was wrong with it.
    """

    def __init__(self, remote: Remote, make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
        self.nets: tuple[Any, Any] = (make(), make())
        self.optimizers = [
            remote(net.parameters(), overlap=overlap, transport="stream", **options)
            for net, overlap in zip(self.nets, (True, False), strict=True)
        ]
        self.fates: list[str] = []

    def train(self, steps: int, body: Body = plain_step) -> None:
        """Makes steps with either; they are the same, bit for bit."""
        for step in range(steps):
            for net, optimizer in zip(self.nets, self.optimizers, strict=True):
                push = optimizer._overlap.push if optimizer._overlap else None
                body(net, optimizer, step)
                if push:
                    self.fates.append("taken" if push.taken else push.difference or "not begun")
            self.compare()

    def compare(self) -> None:
        """Compares the weights and the state, bit for bit."""
        ours, theirs = (optimizer._model.pull_state() for optimizer in self.optimizers)
        assert ours.version == theirs.version
        assert ours.update_counts == theirs.update_counts
        for mine, other in ((ours.weights, theirs.weights), (ours.square_avg, theirs.square_avg)):
            assert mine is not None
            assert other is not None
            assert all(mine[name].tobytes() == other[name].tobytes() for name in mine)
        for one, two in zip(self.nets[0].parameters(), self.nets[1].parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.fixture
def make_twins(plain_remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Twins]:
    """Makes twins, whose gradients travel in many chunks.

    Their backward passes are over before a push can have begun; `step` waits until it has.
    """
    stream_all(monkeypatch)
    end = Overlap.end

    def end_later(self: Overlap, gradients: Any, weight: float) -> Any:
        begun = Event()
        self._jobs.put(begun.set)
        assert self._closed or begun.wait(10)
        return end(self, gradients, weight)

    monkeypatch.setattr(Overlap, "end", end_later)

    def make(make: Callable[[], nn.Module] = Deep, **options: Any) -> Twins:
        return Twins(plain_remote, make, options)

    return make


Eventually = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def eventually() -> Eventually:
    """Waits until a condition is met; returns what it gave."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = monotonic() + 10.0
        while not (met := condition()):
            assert monotonic() < deadline, "it did not happen within 10 s"
            sleep(0.005)
        return met

    return wait
