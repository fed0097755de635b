"""The checks that PyTorch makes of its own optimizers (test/test_optim.py), applied to the drop-ins.

The inputs are those of the installed PyTorch: `optim_db` in torch.testing._internal.common_optimizers has, for each
optimizer, the hyperparameters to try, the schedulers, and the inputs that must be refused. Each check here is rewritten
after the one of its name there. The fast tier tries every third set of hyperparameters and every third scheduler, the
deep tier all of them. "cuda" marks checks that PyTorch runs only on a GPU.

    there                                              here
    -------------------------------------------------  ----------------------------------------------------------------
    errors                                             the same
    forloop_goes_right_direction                       the same; there is only one implementation
    param_group_with_lrscheduler_goes_right_direction  the same
    param_groups_lr, param_groups_weight_decay         the same; but all groups have momentum, centered, or none
    tensor_lr, tensor_lr_num_dim                       the same
    step_is_noop_when_params_have_no_grad              the same
    step_is_noop_for_zero_grads                        the same
    optimizer_can_be_printed                           test_remote_optimizer.py: printed as by torch
    state_dict_deterministic                           the same
    can_load_older_state_dict                          the same
    can_load_from_to_named_state_dict                  test_remote_state_dicts.py: names in a loaded state
    save_load_equality_with_weights_only               test_remote_state_dicts.py: through files
    load_nontensor_step                                the same
    state_dict_pre_hook, _post_hook, _pre_post_hook    the same
    load_state_dict_pre_hook_and_prepend, _post_hook   the same
    step_pre_hook, step_post_hook, step_all_hooks      the same
    non_empty_state                                    test_remote_state_dicts.py: the form of torch
    grads_are_never_inplaced_into                      test_remote_parity.py
    complex, complex_2d                                refused: the server has real numbers (test_remote_optimizer.py)
    rosenbrock_sparse                                  refused: SGD and Adagrad of torch take sparse gradients, the
                                                       server does not (test_remote_optimizer.py)
    deepcopy_copies_all_public_attrs                   refused with a TypeError: a connection cannot be copied
    foreach_*, fused_*                                 test_remote_optimizer.py: they make the same update; the server
                                                       has one implementation
    peak_memory_foreach (cuda)                         no implementation to compare
    set_default_dtype_works_with_foreach               no implementation to compare
    differentiable                                     refused: autograd cannot pass through a server
    capturable, cudagraphs, mixed_device_dtype (cuda)  refused: a graph cannot wait for the network
    state_dict_with_cuda_params (cuda)                 test_gpu.py of the end-to-end tests steps on a GPU
    fused_large_tensor, grad_scaling_autocast_fused_*  cuda
    second_order_optims_return_consistent_types        all are first-order optimizers
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
import pytest
import torch
from tests.torch.conftest import equal, every_kind
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaserve.torch import RemoteOptimizer

if TYPE_CHECKING:
    from tests.torch.conftest import Remote

pytestmark = [every_kind, pytest.mark.deep]  # the import of the database alone takes seconds

Scheduler = Callable[[torch.optim.Optimizer], Any]


class Database(NamedTuple):
    """What PyTorch's `optim_db` has for an optimizer."""

    kwargs: Callable[[], list[dict[str, Any]]]
    errors: list[Any]
    schedulers: list[list[Scheduler]]
    newer_flags: tuple[str, ...]
    construction_error: object


def load() -> Any:
    """Returns PyTorch's module with the database."""
    profile = hypothesis.settings.get_current_profile_name()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_optimizers
    # The import has effects on the whole process, which are undone here.
    hypothesis.settings.load_profile(profile)
    vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
    return common_optimizers


@pytest.fixture(params=[pytest.param(3, id="some"), pytest.param(1, id="all", marks=pytest.mark.deep)])
def database(kind: type[RemoteOptimizer], request: pytest.FixtureRequest) -> Database:
    """The inputs: every third set of hyperparameters and scheduler in the fast tier, all of them in the deep one."""
    common = load()
    infos: list[Any] = common.optim_db
    info = next(info for info in infos if info.optim_cls is kind._torch_class)
    return Database(
        kwargs=lambda: [deepcopy(entry.kwargs) for entry in info.optim_inputs_func(device="cpu")[:: request.param]],
        errors=info.optim_error_inputs_func(device="cpu", dtype=torch.float32),
        schedulers=info.scheduler_inputs[:: request.param],
        newer_flags=info.not_og_supported_flags,
        construction_error=common.OptimizerErrorEnum.CONSTRUCTION_ERROR,
    )


