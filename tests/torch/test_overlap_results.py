"""`overlap=True` gives the same bits, whatever happens between backward and step; and sends early where it can."""

import logging
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltaserve
from deltaserve import Async, Bounded, Sync
from deltaserve.torch import RemoteAdadelta

if TYPE_CHECKING:
    from tests.torch.conftest import Body, Eventually, Twins

    MakeTwins = Callable[..., Twins]

CHANGED = "gradients were changed after backward, that of 0."
AGAIN = "more than one backward pass made gradients"
OTHERS = "other parameters had a gradient than in the step before"


def batch(step: int, rows: int = 16) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1000 + step))


def backward(net: nn.Module, step: int) -> Tensor:
    loss: Tensor = net(batch(step)).pow(2).mean()
    loss.backward()
    return loss


def between(act: Callable[[nn.Module, RemoteAdadelta, int], object]) -> "Body":
    """Returns the body of a training loop that does something between backward and step."""

    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        optimizer.zero_grad()
        backward(net, step)
        flush(optimizer)
        act(net, optimizer, step)
        optimizer.step()

    return body


def flush(optimizer: RemoteAdadelta) -> None:
    """Waits until what backward handed over has been dealt with."""
    if optimizer._overlap and not optimizer._overlap._closed:
        over = Event()
        optimizer._overlap._jobs.put(over.set)
        assert over.wait(10)


def gradients(net: nn.Module) -> list[Tensor]:
    return [param.grad for param in net.parameters() if param.grad is not None]


