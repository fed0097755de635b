"""Parameters of any layout, shape and type, and parameters that are shared."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.torch.conftest import every_structure_with
from torch import Tensor, nn

from deltaserve.torch import RemoteOptimizer, RemoteSGD

if TYPE_CHECKING:
    from tests.torch.conftest import Pair, Remote, Side


class Holder(nn.Module):
    """Holds tensors as parameters; its loss depends on each of them."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(tensor, requires_grad=True) for tensor in tensors)

    def forward(self, x: Tensor) -> Tensor:
        weighted = [(param.double() * (index + 1)).sin().sum() for index, param in enumerate(self.tensors)]
        loss: Tensor = torch.stack(weighted).sum() + x.mean() * weighted[0]
        return loss


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    return drawn


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: values(3, 4, 5, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: values(5, 4).t(),
    "every second": lambda: values(10, 6)[::2, ::3],
    "last of three dimensions": lambda: values(4, 3, 2)[..., 0],
    "middle of a larger one": lambda: values(10)[3:7],
    "scalar": values,
    "one element": lambda: values(1),
    "permuted": lambda: values(2, 3, 4).permute(2, 0, 1),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_a_parameter_of_any_layout(make: Callable[[], Tensor], make_pair: "Callable[..., Pair]") -> None:
    pair = make_pair(lambda: Holder(make(), values(3)))
    strides = [param.stride() for param in pair.remote.net.parameters()]
    pair.train(20)
    assert [param.stride() for param in pair.remote.net.parameters()] == strides


def test_memory_beside_a_parameter_is_not_written(remote: "Remote") -> None:
    whole = torch.ones(10, 4)
    for part in (whole[2:4], whole[6:8, 1:3], whole[9]):
        param = nn.Parameter(part)
        param.grad = torch.ones_like(param)
        remote([param]).step()
    changed = (whole != 1).nonzero().tolist()
    assert changed == [[r, c] for r in (2, 3) for c in range(4)] + [[r, c] for r in (6, 7) for c in (1, 2)] + [
        [9, c] for c in range(4)
    ]


def test_an_empty_parameter(make_pair: "Callable[..., Pair]") -> None:
    make_pair(lambda: Holder(values(3), torch.empty(0), torch.empty(4, 0, 2), values(2))).train(8)


def test_a_gradient_of_another_layout_than_its_parameter(make_pair: "Callable[..., Pair]") -> None:
    def relayout(side: "Side", step: int) -> None:
        for param in side.net.parameters():
            assert param.grad is not None
            param.grad = param.grad.t().contiguous().t() if step % 2 else torch.ones(()).expand(param.shape)

    make_pair(lambda: Holder(values(5, 4), values(2, 3))).train(20, relayout)


@every_structure_with("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_type_keep_it(
    dtype: torch.dtype, options: dict[str, Any], kind: type[RemoteOptimizer], make_pair: "Callable[..., Pair]"
) -> None:
    """The server computes in float32, torch in the parameters' type: they agree to the precision of the coarser one."""
    eps = {} if kind is RemoteSGD else {"eps": 1e-3}
    pair = make_pair(lambda: Holder(values(6, 5, dtype=dtype), values(4)), **{"lr": 0.01, **eps, **options})
    for side in pair.sides:
        side.train(20)
    one, two = (next(iter(side.net.parameters())) for side in pair.sides)
    assert one.dtype is dtype
    coarse = {torch.float64: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(one, two, rtol=coarse, atol=coarse)
    state = pair.remote.optimizer.state_dict()["state"].get(0, {})
    assert {name: value.dtype for name, value in state.items()} == {
        name: torch.float32 if name == "step" else dtype
        for name in pair.local.optimizer.state_dict()["state"].get(0, {})
    }


def test_a_float64_parameter_starts_from_the_servers_float32_value(remote: "Remote") -> None:
    param = nn.Parameter(torch.tensor([1 / 3], dtype=torch.float64))
    remote([param])
    assert param.item() == torch.tensor(1 / 3, dtype=torch.float32).item()


def test_tied_weights(make_pair: "Callable[..., Pair]") -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            with torch.no_grad():
                self.one.weight.copy_(values(4, 4))
                self.one.bias.zero_()
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            tied: Tensor = self.two(self.one(x).tanh())
            return tied

    pair = make_pair(Tied)
    pair.train(20)
    assert isinstance(pair.remote.net, Tied)
    assert pair.remote.net.one.weight is pair.remote.net.two.weight
    assert len(pair.remote.optimizer.state_dict()["state"]) == 2


def test_batch_normalisation_and_convolutions(make_pair: "Callable[..., Pair]") -> None:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten())
            return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    make_pair(make).train(20)


def test_a_million_parameters_travel_as_a_stream(make_pair: "Callable[..., Pair]") -> None:
    make_pair(lambda: Holder(values(1000, 600), values(7), values(500, 700).t())).train(3)


def test_a_parameter_twice_in_a_group_warns_like_torch_and_is_updated_once(remote: "Remote") -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        optimizer = remote([param, param])
    param.grad = torch.ones(3)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    assert state["step"].item() == 1
    once = nn.Parameter(torch.ones(3))
    once.grad = torch.ones(3)
    remote([once]).step()
    assert torch.equal(param, once)


def test_two_parameters_of_one_name_are_refused(remote: "Remote") -> None:
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="two parameters are named w"):
        remote([("w", one), ("w", two)])
    with pytest.raises(ValueError, match="two parameters are named w"):
        remote([{"params": [("w", one)]}, {"params": [("w", two)]}])
