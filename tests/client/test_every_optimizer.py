"""Every optimizer through the client: models, steps, states, hyperparameters and what a model refuses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.optimizer_cases import STRUCTURES, identifier, over
from tests.support.states import assert_same_state

import deltaserve
from deltaserve import SGD, Adadelta, Adagrad, Adam, AdamW, Client, Optimizer, RMSprop, TensorSpec
from deltaserve._common.codec import Chunk
from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve._conversion import to_groups
from deltaserve._model import _take_state
from deltaserve.v1 import common_pb2, model_service_pb2, optimizers_pb2
from deltaserve_server.optimizers import reference

every = over(STRUCTURES)

SMALL, LARGE = 5, 700_000
"""Sizes of a model that fits into one message, and of one whose vectors take three chunks each."""

WEIGHTS: dict[str, Any] = {
    "a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.float32(7),
    "none": np.zeros((0, 4)),
}


def name_of(value: object) -> object:
    return identifier(value) if isinstance(value, Optimizer) else value


def gradients(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {name: rng.standard_normal(np.shape(values)) for name, values in WEIGHTS.items()}


@every
def test_a_model_says_which_optimizer_it_has(client: Client, optimizer: Optimizer) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=optimizer)
    assert model.groups == model.info().groups == client.model("m").groups == (optimizer,)
    assert client.models()[0].optimizer == optimizer.kind
    assert not client.create_model("m", WEIGHTS, optimizer=optimizer).created


def test_the_server_says_which_optimizers_it_has(client: Client) -> None:
    assert client.server_info().optimizers == tuple(OPTIMIZERS)


@every
def test_a_step_is_an_update_of_the_optimizer(client: Client, optimizer: Optimizer) -> None:
    check_steps(client, optimizer, SMALL)


def test_a_step_in_several_chunks_is_an_update(client: Client) -> None:
    check_steps(client, Adadelta(lr=0.7, weight_decay=0.01), LARGE)


def check_steps(client: Client, optimizer: Optimizer, size: int) -> None:
    """Compares three steps with the reference."""
    rng = np.random.default_rng(1)
    start = rng.standard_normal(size).astype(np.float32)
    model = client.create_model("m", {"w": start}, optimizer=optimizer)
    slots: Any = [np.full(size, slot.initial) for slot in optimizer.slots]
    x = start.astype(np.float64)
    with model.worker() as worker:
        for step in range(1, 4):
            gradient = rng.standard_normal(size).astype(np.float32)
            got = worker.step({"w": gradient})["w"]
            slots, x = reference.update(optimizer, gradient, slots, x, step)
            np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)
            result = worker.last_result
            assert result is not None
            assert (result.version, result.duplicate, result.staleness, result.contributors) == (step, False, 0, 1)
            assert result.hyperparameters == (optimizer,)
            assert worker.version == step


@every
def test_a_state_is_pulled_and_put_back(client: Client, optimizer: Optimizer) -> None:
    """A put state has the pulled bits, its slots have the names of the optimizer, and training goes on from it."""
    model = client.create_model("m", WEIGHTS, optimizer=optimizer)
    twin = client.create_model("twin", WEIGHTS, optimizer=optimizer)
    with model.worker() as worker, twin.worker() as other:
        for number in range(3):
            worker.step(gradients(number))
        kept = model.pull_state()
        assert kept.slots is not None
        assert list(kept.slots) == [slot.name for slot in optimizer.slots]
        assert all(list(tensors) == list(WEIGHTS) for tensors in kept.slots.values())
        twin.put_state(kept)
        assert_same_state(twin.pull_state(), kept)
        for number in range(3, 5):
            worker.step(gradients(number))
            other.pull()
            other.step(gradients(number))
    assert_same_state(twin.pull_state(), model.pull_state())


@every
def test_a_large_state_is_pulled_and_put_back(client: Client, optimizer: Optimizer) -> None:
    """No chunk crosses two vectors, and the server refuses one that does, so this shows the offsets of all of them."""
    rng = np.random.default_rng(2)
    start = {"a": rng.standard_normal(300_000, np.float32), "b": rng.standard_normal(1, np.float32)}
    model = client.create_model("m", start, optimizer=optimizer)
    slots = {slot.name: {name: abs(values) for name, values in start.items()} for slot in optimizer.slots}
    slots = {slot: {name: values * (k + 2) for name, values in slots[slot].items()} for k, slot in enumerate(slots)}
    state = deltaserve.ModelState(version=0, weights=start, slots=slots, update_counts={"a": 3, "b": 0})
    model.put_state(state)
    assert_same_state(model.pull_state(), state)


@every
def test_a_state_without_slots_is_that_before_the_first_update(client: Client, optimizer: Optimizer) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=optimizer)
    initial = model.pull_state()
    assert initial.slots is not None
    for slot in optimizer.slots:
        assert all((values == slot.initial).all() for values in initial.slots[slot.name].values())
    with model.worker() as worker:
        worker.step(gradients(1))
    state = model.pull_state(optimizer_state=False)
    assert (state.slots, state.update_counts) == (None, dict.fromkeys(WEIGHTS, 1))
    model.put_state(replace(state, weights=initial.weights))
    assert_same_state(model.pull_state(), initial)


def test_each_group_has_its_own_initial_state(client: Client) -> None:
    groups = [Adagrad(initial_accumulator_value=value) for value in (0.5, 0.1)]
    model = client.create_model("m", WEIGHTS, groups=groups, group_of={"b": 1})
    state = model.pull_state()
    assert model.extend({"c": np.ones(2)}, groups=[Adagrad(initial_accumulator_value=2.0)], group_of={"c": 2})
    extended = model.pull_state()
    model.put_state(replace(extended, slots=None))
    assert state.slots is not None
    assert extended.slots is not None
    for slots in (state.slots, extended.slots):
        assert (slots["sum"]["a"] == 0.5).all()
        assert slots["sum"]["b"] == np.float32(0.1)
    assert (extended.slots["sum"]["c"] == 2).all()
    assert_same_state(model.pull_state(), extended)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"slots": {"exp_avg": WEIGHTS}}, "slots: expected exp_avg, exp_avg_sq, got exp_avg"),
        ({"slots": {}}, "slots: expected exp_avg, exp_avg_sq, got none"),
        (
            {"slots": {"exp_avg": WEIGHTS, "exp_avg_sq": WEIGHTS, "momentum_buffer": WEIGHTS}},
            "slots: expected exp_avg, exp_avg_sq, got exp_avg, exp_avg_sq, momentum_buffer",
        ),
        ({"slots": {"exp_avg": WEIGHTS, "exp_avg_sq": {"a": WEIGHTS["a"]}}}, "exp_avg_sq: tensor b is missing"),
        (
            {"slots": {"exp_avg": WEIGHTS | {"c": np.zeros(1)}, "exp_avg_sq": WEIGHTS}},
            "exp_avg: the model has no tensor named c",
        ),
        ({"weights": WEIGHTS | {"c": np.zeros(1)}}, "weights: the model has no tensor named c"),
        ({"weights": WEIGHTS | {"b": np.zeros(1)}}, r"weights: tensor b has shape \(1,\), not \(\)"),
        ({"update_counts": {"c": 1}}, "update_counts: the model has no tensor named c"),
        ({"update_counts": {"a": 1}}, "update_counts: tensor b is missing"),
        ({"update_counts": {}}, "update_counts: tensor a is missing"),
    ],
)
def test_a_state_with_other_names_is_refused_before_it_is_sent(
    client: Client, change: dict[str, Any], text: str
) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=Adam())
    with pytest.raises(ValueError, match=f"^{text}$"):
        model.put_state(replace(model.pull_state(), **change))
    assert model.info().version == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"slots": {"exp_avg": WEIGHTS, "exp_avg_sq": None}},
            "exp_avg_sq: expected a mapping by tensor name, got None",
        ),
        (
            {"slots": {"exp_avg": WEIGHTS, "exp_avg_sq": WEIGHTS | {"a": None}}},
            "exp_avg_sq: tensor a: expected real numbers, got object",
        ),
        ({"weights": None}, "weights: expected a mapping by tensor name, got None"),
        ({"update_counts": None}, "update_counts: expected a mapping by tensor name, got None"),
    ],
)
def test_a_state_of_other_types_is_refused_before_it_is_sent(client: Client, change: dict[str, Any], text: str) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=Adam())
    with pytest.raises(TypeError, match=f"^{text}$"):
        model.put_state(replace(model.pull_state(), **change))
    assert model.info().version == 0


def test_slots_may_come_in_any_order(client: Client) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=Adam())
    with model.worker() as worker:
        worker.step(gradients(1))
    state = model.pull_state()
    assert state.slots is not None
    model.put_state(replace(state, slots=dict(reversed(list(state.slots.items())))))
    assert_same_state(model.pull_state(), state)


def test_a_state_may_be_negative_where_the_optimizer_says_so(client: Client) -> None:
    model = client.create_model("m", {"w": np.ones(1)}, optimizer=Adam())
    below = {"w": np.full(1, -1, np.float32)}
    slots = {"exp_avg": below, "exp_avg_sq": {"w": np.ones(1, np.float32)}}
    state = deltaserve.ModelState(version=0, weights=below, slots=slots, update_counts={"w": 1})
    model.put_state(state)
    assert_same_state(model.pull_state(), state)
    with pytest.raises(deltaserve.RequestError, match="exp_avg_sq") as caught:
        model.put_state(replace(state, slots=slots | {"exp_avg_sq": below}))
    assert caught.value.reason == "PUSH_INVALID"
    assert model.info().version == 1


@pytest.mark.parametrize(
    ("optimizer", "other", "expected", "got"),
    [
        (Adadelta(), Adam(), "adadelta", "adam"),
        (AdamW(), Adam(), "adamw", "adam"),
        (Adam(), Adam(amsgrad=True), "adam", "adam with amsgrad"),
        (SGD(momentum=0.9), SGD(), "sgd with momentum", "sgd"),
        (SGD(momentum=0.9), SGD(momentum=0.9, nesterov=True), "sgd with momentum", "sgd with momentum, nesterov"),
        (RMSprop(centered=True), RMSprop(momentum=0.5), "rmsprop with centered", "rmsprop with momentum"),
    ],
    ids=name_of,
)
def test_another_optimizer_than_the_models_is_refused(
    client: Client, optimizer: Optimizer, other: Optimizer, expected: str, got: str
) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=optimizer)
    calls: list[Any] = [
        lambda: client.create_model("m", WEIGHTS, optimizer=other),
        lambda: model.update(groups=[other]),
        lambda: model.extend({"c": np.ones(2)}, groups=[other], group_of={"c": 1}),
    ]
    with model.worker() as worker:
        for call in [*calls, lambda: worker.step(gradients(1), hyperparameters=[other])]:
            with pytest.raises(deltaserve.ConflictError) as caught:
                call()
            assert caught.value.reason == "OPTIMIZER_MISMATCH"
            assert caught.value.metadata == {"model": "m", "expected": expected, "got": got}
            assert f"{expected}, not {got}" in str(caught.value)
        worker.step(gradients(1))
    assert model.info().version == 1
    assert model.groups == model.info().groups == (optimizer,)


def test_groups_of_a_model_have_one_optimizer(client: Client) -> None:
    for groups in ([Adadelta(), Adam()], [Adam(), Adam(amsgrad=True)], [SGD(momentum=0.5), SGD()]):
        with pytest.raises(deltaserve.RequestError) as caught:
            client.create_model("m", WEIGHTS, groups=groups)
        assert caught.value.reason == "HYPERPARAMETER_INVALID"
        assert caught.value.metadata["field"] == "groups[1]"
    assert client.models() == []


@pytest.mark.parametrize("given", [Adam, "adam", 0.1, {"lr": 0.1}, None], ids=str)
def test_an_object_that_is_no_optimizer_is_refused(client: Client, given: Any) -> None:
    with pytest.raises(TypeError, match=r"expected an optimizer, such as Adadelta\(\.\.\.\)"):
        client.create_model("m", WEIGHTS, groups=[given])
    if given is not None:
        with pytest.raises(TypeError, match="expected an optimizer"):
            client.create_model("m", WEIGHTS, optimizer=given)
    assert client.models() == []


def test_one_of_optimizer_and_groups_is_given(client: Client) -> None:
    with pytest.raises(ValueError, match="optimizer, groups: give one of them"):
        client.create_model("m", WEIGHTS, optimizer=Adam(), groups=[Adam()])
    assert client.create_model("none", WEIGHTS).groups == (Adadelta(),)
    assert client.create_model("empty", WEIGHTS, groups=[]).groups == (Adadelta(),)


@pytest.mark.parametrize(
    ("optimizer", "field"),
    [
        (Adadelta(rho=1 + 1e-10), "rho"), (SGD(lr=-1.0), "lr"), (SGD(nesterov=True), "nesterov"),
        (Adagrad(eps=0.0), "eps"), (RMSprop(alpha=-0.1), "alpha"), (Adam(beta1=1.0), "beta1"),
        (Adam(beta2=float("nan")), "beta2"),
        (AdamW(weight_decay=float("inf")), "weight_decay"), (Adam(eps=1e-60), "eps"),
    ],
    ids=name_of,
)  # fmt: skip
def test_a_hyperparameter_out_of_range_is_named(client: Client, optimizer: Optimizer, field: str) -> None:
    with pytest.raises(deltaserve.RequestError, match=field) as caught:
        client.create_model("m", WEIGHTS, optimizer=optimizer)
    assert caught.value.reason == "HYPERPARAMETER_INVALID"
    assert caught.value.metadata["field"] == field


@every
def test_groups_are_updated_as_models_of_their_own(client: Client, optimizer: Optimizer) -> None:
    """Two groups with different values give the bits of two models; tensors without a gradient differ in count."""
    groups = [optimizer, replace(optimizer, lr=optimizer.lr / 4)]
    both = client.create_model("both", {"a": np.ones(40), "b": np.ones(3)}, groups=groups, group_of={"b": 1})
    one = client.create_model("one", {"a": np.ones(40)}, optimizer=groups[0])
    two = client.create_model("two", {"b": np.ones(3)}, optimizer=groups[1])
    rng = np.random.default_rng(3)
    with both.worker() as w, one.worker() as w1, two.worker() as w2:
        for number in range(4):
            a, b = rng.standard_normal(40), None if number in (0, 2) else rng.standard_normal(3)
            w.step({"a": a, "b": b})
            w1.step({"a": a})
            w2.step({"b": b})
    whole, first, second = both.pull_state(), one.pull_state(), two.pull_state()
    assert whole.update_counts == {"a": 4, "b": 2} == {**first.update_counts, **second.update_counts}
    assert whole.slots is not None
    assert first.slots is not None
    assert second.slots is not None
    slots = {name: {**first.slots[name], **second.slots[name]} for name in whole.slots}
    assert_same_state(whole, replace(whole, weights={**first.weights, **second.weights}, slots=slots))


@every
def test_a_push_carries_its_own_hyperparameters(client: Client, optimizer: Optimizer) -> None:
    """A schedule that each push carries gives the bits of one that the model is told of."""
    carried = client.create_model("carried", WEIGHTS, optimizer=optimizer)
    told = client.create_model("told", WEIGHTS, optimizer=optimizer)
    with carried.worker() as worker, told.worker() as other:
        for number in range(3):
            scheduled = replace(optimizer, lr=optimizer.lr / (number + 1))
            told.update(groups=[scheduled])
            worker.step(gradients(number), hyperparameters=[scheduled])
            other.step(gradients(number))
            assert worker.last_result is not None
            assert worker.last_result.hyperparameters == (scheduled,) == told.groups
    assert carried.info().groups == (optimizer,)
    assert_same_state(carried.pull_state(), told.pull_state())


@every
def test_a_model_is_extended_with_groups(client: Client, optimizer: Optimizer) -> None:
    model = client.create_model("m", {"a": np.ones(3)}, optimizer=optimizer)
    added = replace(optimizer, lr=0.0)
    with model.worker() as worker:
        worker.step({"a": np.ones(3)})
    assert model.extend({"b": np.ones(2)}, groups=[added], group_of={"b": 1})
    assert model.groups == model.info().groups == (optimizer, added)
    assert model.tensors == (TensorSpec("a", (3,)), TensorSpec("b", (2,), 1))
    with model.worker() as worker:
        weights = worker.step({"a": np.ones(3), "b": np.ones(2)})
    assert (weights["b"] == 1).all()
    assert model.pull_state().update_counts == {"a": 2, "b": 1}


def test_a_change_of_lr_is_not_a_change_of_the_optimizer(client: Client) -> None:
    model = client.create_model("m", WEIGHTS, optimizer=SGD(momentum=0.9))
    model.update(groups=[SGD(lr=0.5, momentum=0.1, dampening=0.3)])
    assert client.model("m").groups == (SGD(lr=0.5, momentum=0.1, dampening=0.3),)


def test_no_hyperparameters_make_a_state_that_is_refused(client: Client) -> None:
    """An infinite step and an infinite buffer of opposite signs would add up to NaN."""
    model = client.create_model("m", {"w": np.zeros(2)}, optimizer=RMSprop(lr=0, alpha=1, eps=1e-45, momentum=10))
    slots = {"square_avg": {"w": np.zeros(2, np.float32)}, "momentum_buffer": {"w": np.array([3e38, -3e38], "f4")}}
    model.put_state(replace(model.pull_state(), slots=slots))
    with model.worker() as worker:
        worker.step({"w": [-1e19, 1e19]})
    model.put_state(model.pull_state())
    assert model.info().version == 3


@pytest.mark.parametrize("offset", [0, 5, 6, 17, 18, 1 << 40, (1 << 64) - 1])
def test_a_state_of_nonsense_is_written_within_its_arrays(offset: int) -> None:
    """Six elements of a model with five in each of three vectors, wherever they are said to belong."""
    tensors = [common_pb2.TensorSpec(name="a", shape=[5]), common_pb2.TensorSpec(name="none", shape=[0, 2])]
    config = common_pb2.ModelConfig(tensors=tensors)
    header = model_service_pb2.PullStateHeader(config=config, slots=["s", "t"], update_counts=[1, 1])
    whole = Chunk("state", 0, np.zeros(15, "<f4").data.cast("B"))
    chunk = Chunk("state", offset, np.arange(1, 7, dtype="<f4").data.cast("B"))
    state = _take_state(header, [whole, chunk], optimizer_state=True)
    assert state.slots is not None
    assert list(state.slots) == ["s", "t"]
    flat = np.concatenate([tensors["a"] for tensors in (state.weights, *state.slots.values())])
    expected = np.zeros(15, np.float32)
    written = max(0, min(6, 15 - offset))
    expected[offset : offset + written] = np.arange(1, 1 + written)
    np.testing.assert_array_equal(flat, expected)


def test_an_optimizer_of_a_newer_server_is_named() -> None:
    newer = optimizers_pb2.Optimizer.FromString(b"\xfa\x01\x00")  # field 31, an empty message
    for message, got in ((newer, "field 31"), (optimizers_pb2.Optimizer(), "field none")):
        with pytest.raises(deltaserve.Error, match=f"expected adadelta, sgd, .*, got {got}"):
            to_groups([message])
