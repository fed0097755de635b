"""Several workers of one model: later ones start from the server's weights, and a round equals one large batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from tests.torch.conftest import every_structure
from torch import nn

import deltaserve
from deltaserve import Async, Sync
from deltaserve._credentials import Plaintext
from deltaserve.torch import RemoteAdadelta, RemoteAdam, RemoteAdamW, RemoteRMSprop, RemoteSGD

if TYPE_CHECKING:
    from tests.torch.conftest import Remote


def test_the_first_creates_and_the_second_starts_from_the_servers_weights(remote: "Remote", model: str) -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    first = remote(one.parameters(), model=model)
    one(torch.ones(1, 3)).sum().backward()
    first.step()
    second = remote(two.parameters(), model=model)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert (first.rank, second.rank) == (0, 1)


@pytest.mark.parametrize(
    ("params", "options", "difference"),
    [
        (lambda: [torch.zeros(3, 2)], {}, r"tensor 0 is 0\.0 \[2, 3\] in group 0, not 0\.0 \[3, 2\] in group 0"),
        (lambda: [torch.zeros(2, 3), torch.zeros(2)], {}, "it has 1 tensors, not 2"),
        (lambda: [("w", torch.zeros(2, 3))], {}, r"tensor 0 is 0\.0 .*, not w"),
        (lambda: [torch.zeros(2, 3)], {"lr": 0.5}, r"lr of group 0 is 1\.0, not 0\.5"),
        (lambda: [torch.zeros(2, 3)], {"weight_decay": 0.1}, r"weight_decay of group 0 is 0\.0, not 0\.1"),
        (lambda: [torch.zeros(2, 3)], {"maximize": True}, "maximize of group 0"),
        (lambda: [torch.zeros(2, 3)], {"policy": Sync()}, "policy"),
        (lambda: [{"params": [torch.zeros(2, 3)]}, {"params": [torch.zeros(1)]}], {}, "it has 1 tensors, not 2"),
    ],
)
def test_a_mismatch_says_what_differs(
    params: Callable[[], Any],
    options: dict[str, Any],
    difference: str,
    remote: "Remote",
    client: deltaserve.Client,
    model: str,
) -> None:
    remote([torch.zeros(2, 3)], model=model)
    with pytest.raises(deltaserve.ConflictError, match=difference):
        remote(params(), model=model, **options)
    assert len(client.model(model).info().sessions) == 1, "the one that failed has left no session"


@pytest.mark.parametrize(
    ("kind", "options", "difference"),
    [
        (RemoteAdam, {}, "has the optimizer adadelta, not adam"),
        (RemoteSGD, {"momentum": 0.5}, "has the optimizer adadelta, not sgd with momentum"),
    ],
)
def test_a_model_of_another_optimizer_is_not_joined(
    options: dict[str, Any], difference: str, remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    client.create_model(model, {"0.0": torch.zeros(2, 3)})
    with pytest.raises(deltaserve.ConflictError, match=difference):
        remote([torch.zeros(2, 3)], model=model, **options)


@pytest.mark.parametrize(
    ("kind", "group"),
    [(RemoteSGD, {"momentum": 0.5}), (RemoteAdamW, {"amsgrad": True}), (RemoteRMSprop, {"centered": True})],
)
def test_a_structure_that_changes_between_steps_is_refused_and_changes_nothing(
    group: dict[str, Any], remote: "Remote"
) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = remote([param])
    param.grad = torch.ones(3)
    optimizer.step()
    before, usual = param.detach().clone(), dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(group)
    with pytest.raises(
        deltaserve.ConflictError, match=f"not {optimizer._model.groups[0].kind} with {next(iter(group))}"
    ):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0].update(usual)
    optimizer.step()
    assert optimizer.version == 2


def test_the_default_policy_is_asynchronous(remote: "Remote", client: deltaserve.Client, model: str) -> None:
    remote([torch.zeros(1)], model=model)
    assert client.model(model).policy == Async()


def test_the_worker_has_the_given_name_and_the_rank_that_the_server_assigns(
    remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    with remote([torch.zeros(1)], model=model, worker="worker-7") as optimizer:
        assert isinstance(optimizer, torch.optim.Optimizer)
        (session,) = client.model(model).info().sessions
        assert (session.worker, session.rank) == ("worker-7", optimizer.rank)
    assert client.model(model).info().sessions == ()


@pytest.mark.parametrize("options", [{"model": "no spaces"}, {"model": "m", "worker": "no spaces"}])
def test_a_refused_name_leaves_no_connection_behind(options: dict[str, Any], remote: "Remote") -> None:
    with pytest.raises(deltaserve.RequestError, match="expected 1 to 128 characters"):
        remote([torch.zeros(1)], **options)


def test_the_channel_is_opened_by_the_credentials(target: str) -> None:
    targets: list[str] = []

    class Recorded(Plaintext):
        def open_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
            targets.append(target)
            return super().open_channel(target, options)

    with pytest.raises(deltaserve.RequestError, match="expected 1 to 128 characters"):
        RemoteAdadelta([torch.zeros(1)], target, model="no spaces", credentials=Recorded())
    assert targets == [target]


def test_an_unreachable_server_is_reported_within_the_timeout() -> None:
    with pytest.raises(deltaserve.UnavailableError, match=r"127\.0\.0\.1:1"):
        RemoteAdadelta([torch.zeros(1)], "127.0.0.1:1", model="m", timeout_seconds=0.2)


def test_a_step_after_close_raises(remote: "Remote") -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = remote([param])
    optimizer.close()
    optimizer.close()
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match="closed"):
        optimizer.step()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(value: float, remote: "Remote") -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = remote([("layer.weight", param)])
    param.grad = torch.tensor([1.0, value, 1.0])
    with pytest.raises(deltaserve.RequestError, match=r"layer\.weight at element 1"):
        optimizer.step()
    assert param.tolist() == [1, 1, 1]
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.last_result is not None
    assert optimizer.last_result.version == 1


def test_the_layout_has_the_order_in_which_backward_computes_gradients(
    remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    remote(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).named_parameters(), model=model)
    assert [spec.name for spec in client.model(model).tensors] == ["1.bias", "1.weight", "0.bias", "0.weight"]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_model_that_was_created_in_another_order_is_joined(
    order: list[int], remote: "Remote", client: deltaserve.Client, model: str
) -> None:
    params = [nn.Parameter(torch.zeros(size)) for size in (2, 3, 4)]
    created = client.create_model(model, {f"0.{index}": torch.full((index + 2,), index) for index in order})
    optimizer = remote(params, model=model)
    assert [param.tolist() for param in params] == [[0.0] * 2, [1.0] * 3, [2.0] * 4]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    weights = created.pull_state().weights
    assert all(weights[f"0.{index}"].tolist() == param.tolist() for index, param in enumerate(params))


@every_structure
def test_two_workers_in_step_equal_one_on_the_joined_batch(
    remote: "Remote", kind: Any, options: dict[str, Any], model: str
) -> None:
    """Each has weights of its own until it joins."""
    steps = 30
    options = {"weight_decay": 0.01, **options}
    nets = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3)]
    x, y = torch.randn(steps, 2, 16, 4), torch.randn(steps, 2, 16, 1)
    nets[2].load_state_dict(nets[0].state_dict())
    optimizers = [
        remote(net.named_parameters(), model=model, policy=Sync(min_workers=2), worker=name, **options)
        for net, name in zip(nets, "ab", strict=False)
    ]

    def train(rank: int) -> None:
        net, optimizer = nets[rank], optimizers[rank]
        for step in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x[step, rank]), y[step, rank]).backward()
            optimizer.step()
            assert optimizer.last_result
            assert (optimizer.last_result.contributors, optimizer.last_result.version) == (2, step + 1)

    with ThreadPoolExecutor() as threads:
        list(threads.map(train, range(2)))
    alone = kind._torch_class(nets[2].parameters(), **options)
    for step in range(steps):
        alone.zero_grad()
        nn.functional.mse_loss(nets[2](x[step].flatten(0, 1)), y[step].flatten(0, 1)).backward()
        alone.step()
    for mine, other, joined in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, joined, rtol=1e-4, atol=1e-5)