class Regression:
    """A linear layer with ten outputs; the loss is the sum of their squares."""

    def __init__(self, contiguous: bool = True) -> None:
        if contiguous:
            self.weight, self.bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
        else:
            self.weight = nn.Parameter(torch.randn(10, 5, 2)[..., 0])
            self.bias = nn.Parameter(torch.randn(10, 2)[..., 0])
        self.input = torch.randn(5)

    def copy(self) -> "Regression":
        other = deepcopy(self)
        other.weight, other.bias = (nn.Parameter(p.detach().clone()) for p in (self.weight, self.bias))
        return other

    def loss(self, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss.detach()

    def run(self, optimizer: torch.optim.Optimizer, steps: int, schedulers: list[Any] | None = None) -> None:
        for _ in range(steps):
            loss = optimizer.step(functools.partial(self.loss, optimizer))  # type: ignore[arg-type]
            for scheduler in schedulers or []:
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))


def right_direction(before: Tensor, after: Tensor, kwargs: dict[str, Any]) -> bool:
    return bool(after > before if kwargs.get("maximize") else after < before)


def named(params: list[nn.Parameter], with_names: bool) -> list[Any]:
    return [(f"name{index}", param) for index, param in enumerate(params)] if with_names else list(params)


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@pytest.fixture
def remote(plain_remote: "Remote") -> "Remote":
    """Without overlap: test_overlap_results.py compares both bit for bit."""
    return plain_remote


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("database", [1], indirect=True)
def test_the_database_has_the_expected_inputs(database: Database) -> None:
    assert {} in database.kwargs()
    assert any("maximize" in kwargs for kwargs in database.kwargs())
    assert len(database.kwargs()) >= 5
    assert database.schedulers
    assert len(database.errors) >= 5
    assert not {"foreach", "fused", "differentiable"} & set().union(*database.kwargs())


def test_errors(database: Database, remote: "Remote") -> None:
    for error in database.errors:
        assert error.error_on == database.construction_error
        entry = error.optimizer_error_input
        params = [nn.Parameter(torch.randn(1, 1))] if entry.params is None else entry.params
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expected(error.error_type, match=error.error_regex):
            remote(params, **entry.kwargs)


@pytest.mark.parametrize("contiguous", [True, pytest.param(False, marks=pytest.mark.deep)])
@pytest.mark.parametrize("scheduled", [True, pytest.param(False, marks=pytest.mark.deep)])
def test_goes_right_direction(contiguous: bool, scheduled: bool, database: Database, remote: "Remote") -> None:
    for schedulers in database.schedulers if scheduled else [[]]:
        for kwargs in database.kwargs():  # anew, because a scheduler changes a tensor lr in place
            problem = Regression(contiguous)
            optimizer = remote([problem.weight, problem.bias], **kwargs)
            before = problem.loss(optimizer)
            problem.run(optimizer, 20, [make(optimizer) for make in schedulers])
            assert right_direction(before, problem.loss(optimizer), kwargs), kwargs


