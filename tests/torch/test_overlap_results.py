"""`overlap=True` gives the same bits as without, whatever happens between backward and step, and sends early."""

from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.torch.conftest import CHUNK, Deep, batch, drain, every_structure
from torch import Tensor, nn

import deltaserve
from deltaserve import Async, Bounded, Sync
from deltaserve.torch import RemoteAdadelta, RemoteOptimizer

if TYPE_CHECKING:
    from tests.torch.conftest import Body, Eventually, Twins

    MakeTwins = Callable[..., Twins]

Act = Callable[[Any, RemoteOptimizer, int], object]


def backward(net: nn.Module, step: int) -> Tensor:
    loss: Tensor = net(batch(step)).pow(2).mean()
    loss.backward()
    return loss


def between(act: Act, settle: bool = True) -> "Body":
    """Returns the body of a training loop that does something between backward and step."""

    def body(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        optimizer.zero_grad()
        backward(net, step)
        if settle and optimizer._overlap and not optimizer._overlap._closed:
            drain(optimizer._overlap)
        act(net, optimizer, step)
        optimizer.step()

    return body


def gradients(net: nn.Module) -> list[Tensor]:
    return [param.grad for param in net.parameters() if param.grad is not None]


POLICIES = {
    "async": Async(),
    "async, bounded staleness": Async(max_staleness=0, damping=True),
    "sync": Sync(),
    "bounded": Bounded(slack=1),
}


@every_structure
def test_many_steps(options: dict[str, Any], make_twins: "MakeTwins") -> None:
    twins = make_twins(weight_decay=0.01, **options)
    twins.train(12)
    assert twins.fates == ["not begun"] + ["taken"] * 11, "the first step shows what the next push will be"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_many_steps_under_each_policy(policy: Async | Sync | Bounded, make_twins: "MakeTwins") -> None:
    twins = make_twins(policy=policy, lr=0.5, weight_decay=0.01)
    twins.train(12)
    assert twins.fates == ["not begun"] + ["taken"] * 11, "the first step shows what the next push will be"


# --- what is sent when


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The failpoints that the sending thread has passed, one for each chunk."""
    passed: list[str] = []
    monkeypatch.setattr("deltaserve._transport.overlapped.failpoint", passed.append)
    return passed


def test_chunks_leave_while_backward_goes_on(
    make_twins: "MakeTwins", eventually: "Eventually", sent: list[str]
) -> None:
    """Backward computes the lowest gradients only after gRPC has taken those above them."""
    twins = make_twins()
    twins.train(1)
    net = twins.nets[0]
    whole = sum(param.numel() for param in net.above.parameters()) // CHUNK
    net.half_way = lambda: eventually(lambda: len(sent) == whole)
    for _ in range(3):
        sent.clear()
        twins.train(1)
    assert twins.fates[1:] == ["taken"] * 3


def test_the_last_chunk_is_held_back_until_step(
    make_twins: "MakeTwins", eventually: "Eventually", sent: list[str]
) -> None:
    twins = make_twins()
    twins.train(2)
    sent.clear()
    chunks = -(-sum(param.numel() for param in twins.nets[0].parameters()) // CHUNK)

    def check(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        if optimizer._overlap:
            eventually(lambda: len(sent) >= chunks - 1)
            assert optimizer._model.info().version == 2
            assert sent == ["worker.mid_body"] * (chunks - 1)

    twins.train(1, between(check))
    assert sent[-1] == "worker.sent"


def test_backward_does_not_wait_for_the_thread_that_sends(
    make_twins: "MakeTwins", monkeypatch: pytest.MonkeyPatch
) -> None:
    twins, over = make_twins(), Event()
    twins.train(2)
    overlap = twins.optimizers[0]._overlap
    assert overlap
    begin = overlap._try_begin
    monkeypatch.setattr(overlap, "_try_begin", lambda push: over.wait(10) and begin(push))
    twins.train(1, between(lambda net, optimizer, step: over.set(), settle=False))
    assert twins.fates[-1] == "taken"


# --- what happens between backward and step


def replace(net: nn.Module) -> None:
    for param in net.parameters():
        param.grad = torch.ones_like(param)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "clipped by norm": lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1e-3),
    "clipped by value": lambda net: nn.utils.clip_grad_value_(net.parameters(), 1e-4),
    "scaled": lambda net: [gradient.mul_(0.5) for gradient in gradients(net)],
    "past autograd": lambda net: [gradient.data.clamp_(-1e-4, 1e-4) for gradient in gradients(net)],
    "through numpy": lambda net: [np.add(gradient.numpy(), 1, out=gradient.numpy()) for gradient in gradients(net)],
    "their signs alone": lambda net: [gradient.data.neg_() for gradient in gradients(net)],
    "one element of the last": lambda net: gradients(net)[0].data[0, 0].add_(1e-3),
    "replaced": replace,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_gradients_are_pushed_as_step_finds_them(
    change: Callable[[nn.Module], object], make_twins: "MakeTwins", warned: Callable[[], list[str]]
) -> None:
    """After three discarded pushes, overlap gives its reason once and switches itself off."""
    twins = make_twins()
    twins.train(6, between(lambda net, optimizer, step: change(net)))
    assert twins.fates == ["not begun"] + ["discarded"] * 3 + ["not begun"] * 2
    (warning,) = warned()
    assert "overlap=True is off from now on" in warning
    assert "changed" in warning
    assert all(not param._post_accumulate_grad_hooks for param in twins.nets[0].parameters())


DISCARDED: dict[str, tuple[Act, str]] = {
    "a second backward pass": (lambda net, optimizer, step: backward(net, 100 + step), "backward pass"),
    "other hyperparameters": (
        lambda net, optimizer, step: optimizer.param_groups[0].update(lr=1 / (step + 1)),
        "hyperparameters",
    ),
}


@pytest.mark.parametrize(("act", "reason"), DISCARDED.values(), ids=DISCARDED)
def test_the_warning_names_the_reason(
    act: Act, reason: str, make_twins: "MakeTwins", warned: Callable[[], list[str]]
) -> None:
    twins = make_twins()
    twins.train(5, between(act))
    assert twins.fates[1:] == ["discarded"] * 3 + ["not begun"]
    (warning,) = warned()
    assert reason in warning


def zero_gradients_that_stay(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    optimizer.zero_grad(set_to_none=False)  # backward adds to the same memory
    backward(net, step)
    optimizer.step()


def with_closure(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        return backward(net, step).item()

    assert optimizer.step(closure) > 0


def with_weights(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(net, step)
    optimizer.step(weight=16.0 if step % 4 else 7.0)


def with_a_gradient_that_has_no_hook(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    """`step` fills in a gradient that is expected but comes from no backward pass."""
    optimizer.zero_grad()
    first, *_ = net.parameters()
    first.requires_grad_(False)
    backward(net, step)
    first.requires_grad_(True)
    first.grad = torch.full_like(first, 0.25)
    optimizer.step()


def skip_every_second(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    if step % 2:
        optimizer.zero_grad()
        backward(net, 100 + step)


def clip_often(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    if step % 3:
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def drop_a_gradient_once(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    if step == 2:
        next(net.parameters()).grad = None


def schedule(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(net, step)
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.9  # as a scheduler does


NO, TAKEN, OUT = "not begun", "taken", "discarded"
BODIES: "dict[str, tuple[Body, dict[str, Any], list[str]]]" = {
    "gradients of zero that stay": (zero_gradients_that_stay, {}, [NO] + [TAKEN] * 5),
    "a closure": (with_closure, {}, [NO] + [TAKEN] * 4),
    "weights of pushes": (with_weights, {"policy": Sync()}, [NO, OUT, TAKEN, TAKEN, OUT, OUT, TAKEN]),
    "no hook": (with_a_gradient_that_has_no_hook, {}, [NO] + [TAKEN] * 4),
    "skipped steps": (between(skip_every_second), {}, [NO, OUT, TAKEN, OUT, TAKEN, OUT, TAKEN, OUT]),
    "clipped often": (between(clip_often), {}, [NO, OUT, OUT, TAKEN, OUT, OUT, TAKEN, OUT, OUT, TAKEN]),
    "a gradient less once": (
        between(drop_a_gradient_once),
        {"weight_decay": 0.1},
        [NO, TAKEN, OUT, OUT, TAKEN, TAKEN],
    ),
    "clipping that changes nothing": (
        between(lambda net, optimizer, step: nn.utils.clip_grad_norm_(net.parameters(), 1e6)),
        {},
        [NO] + [TAKEN] * 4,
    ),
    "a schedule": (schedule, {}, [NO] + [TAKEN] * 5),
}


@pytest.mark.parametrize(("body", "options", "fates"), BODIES.values(), ids=BODIES)
def test_a_training_loop(
    body: "Body", options: dict[str, Any], fates: list[str], make_twins: "MakeTwins", warned: Callable[[], list[str]]
) -> None:
    twins = make_twins(**options)
    twins.train(len(fates), body)
    assert twins.fates == fates
    assert not warned()


def test_a_change_after_all_but_the_last_chunk_was_sent(make_twins: "MakeTwins", eventually: "Eventually") -> None:
    def wait_and_change(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        push = optimizer._overlap.push if optimizer._overlap else None
        if push and step:
            eventually(lambda: push._may_send.empty() and push._first_missing == len(push._names))
        for gradient in gradients(net):
            gradient.data.mul_(3)

    make_twins().train(3, between(wait_and_change))


def test_mixed_precision_with_a_scaler(make_twins: "MakeTwins") -> None:
    scalers: dict[nn.Module, torch.amp.GradScaler] = {}

    def body(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        scaler = scalers.setdefault(net, torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2))
        optimizer.zero_grad()
        scaler.scale(net(batch(step)).pow(2).mean()).backward()
        if step == 3:
            gradients(net)[0].fill_(torch.inf)  # the scaler skips this step
        scaler.step(optimizer)
        scaler.update()

    make_twins().train(8, body)


def test_parameters_that_are_frozen_and_later_unfrozen(make_twins: "MakeTwins") -> None:
    twins = make_twins()
    for frozen in (True, False):
        for net in twins.nets:
            net.below.requires_grad_(not frozen)
        twins.train(3)
    assert twins.fates == [NO, TAKEN, TAKEN, OUT, TAKEN, TAKEN]


def test_parameters_used_twice(make_twins: "MakeTwins") -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.constant_(self.one.weight, 0.1)
            nn.init.eye_(self.two.weight)
            for layer in (self.one, self.two):
                nn.init.zeros_(layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.one(self.two(self.one(x).tanh()).tanh())
            return result

    twins = make_twins(Tied)
    twins.train(5)
    assert twins.fates == [NO] + [TAKEN] * 4


def test_a_closure_that_raises(make_twins: "MakeTwins") -> None:
    def body(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            backward(net, step)
            raise ArithmeticError("as planned")

        with pytest.raises(ArithmeticError, match="as planned"):
            optimizer.step(closure)

    twins = make_twins()
    twins.train(2)
    twins.train(1, body)
    twins.train(2)
    assert twins.fates[3:] == [TAKEN] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_type(dtype: torch.dtype, make_twins: "MakeTwins") -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 200).reshape(50, 4).to(dtype).t())

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(dtype) @ self.weight).float()

    twins = make_twins(Cast, eps=1e-3)
    twins.train(5)
    assert twins.fates == [NO] + [TAKEN] * 4


def test_a_hook_that_changes_gradients_after_ours(make_twins: "MakeTwins") -> None:
    def double(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(2)

    twins = make_twins()
    for net in twins.nets:
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(double)
    twins.train(5)


def test_a_refused_gradient_raises_the_same_error_and_changes_nothing(make_twins: "MakeTwins") -> None:
    """The step after it is not begun early: it has the refused push to settle first."""

    def spoiled(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        optimizer.zero_grad()
        (net(batch(step)).sum() * torch.nan).backward()
        with pytest.raises(deltaserve.RequestError, match=r"tensor 0.* at element 0"):
            optimizer.step()

    twins = make_twins()
    twins.train(2)
    twins.train(2, spoiled)
    twins.train(3)
    assert twins.fates[1:] == [TAKEN, TAKEN, NO, NO, TAKEN, TAKEN]


def test_a_group_that_is_added_later(make_twins: "MakeTwins") -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.linspace(-1, 1, 40).reshape(4, 10))
            self.second: nn.Parameter | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.first
            return y if self.second is None else y @ self.second

    twins = make_twins(Growing)
    twins.train(3)
    for net, optimizer in zip(twins.nets, twins.optimizers, strict=True):
        net.second = nn.Parameter(torch.linspace(-1, 1, 50).reshape(10, 5))
        optimizer.add_param_group({"params": [net.second], "lr": 0.5})
    twins.train(3)
    assert twins.fates == [NO, TAKEN, TAKEN] * 2


def test_a_state_that_is_loaded_between_backward_and_step(make_twins: "MakeTwins") -> None:
    def load(net: nn.Module, optimizer: RemoteOptimizer, step: int) -> None:
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())

    twins = make_twins()
    twins.train(5, between(load))
    assert (twins.fates[1], twins.fates[2], twins.fates[4]) == (TAKEN, OUT, TAKEN)


# --- several optimizers of one network


def test_a_second_optimizer_that_never_steps(make_twins: "MakeTwins", plain_remote: Any) -> None:
    twins = make_twins()
    other = plain_remote(twins.nets[0].above.parameters(), overlap=True, transport="stream")
    twins.train(4)
    assert twins.fates[1:] == [TAKEN] * 3
    assert other.version == 0


def test_an_optimizer_for_each_half(plain_remote: Any, make_twins: "MakeTwins") -> None:
    nets = Deep(), Deep()
    optimizers = [
        [plain_remote(part.parameters(), overlap=overlap, transport="stream") for part in (net.above, net.below)]
        for net, overlap in zip(nets, (True, False), strict=True)
    ]
    for step in range(6):
        for net, halves in zip(nets, optimizers, strict=True):
            net.zero_grad()
            backward(net, step)
            for half in halves:
                half.step()
        assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_a_small_model_travels_in_one_message(plain_remote: Any) -> None:
    """One message is faster than a push that begins early."""
    net = nn.Linear(4, 4)
    optimizer = plain_remote(net.parameters(), overlap=True)
    for _ in range(3):
        push = optimizer._overlap.push
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert push.header is None


def test_local_steps_leave_no_gradient_to_overlap(target: str) -> None:
    with pytest.raises(ValueError, match="overlap: not possible with local_optimizer"):
        RemoteAdadelta([torch.zeros(1)], target, model="m", overlap=True, local_optimizer=torch.optim.SGD)
