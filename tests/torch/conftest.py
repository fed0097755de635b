"""Fixtures that train the same model twice and compare: with a torch optimizer, with its drop-in, with overlap."""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
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
from deltaserve.torch import (
    RemoteAdadelta,
    RemoteAdagrad,
    RemoteAdam,
    RemoteAdamW,
    RemoteOptimizer,
    RemoteRMSprop,
    RemoteSGD,
)
from deltaserve.torch._overlap import Overlap
from deltaserve_server import LocalServer

RTOL, ATOL = 1e-4, 1e-5
"""How far float32 results may drift apart in 100 steps: torch rounds in another order, and differences grow."""

KINDS: list[type[RemoteOptimizer]] = [
    RemoteAdadelta,
    RemoteSGD,
    RemoteAdagrad,
    RemoteRMSprop,
    RemoteAdam,
    RemoteAdamW,
]
"""The drop-ins, the default first."""

STRUCTURES: list[tuple[type[RemoteOptimizer], dict[str, Any]]] = [
    (RemoteAdadelta, {}),
    (RemoteSGD, {}),
    (RemoteSGD, {"momentum": 0.9, "dampening": 0.5}),
    (RemoteSGD, {"momentum": 0.9, "nesterov": True}),
    (RemoteAdagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    (RemoteRMSprop, {}),
    (RemoteRMSprop, {"momentum": 0.9, "centered": True, "eps": 1e-3}),
    (RemoteAdam, {}),
    (RemoteAdamW, {"amsgrad": True}),
]
"""The drop-ins with options that decide which state exists, or what it begins with."""

every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
"""Runs a test with every drop-in; the fixtures `remote` and `make_pair` make that."""

every_structure = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(
            kind,
            options,
            # The fast tier has one of each kind of state; those without options say nothing that these do not.
            marks=[] if options or kind is RemoteAdadelta else pytest.mark.deep,
            id="-".join([kind.__name__, *map(str, options)]),
        )
        for kind, options in STRUCTURES
    ],
)


def every_structure_with(name: str, values: Sequence[Any]) -> pytest.MarkDecorator:
    """Runs a test with every structure and every value of another parameter.

    In the fast tier each structure gets one of the values, by turns.
    """
    combinations = [
        pytest.param(
            kind,
            options,
            value,
            marks=[pytest.mark.deep] if (row + column) % len(values) else [],
            id=f"{kind.__name__}-{options}-{column}",
        )
        for row, (kind, options) in enumerate(STRUCTURES)
        for column, value in enumerate(values)
    ]
    return pytest.mark.parametrize(("kind", "options", name), combinations)


Remote = Callable[..., RemoteOptimizer]
Eventually = Callable[[Callable[[], Any]], Any]


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
        """Makes steps, each on its own batch; calls `before_step` when the gradients are there."""
        for step in range(steps):
            self.optimizer.zero_grad()
            self.backward(batch(step))
            before_step(self, step)
            self.optimizer.step()


class Pair:
    """The same model on a server and in this process.

    Args:
        remote: Makes the optimizer of the server's side.
        local: Makes the other one.
        make: Makes the model, with the same weights each time.
        params: Selects what of the model the optimizer is given.
        options: Arguments of both optimizers.
    """

    def __init__(
        self,
        remote: Remote,
        local: Callable[..., torch.optim.Optimizer],
        make: Callable[[], nn.Module],
        params: Callable[[nn.Module], Any] = lambda net: net.parameters(),
        **options: Any,
    ) -> None:
        ours, theirs = make(), make()
        self.remote = Side(ours, remote(params(ours), **options))
        self.local = Side(theirs, local(params(theirs), **options))
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
        one, two = (side.optimizer.state_dict() for side in self.sides)
        assert one["param_groups"] == two["param_groups"]
        assert one["state"].keys() == two["state"].keys(), "a parameter without gradient has no state"
        for key, mine in one["state"].items():
            other = two["state"][key]
            assert mine.keys() == other.keys()
            for name, value in mine.items():
                exact = name == "step"
                torch.testing.assert_close(
                    value, other[name], rtol=0 if exact else 10 * rtol, atol=0 if exact else atol
                )

    def counts(self) -> list[int]:
        """Returns how many updates each parameter has had on the server, in the order of the parameters."""
        assert isinstance(self.remote.optimizer, RemoteOptimizer)
        counts = self.remote.optimizer._model.pull_state().update_counts
        return [counts[name] for name in self.remote.optimizer._params()]


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1000 + step))


def network() -> nn.Module:
    """Returns a small network with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def equal(one: Any, two: Any) -> bool:
    """Whether two values are equal, bit for bit, also inside dicts and lists."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and bool(one == two)


def version_of(optimizer: RemoteOptimizer) -> int | None:
    """Returns the version that the last push made; None if there was no such push."""
    return optimizer.last_result.version if optimizer.last_result else None


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    """One server for all tests of this folder; every optimizer has a model of its own."""
    with LocalServer() as server:
        yield server.target


@pytest.fixture(scope="session")
def client(target: str) -> Iterator[deltaserve.Client]:
    with deltaserve.connect(target, timeout_seconds=30) as connected:
        yield connected


@pytest.fixture
def model() -> str:
    """A name that no other model has."""
    return f"model-{secrets.token_hex(8)}"


@pytest.fixture
def kind() -> type[RemoteOptimizer]:
    """The drop-in that `remote` makes."""
    return RemoteAdadelta