def test_param_group_with_lrscheduler_goes_right_direction(database: Database, remote: "Remote") -> None:
    for schedulers in database.schedulers:
        problem = Regression()
        optimizer = remote([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
        before = problem.loss(optimizer)
        problem.run(optimizer, 20, [make(optimizer) for make in schedulers])
        assert problem.loss(optimizer) < before


def test_param_groups_lr(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        problem, irrelevant = Regression(), nn.Parameter(torch.randn(2))
        before_all = irrelevant.detach().clone()
        group = {"lr": 1e-3, **kwargs, "params": [problem.weight, problem.bias]}
        optimizer = remote([group, {"params": [irrelevant]}], **{**kwargs, "lr": 1e-28})
        before = problem.loss(optimizer)
        for _ in range(20):
            irrelevant.grad = torch.rand_like(irrelevant)
            optimizer.step()
            problem.loss(optimizer)
        assert right_direction(before, problem.loss(optimizer), kwargs), kwargs
        assert equal(irrelevant.detach(), before_all)


def test_param_groups_weight_decay(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        problem = Regression()
        groups = [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **kwargs, "weight_decay": 0.0}]
        optimizer = remote(groups)
        before = problem.loss(optimizer)
        problem.run(optimizer, 20)
        assert right_direction(before, problem.loss(optimizer), kwargs), kwargs


@pytest.mark.parametrize("lr", [torch.tensor(0.001), torch.tensor([0.001]), torch.tensor([[[0.001]]])])
def test_tensor_lr(lr: Tensor, database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        one = Regression()
        two = one.copy()
        with_number = remote([one.weight, one.bias], **{**kwargs, "lr": lr.item()})
        with_tensor = remote([two.weight, two.bias], **{**kwargs, "lr": lr})
        for problem, optimizer in ((one, with_number), (two, with_tensor)):
            problem.run(optimizer, 5)
        assert equal((one.weight, one.bias), (two.weight, two.bias))


def test_step_is_noop_when_params_have_no_grad(database: Database, remote: "Remote") -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    for kwargs in database.kwargs():
        remote(params, **kwargs).step(lambda: 1.0)
        assert equal(params, before)


def test_step_is_noop_for_zero_grads(database: Database, remote: "Remote") -> None:
    """The weight decay of AdamW is not 0 by default."""
    param = nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    for kwargs in database.kwargs():
        if not kwargs.get("weight_decay"):
            optimizer = remote([param], **{**kwargs, "weight_decay": 0.0})
            param.grad = torch.zeros_like(param)
            optimizer.step(lambda: 1.0)
            assert equal(param.detach(), before)


@pytest.mark.parametrize("first_named", [True, pytest.param(False, marks=pytest.mark.deep)])
@pytest.mark.parametrize("second_named", [True, pytest.param(False, marks=pytest.mark.deep)])
def test_state_dict_deterministic(first_named: bool, second_named: bool, database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        one = Regression()
        first = remote(named([one.weight, one.bias], first_named), **kwargs)
        one.run(first, 10)
        two = one.copy()
        second = remote(named([two.weight, two.bias], second_named), **kwargs)
        second.load_state_dict(deepcopy(first.state_dict()))
        for _ in range(10):
            one.run(first, 1)
            two.run(second, 1)
            assert equal((one.weight, one.bias), (two.weight, two.bias))
        assert equal(without_names(first.state_dict()), without_names(second.state_dict()))
        # A group that is there twice has the same form twice.
        second.param_groups.extend(second.param_groups)
        assert equal(
            without_names(first.state_dict())["param_groups"][-1],
            without_names(second.state_dict())["param_groups"][-1],
        )


def test_can_load_older_state_dict(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        problem = Regression()
        optimizer = remote([problem.weight, problem.bias], **kwargs)
        problem.run(optimizer, 3)
        older = deepcopy(optimizer.state_dict())
        for group, flag in itertools.product(older["param_groups"], database.newer_flags):
            group.pop(flag, None)
        optimizer.load_state_dict(older)
        assert optimizer.state_dict()["param_groups"][0].keys() >= {*database.newer_flags} & {"maximize", "foreach"}
        problem.run(optimizer, 1)


def test_load_nontensor_step(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
        for param in params:
            param.grad = torch.rand_like(param)
        optimizer = remote(params, **kwargs)
        for _ in range(3):
            optimizer.step()
        state = deepcopy(optimizer.state_dict())
        entries = [entry for entry in state["state"].values() if "step" in entry]  # SGD counts no steps
        for entry in entries:
            entry["step"] = entry["step"].item()
        optimizer.load_state_dict(state)
        optimizer.step()
        steps = [entry["step"].item() for entry in optimizer.state_dict()["state"].values() if "step" in entry]
        assert steps == [4] * len(entries)


def mark(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["test"] = 1  # type: ignore[index]


def unmark(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    state["marked"] = state["state"].pop("test", None) is not None
    return state


def test_state_dict_hooks(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        before, after, both = (remote([torch.rand(2, 3)], **kwargs) for _ in range(3))
        before.register_state_dict_pre_hook(mark)
        assert before.state_dict()["state"]["test"] == 1
        after.register_state_dict_post_hook(unmark)
        assert after.state_dict()["marked"] is False
        both.register_state_dict_pre_hook(mark)
        both.register_state_dict_post_hook(unmark)
        state = both.state_dict()
        assert "test" not in state["state"]
        assert state["marked"] is True


def lower(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def replace(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    mine = deepcopy(state)
    mine["param_groups"][0]["lr"] = 0.003
    return mine


def note(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["replaced"] = optimizer.param_groups[0]["lr"] == 0.003  # type: ignore[index]


def test_load_state_dict_hooks(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        optimizer = remote([torch.rand(2, 3)], **kwargs)
        state = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(lower)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.002, "the hook that was registered first runs last"
        optimizer.register_load_state_dict_post_hook(note)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["replaced"] is False  # type: ignore[index]
        other = remote([torch.rand(2, 3)], **kwargs)
        other.register_load_state_dict_pre_hook(replace)
        other.register_load_state_dict_post_hook(note)
        other.load_state_dict(other.state_dict())
        assert other.state["replaced"] is True  # type: ignore[index]


def test_step_hooks(database: Database, remote: "Remote") -> None:
    for kwargs in database.kwargs():
        params = [torch.tensor([1.0, 1.0])]
        ours, other = remote(params, **kwargs), torch.optim.SGD(params)
        order: list[str] = []

        def hook(name: str, order: list[str] = order) -> Callable[..., None]:
            return lambda optimizer, args, kwargs: order.append(name)

        handles = [register_optimizer_step_pre_hook(hook("0")), register_optimizer_step_post_hook(hook("5"))]
        for optimizer in (ours, other):
            handles.append(optimizer.register_step_pre_hook(hook("1")))
            handles.append(optimizer.register_step_post_hook(hook("2")))
        for optimizer in (ours, other, ours):
            optimizer.step()
        assert "".join(order) == "0125" * 3
        for handle in handles:
            handle.remove()
        ours.step()
        assert len(order) == 12