POLICIES: dict[str, Async | Sync | Bounded] = {
    "async": Async(), "async, bounded staleness": Async(max_staleness=0, damping=True), "sync": Sync(),
    "bounded": Bounded(slack=1),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_many_steps(policy: Async | Sync | Bounded, make_twins: "MakeTwins") -> None:
    twins = make_twins(policy=policy, lr=0.5, weight_decay=0.01)
    twins.train(50)
    assert twins.fates == ["not begun"] + ["taken"] * 49, "the first step shows what the next is to be"


# --- what is sent when


def test_chunks_leave_while_backward_goes_on(
    make_twins: "MakeTwins", eventually: "Eventually", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward does not make the lowest gradients before those above them have been handed to gRPC."""
    sent: list[str] = []
    monkeypatch.setattr("deltaserve._transport.overlapped.failpoint", sent.append)
    twins = make_twins()
    twins.train(1)
    net = twins.nets[0]
    whole = sum(param.numel() for param in net.above.parameters()) // 32
    net.half_way = lambda: eventually(lambda: len(sent) == whole)
    for _ in range(3):
        sent.clear()
        twins.train(1)
    assert twins.fates[1:] == ["taken"] * 3


def test_the_last_chunk_stays_until_step(
    make_twins: "MakeTwins", eventually: "Eventually", monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr("deltaserve._transport.overlapped.failpoint", sent.append)
    twins = make_twins()
    twins.train(2)
    sent.clear()
    chunks = -(-sum(param.numel() for param in twins.nets[0].parameters()) // 32)

    def check(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        if optimizer._overlap:
            eventually(lambda: len(sent) >= chunks - 1)
            assert optimizer._model.info().version == 2
            assert sent == ["worker.mid_body"] * (chunks - 1)

    twins.train(1, between(check))
    assert sent[-1] == "worker.sent"


def test_backward_does_not_wait_for_what_sends(make_twins: "MakeTwins", monkeypatch: pytest.MonkeyPatch) -> None:
    """The server, and the thread that adds gradients, stand still until backward is over."""
    twins, over = make_twins(), Event()
    twins.train(2)
    overlap = twins.optimizers[0]._overlap
    assert overlap
    begin = overlap._begin

    def late(push: Any) -> bool:
        assert over.wait(10)
        return begin(push)

    monkeypatch.setattr(overlap, "_begin", late)

    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        optimizer.zero_grad()
        backward(net, step)
        over.set()
        optimizer.step()

    twins.train(1, body)
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


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns what the client has said: the server, which is in this process too, may warn of something else."""
    return [record.getMessage() for record in caplog.records if record.name == "deltaserve"]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_gradients_that_are_changed(
    change: Callable[[nn.Module], object], make_twins: "MakeTwins", caplog: pytest.LogCaptureFixture
) -> None:
    """They are pushed as they are in `step`; after three pushes in vain it says why, once, and stops for good."""
    twins = make_twins()
    with caplog.at_level(logging.WARNING, "deltaserve"):
        twins.train(6, between(lambda net, optimizer, step: change(net)))
    assert twins.fates[0] == "not begun"
    assert all(fate.startswith(CHANGED) for fate in twins.fates[1:4])
    assert twins.fates[4:] == ["not begun"] * 2
    (warning,) = told(caplog)
    assert "overlap=True does not help here and is off from now on" in warning
    assert CHANGED in warning
    assert all(not param._post_accumulate_grad_hooks for param in twins.nets[0].parameters())


def test_clipping_that_changes_nothing(make_twins: "MakeTwins") -> None:
    """Where no norm is above the bound, every gradient is multiplied by one."""
    twins = make_twins()
    twins.train(5, between(lambda net, optimizer, step: nn.utils.clip_grad_norm_(net.parameters(), 1e6)))
    assert twins.fates[1:] == ["taken"] * 4


def test_it_goes_on_where_only_some_steps_change_them(
    make_twins: "MakeTwins", caplog: pytest.LogCaptureFixture
) -> None:
    def clip_often(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        if step % 3:
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)

    twins = make_twins()
    twins.train(12, between(clip_often))
    assert twins.fates[3::3] == ["taken"] * 3
    assert not told(caplog)


def test_a_change_when_all_but_the_last_chunk_has_been_sent(make_twins: "MakeTwins", eventually: "Eventually") -> None:
    def wait_and_change(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        push = optimizer._overlap.push if optimizer._overlap else None
        if push and step:
            eventually(lambda: push._may_send.empty() and push._first_missing == len(push._names))
        for gradient in gradients(net):
            gradient.data.mul_(3)

    make_twins().train(3, between(wait_and_change))


def test_gradients_accumulated_over_two_passes(make_twins: "MakeTwins", caplog: pytest.LogCaptureFixture) -> None:
    twins = make_twins()
    with caplog.at_level(logging.WARNING, "deltaserve"):
        twins.train(6, between(lambda net, optimizer, step: backward(net, 100 + step)))
    assert twins.fates[1:4] == [AGAIN] * 3
    (warning,) = told(caplog)
    assert AGAIN in warning


def test_skipped_steps(make_twins: "MakeTwins") -> None:
    def skip(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        if step % 2:
            optimizer.zero_grad()
            backward(net, 100 + step)

    twins = make_twins()
    twins.train(8, between(skip))
    assert twins.fates[1:] == [AGAIN, "taken"] * 3 + [AGAIN]


def test_gradients_of_zero_that_stay(make_twins: "MakeTwins") -> None:
    """`zero_grad(set_to_none=False)`: the next gradient is added to the same memory."""

    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        backward(net, step)
        optimizer.step()

    twins = make_twins()
    twins.train(6, body)
    assert twins.fates[1:] == ["taken"] * 5


def test_mixed_precision_with_a_scaler(make_twins: "MakeTwins") -> None:
    scalers: dict[nn.Module, torch.amp.GradScaler] = {}

    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        scaler = scalers.setdefault(net, torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2))
        optimizer.zero_grad()
        scaler.scale(net(batch(step)).pow(2).mean()).backward()
        if step == 3:
            gradients(net)[0].fill_(torch.inf)  # this step is left out
        scaler.step(optimizer)
        scaler.update()

    make_twins().train(8, body)


def test_schedulers(make_twins: "MakeTwins") -> None:
    schedulers: dict[nn.Module, torch.optim.lr_scheduler.LRScheduler] = {}

    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        scheduler = schedulers.setdefault(net, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        scheduler.step()

    twins = make_twins()
    twins.train(10, body)
    assert twins.fates[1:] == ["taken"] * 9


def test_hyperparameters_changed_after_backward(make_twins: "MakeTwins", caplog: pytest.LogCaptureFixture) -> None:
    twins = make_twins()
    twins.train(5, between(lambda net, optimizer, step: optimizer.param_groups[0].update(lr=1 / (step + 1))))
    assert twins.fates[1:4] == ["the hyperparameters were changed"] * 3
    assert "the hyperparameters were changed" in told(caplog)[0]


def test_weights_of_pushes(make_twins: "MakeTwins") -> None:
    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step(weight=16.0 if step % 4 else 7.0)

    twins = make_twins(policy=Sync())
    twins.train(7, body)
    other = "the weight was another than in the step before"
    assert twins.fates == ["not begun", other, "taken", "taken", other, other, "taken"]


def test_parameters_without_gradient_in_some_steps(make_twins: "MakeTwins") -> None:
    def drop(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        if step == 2:
            next(net.parameters()).grad = None

    twins = make_twins(weight_decay=0.1)
    twins.train(7, between(drop))
    assert twins.fates == ["not begun", "taken", OTHERS, OTHERS, "taken", "taken", "taken"]


def test_a_gradient_that_no_backward_pass_made(make_twins: "MakeTwins") -> None:
    """What has no hook's call, but is expected, is filled in by `step`."""

    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        optimizer.zero_grad()
        first, *_ = net.parameters()
        first.requires_grad_(False)
        backward(net, step)
        first.requires_grad_(True)
        first.grad = torch.full_like(first, 0.25)
        optimizer.step()

    twins = make_twins()
    twins.train(5, body)
    assert twins.fates[1:] == ["taken"] * 4


def test_parameters_that_are_frozen_and_later_unfrozen(make_twins: "MakeTwins") -> None:
    twins = make_twins()
    for frozen in (True, False):
        for net in twins.nets:
            net.below.requires_grad_(not frozen)
        twins.train(3)
    assert twins.fates == ["not begun", "taken", "taken", OTHERS, "taken", "taken"]


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
    twins.train(10)
    assert twins.fates[1:] == ["taken"] * 9


def test_a_closure(make_twins: "MakeTwins") -> None:
    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            return backward(net, step).item()

        assert optimizer.step(closure) > 0

    twins = make_twins()
    twins.train(8, body)
    assert twins.fates[1:] == ["taken"] * 7


def test_a_closure_that_raises(make_twins: "MakeTwins") -> None:
    def body(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
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
    assert twins.fates[3:] == ["taken"] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_type(dtype: torch.dtype, make_twins: "MakeTwins") -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 200).reshape(50, 4).to(dtype).t())

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(dtype) @ self.weight).float()

    twins = make_twins(Cast, eps=1e-3)
    twins.train(10)
    assert twins.fates[1:] == ["taken"] * 9


def test_a_hook_of_the_users_that_changes_gradients_after_ours(make_twins: "MakeTwins") -> None:
    def double(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(2)

    twins = make_twins()
    for net in twins.nets:
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(double)
    twins.train(5)


def test_a_gradient_that_is_refused(make_twins: "MakeTwins") -> None:
    """The same error as without overlap, and nothing is changed by it; the next step is made without, to be sure."""

    def spoiled(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        optimizer.zero_grad()
        (net(batch(step)).sum() * torch.nan).backward()
        with pytest.raises(deltaserve.RequestError, match=r"NaN or infinity in tensor 0.* at element 0"):
            optimizer.step()

    twins = make_twins()
    twins.train(2)
    twins.train(2, spoiled)
    twins.train(3)
    assert twins.fates[1:] == ["taken", "taken", "not begun", "not begun", "taken", "taken"]


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
    assert twins.fates == ["not begun", "taken", "taken"] * 2


def test_a_state_that_is_loaded_between_backward_and_step(make_twins: "MakeTwins") -> None:
    def load(net: nn.Module, optimizer: RemoteAdadelta, step: int) -> None:
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())

    twins = make_twins()
    twins.train(5, between(load))
    assert twins.fates[1] == twins.fates[4] == "taken"
    assert twins.fates[2] == "the session was another"