@pytest.fixture
def plain_remote(client: deltaserve.Client, kind: type[RemoteOptimizer]) -> Iterator[Remote]:
    """Makes a drop-in, by default with a model of its own; closes it and deletes its model after the test."""
    with ExitStack() as stack:

        def delete(name: str) -> None:
            with suppress(deltaserve.RequestError):  # two optimizers shared it, or it was never created
                client.delete_model(name)

        def make(
            params: Any, *, model: str | None = None, through: str = client.target, **options: Any
        ) -> RemoteOptimizer:
            name = model or f"model-{secrets.token_hex(8)}"
            stack.callback(delete, name)
            options = {"timeout_seconds": 30, **options}
            make_optimizer: Any = kind  # each kind has arguments of its own
            optimizer: RemoteOptimizer = make_optimizer(params, through, model=name, **options)
            return stack.enter_context(optimizer)

        yield make


@pytest.fixture(params=[pytest.param(False, id="plain"), pytest.param(True, id="overlap", marks=pytest.mark.deep)])
def remote(plain_remote: Remote, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Like `plain_remote`; the deep tier runs every test that uses it with `overlap` as well."""
    if not request.param:
        return plain_remote
    stream_all(monkeypatch, chunk=1024)

    def make(params: Any, **options: Any) -> RemoteOptimizer:
        return plain_remote(params, **{"overlap": "local_optimizer" not in options, "transport": "stream", **options})

    return make


@pytest.fixture
def make_pair(remote: Remote, kind: type[RemoteOptimizer]) -> Callable[..., Pair]:
    def make(make: Callable[[], nn.Module] = network, **arguments: Any) -> Pair:
        return Pair(remote, kind._torch_class, make, **arguments)

    return make


# --- overlap


CHUNK = 64
"""The elements of a chunk: twins have 507 parameters, and backward computes the gradients of 467 before `half_way`."""


def stream_all(monkeypatch: pytest.MonkeyPatch, chunk: int = CHUNK) -> None:
    """Makes models of any size travel as a stream, in chunks of `chunk` elements."""
    monkeypatch.setattr(choice, "_UNARY_BYTES", 0)
    monkeypatch.setattr(flat_vector, "CHUNK_ELEMENTS", chunk)


class _Call(torch.autograd.Function):
    """The identity; its backward pass calls a function."""

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
        half_way: A function that backward calls between the gradients of `above` and those of `below`.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.below = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.above = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.half_way: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.above(_Call.apply(self.below(x), self.half_way))  # type: ignore[no-untyped-call]
        return result


Body = Callable[[Any, RemoteOptimizer, int], object]
"""The body of a training loop; given the network, the optimizer and the number of the step."""


def plain_step(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    optimizer.zero_grad()
    net(batch(step)).pow(2).mean().backward()
    optimizer.step()


class Twins:
    """Two copies of a network, each with an optimizer on the server: the first with overlap, the second without.

    Attributes:
        nets: The networks.
        optimizers: Their optimizers.
        fates: What became of each push of the first: "taken", "discarded" or "not begun".
    """

    def __init__(self, remote: Remote, make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
        self.nets: tuple[Any, Any] = (make(), make())
        self.optimizers = [
            remote(net.parameters(), overlap=overlap, transport="stream", **options)
            for net, overlap in zip(self.nets, (True, False), strict=True)
        ]
        self.fates: list[str] = []

    def train(self, steps: int, body: Body = plain_step) -> None:
        """Makes steps with both, and compares them bit for bit: weights after each step, the state at the end."""
        for step in range(steps):
            for net, optimizer in zip(self.nets, self.optimizers, strict=True):
                push = optimizer._overlap.push if optimizer._overlap else None
                body(net, optimizer, step)
                if push:
                    self.fates.append("taken" if push.taken else "discarded" if push.difference else "not begun")
            assert all(map(torch.equal, self.nets[0].parameters(), self.nets[1].parameters()))
        ours, theirs = (optimizer._model.pull_state() for optimizer in self.optimizers)
        assert (ours.version, ours.update_counts) == (theirs.version, theirs.update_counts)
        assert ours.slots is not None
        assert theirs.slots is not None
        for mine, other in (
            (ours.weights, theirs.weights),
            *zip(ours.slots.values(), theirs.slots.values(), strict=True),
        ):
            assert all(mine[name].tobytes() == other[name].tobytes() for name in mine)


def drain(overlap: Overlap) -> None:
    """Waits until the background thread has handled everything that backward has handed to it."""
    done = Event()
    overlap._jobs.put(done.set)
    assert overlap._closed or done.wait(10)


@pytest.fixture
def make_twins(plain_remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Twins]:
    """Makes twins whose gradients travel in many chunks.

    Their backward passes are shorter than it takes to begin a push, so `step` waits until the push has begun.
    """
    stream_all(monkeypatch)
    end = Overlap.end

    def end_later(self: Overlap, gradients: Any, weight: float) -> Any:
        drain(self)
        return end(self, gradients, weight)

    monkeypatch.setattr(Overlap, "end", end_later)

    def make(make: Callable[[], nn.Module] = Deep, **options: Any) -> Twins:
        return Twins(plain_remote, make, options)

    return make


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Returns the client's warnings so far; the server, in this same process, may log warnings of its own."""
    with caplog.at_level(logging.WARNING, "deltaserve"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "deltaserve"]


@pytest.fixture
def eventually() -> Eventually:
    """Waits until a condition is true; returns its value."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = monotonic() + 10.0
        while not (value := condition()):
            assert monotonic() < deadline, "the condition is not true after 10 s"
            sleep(0.005)
        return value

    return wait
