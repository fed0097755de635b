"""Several workers of one model: who comes later starts from the server's weights, a round is one large batch."""

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import deltaserve
from deltaserve import Async, Sync
from deltaserve.torch import RemoteAdadelta

if TYPE_CHECKING:
    from tests.torch.conftest import Remote


def test_the_first_creates_and_the_second_starts_from_the_servers_weights(remote: "Remote") -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    first = remote(one.parameters(), model="joined")
    one(torch.ones(1, 3)).sum().backward()
    first.step()
    second = remote(two.parameters(), model="joined")
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
    params: Callable[[], Any], options: dict[str, Any], difference: str, remote: "Remote", target: str
) -> None:
    remote([torch.zeros(2, 3)], model="first")
    with pytest.raises(deltaserve.ConflictError, match=f"model first exists and differs: .*{difference}"):
        remote(params(), model="first", **options)
    with deltaserve.connect(target) as client:
        assert len(client.model("first").info().sessions) == 1, "the one that failed holds nothing"


def test_the_policy_is_asynchronous_unless_it_is_said(remote: "Remote", target: str) -> None:
    remote([torch.zeros(1)], model="plain")
    with deltaserve.connect(target) as client:
        assert client.model("plain").policy == Async()


def test_a_name_can_be_given_and_ranks_are_the_servers(remote: "Remote", target: str) -> None:
    optimizer = remote([torch.zeros(1)], model="named", worker="worker-7")
    with deltaserve.connect(target) as client:
        (session,) = client.model("named").info().sessions
        assert (session.worker, session.rank) == ("worker-7", optimizer.rank)
        optimizer.close()
        assert client.model("named").info().sessions == ()


def test_it_is_a_context_manager(remote: "Remote", target: str) -> None:
    with (
        RemoteAdadelta([torch.zeros(1)], target, model="context") as optimizer,
        deltaserve.connect(target) as client,
    ):
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert len(client.model("context").info().sessions) == 1
    with deltaserve.connect(target) as client:
        assert client.model("context").info().sessions == ()
        client.delete_model("context")


@pytest.mark.parametrize("options", [{"model": "no spaces"}, {"model": "m", "worker": "no spaces"}])
def test_what_the_server_refuses_leaves_no_connection_behind(
    options: dict[str, Any], remote: "Remote", target: str
) -> None:
    with pytest.raises(deltaserve.RequestError, match="expected 1 to 128 characters"):
        remote([torch.zeros(1)], **options)


def test_where_nobody_listens_the_timeout_is_kept() -> None:
    with pytest.raises(deltaserve.UnavailableError, match=r"127\.0\.0\.1:1"):
        RemoteAdadelta([torch.zeros(1)], "127.0.0.1:1", model="m", timeout_seconds=0.5)


def test_a_step_after_close_says_so(remote: "Remote") -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = remote([param])
    optimizer.close()
    optimizer.close()
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match="the connection is closed"):
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


def test_the_layout_has_the_order_in_which_backward_makes_gradients(remote: "Remote", target: str) -> None:
    remote(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).named_parameters(), model="order")
    with deltaserve.connect(target) as client:
        names = [spec.name for spec in client.model("order").tensors]
    assert names == ["1.bias", "1.weight", "0.bias", "0.weight"]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_model_that_others_made_in_another_order_is_joined(order: list[int], remote: "Remote", target: str) -> None:
    params = [nn.Parameter(torch.zeros(size)) for size in (2, 3, 4)]
    with deltaserve.connect(target) as client:
        made = client.create_model("theirs", {f"0.{index}": torch.full((index + 2,), index) for index in order})
        optimizer = remote(params, model="theirs")
        assert [param.tolist() for param in params] == [[0.0] * 2, [1.0] * 3, [2.0] * 4]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        weights = made.pull_state().weights
        assert all(weights[f"0.{index}"].tolist() == param.tolist() for index, param in enumerate(params))


WORKER = """
import sys
import torch
from torch import nn
from deltaserve import Sync
from deltaserve.torch import RemoteAdadelta

torch.set_num_threads(1)
target, rank, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(rank)  # each has weights of its own until it joins
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
torch.manual_seed(5)
x, y = torch.randn(steps, 2, 16, 4), torch.randn(steps, 2, 16, 1)
options = {"lr": 0.5, "weight_decay": 0.01, "policy": Sync(min_workers=2), "worker": f"w{rank}"}
with RemoteAdadelta(net.named_parameters(), target, model="together", **options) as optimizer:
    if rank == 0:
        torch.save({name: value.clone() for name, value in net.state_dict().items()}, sys.argv[4])
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[step, rank]), y[step, rank]).backward()
        optimizer.step()
        assert optimizer.last_result.contributors == 2
        assert optimizer.last_result.version == step + 1
    if rank == 0:
        torch.save(net.state_dict(), sys.argv[5])
"""


def test_two_processes_in_step_equal_one_on_the_joined_batch(target: str, tmp_path: Any) -> None:
    steps, files = 60, [str(tmp_path / name) for name in ("start", "end")]
    workers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WORKER, target, str(rank), str(steps), *files])
        for rank in range(2)
    ]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    start, end = (torch.load(file, weights_only=True) for file in files)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    net.load_state_dict(start)
    optimizer = torch.optim.Adadelta(net.parameters(), lr=0.5, weight_decay=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        x, y = torch.randn(steps, 2, 16, 4), torch.randn(steps, 2, 16, 1)
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[step].flatten(0, 1)), y[step].flatten(0, 1)).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-5)
    with deltaserve.connect(target) as client:
        client.delete_model("together")
