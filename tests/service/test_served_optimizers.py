"""Models of every optimizer: what they tell of themselves, their state, and the bits of every policy's updates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from attach import Sharer
from expected import STRUCTURES, Twin, gradient, weighted_sum
from messages import Vector, adadelta, asynchronous, bounded, creation, floats, optimizer, pieces, replacement, sync
from wire import Session, Snapshot, Stepped, Wire, streamed, unchanged

from deltaserve._common.optimizer_messages import to_message
from deltaserve._common.optimizers import OPTIMIZERS, Adadelta, Adagrad, Optimizer
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve.v1.common_pb2 import REDUCTION_MEDIAN, REDUCTION_TRIMMED_MEAN, Policy, TensorSpec
from deltaserve.v1.model_service_pb2 import ExtendModelHeader, ExtendModelRequest
from deltaserve.v1.worker_service_pb2 import PUSH_STATE_NOT_ACCEPTED, StepRequest

SHAPES = {"w": (40, 7), "b": (21,)}
W, B = slice(0, 280), slice(280, 301)
SIZE = 301

every_optimizer = pytest.mark.parametrize("own", STRUCTURES.values(), ids=STRUCTURES)


def every_optimizer_under(policies: Mapping[str, Policy]) -> pytest.MarkDecorator:
    """Runs a test with every optimizer under every policy; in the fast tier under half of them, by turns."""
    combinations = [
        pytest.param(own, policy, id=f"{kind}-{name}", marks=[pytest.mark.deep] if (row + column) % 2 else [])
        for row, (kind, own) in enumerate(STRUCTURES.items())
        for column, (name, policy) in enumerate(policies.items())
    ]
    return pytest.mark.parametrize(("own", "policy"), combinations)


def _groups(own: Optimizer) -> list[Optimizer]:
    """Returns two groups with different numbers."""
    return [replace(own, weight_decay=0.01), replace(own, lr=own.lr / 2, maximize=True)]


def _create(wire: Wire, name: str, own: Optimizer, policy: Policy | None = None) -> None:
    groups = list(map(to_message, _groups(own)))
    wire.create(name, SHAPES, weights=gradient(0, SIZE), groups=groups, group_of=[0, 1], policy=policy)


# --- what a model tells


def test_the_server_lists_its_optimizers_and_the_default_is_the_first(wire: Wire) -> None:
    wire.create("m")
    assert list(wire.info().optimizers) == list(OPTIMIZERS)
    assert wire.info().optimizers[0] == wire.models()[0].optimizer == "adadelta"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_message_without_fields_means_the_defaults_and_all_are_told(wire: Wire, kind: str) -> None:
    wire.create("m", groups=[optimizer(kind)])
    (group,) = wire.model("m").config.groups
    told = getattr(group, kind)
    default = OPTIMIZERS[kind]()
    assert group.WhichOneof("kind") == wire.models()[0].optimizer == kind
    assert {name: getattr(told, name) for name in hyperparameters(default)} == {
        name: getattr(default, name) for name in hyperparameters(default)
    }
    assert all(told.HasField(field.name) for field in told.DESCRIPTOR.fields)


@every_optimizer
def test_a_new_model_has_the_initial_state_of_its_optimizer(wire: Wire, own: Optimizer) -> None:
    _create(wire, "m", own)
    state = wire.snapshot("m")
    assert state.slots == tuple(slot.name for slot in own.slots)
    Twin(gradient(0, SIZE), own).check(state)


def test_each_group_and_each_extension_has_its_own_initial_state(wire: Wire) -> None:
    groups = [optimizer("adagrad", initial_accumulator_value=value) for value in (0.25, 0.5)]
    wire.create("m", SHAPES, groups=groups, group_of=[0, 1])
    tensors = [TensorSpec(name="old group", shape=[2]), TensorSpec(name="new group", shape=[3], group=2)]
    added = [optimizer("adagrad", initial_accumulator_value=0.75)]
    header = ExtendModelHeader(model="m", tensor_count=2, group_count=2, tensors=tensors, groups=added)
    kind = ExtendModelRequest
    wire.call("ExtendModel", kind(header=header), *(kind(weights=piece) for piece in pieces(np.ones(5), SIZE)))
    expected = [0.25] * 280 + [0.5] * 21 + [0.25] * 2 + [0.75] * 3
    assert np.array_equal(wire.snapshot("m").slot("sum"), np.array(expected, np.float32))


# --- what a model keeps


def _others(own: Optimizer) -> list[Optimizer]:
    return [other for other in STRUCTURES.values() if other.structure != own.structure]


@every_optimizer
def test_numbers_of_a_model_change_and_its_optimizer_stays(wire: Wire, own: Optimizer) -> None:
    _create(wire, "m", own)
    before = list(wire.model("m").config.groups)
    changed = wire.update("m", [optimizer(own.kind, lr=0.125), optimizer(own.kind)]).config.groups
    assert getattr(changed[0], own.kind).lr == 0.125
    getattr(before[0], own.kind).lr = 0.125
    assert list(changed) == before, "what is not set stays, momentum and options too"
    with unchanged(wire, "m"):
        for other in _others(own):
            refused = wire.refused("CreateModel", *creation("m", groups=[to_message(other)]))
            assert refused.reason == "OPTIMIZER_MISMATCH"


@every_optimizer
def test_a_push_with_another_optimizer_leaves_its_number_free(wire: Wire, own: Optimizer) -> None:
    _create(wire, "m", own, sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(b.header(1), gradient(2, SIZE))
    for other in _others(own):
        header = a.header(1, hyperparameters=[to_message(own), to_message(other)])
        request = StepRequest(header=header, gradient=floats(gradient(1, SIZE)))
        assert wire.refused("Step", request).reason == "OPTIMIZER_MISMATCH"
    assert wire.fate(a, 1).state == PUSH_STATE_NOT_ACCEPTED
    answer = wire.step(a.header(1), gradient(1, SIZE))
    assert (answer.result.version, answer.result.contributors, answer.result.duplicate) == (1, 2, False)
    streamed(call)


# --- the bits of updates


class Twins:
    """What a model of two tensors must become, each tensor with its own group and its own number of updates.

    Args:
        own: The model's optimizer.
    """

    def __init__(self, own: Optimizer) -> None:
        parts = zip((W, B), _groups(own), strict=True)
        self._twins = [(part, Twin(gradient(0, SIZE)[part], group)) for part, group in parts]

    def update(self, total: Vector, divisor: float = 1.0, absent: Sequence[int] = (), damping: float = 1.0) -> None:
        """Makes an update of the tensors that are not absent."""
        for index, (part, twin) in enumerate(self._twins):
            if index not in absent:
                damped = replace(twin.optimizer, lr=twin.optimizer.lr / damping)
                twin.update(np.ascontiguousarray(total[part]), divisor, damped)

    def check(self, state: Snapshot) -> None:
        """Checks that a model has these vectors."""
        expected = zip(*(twin.vectors for _, twin in self._twins), strict=True)
        for got, wanted in zip(state.arrays, expected, strict=True):
            assert got.tobytes() == np.concatenate(wanted).tobytes()
        assert state.update_counts == tuple(twin.count for _, twin in self._twins)


ROUNDS = 4
ABSENT: dict[int, list[int]] = {2: [1]}
"""In the second round no push has a gradient of tensor b, so the tensors' numbers of updates differ from then on."""


def _step(
    wire: Wire, policy: Policy, sessions: Sequence[Session], number: int, gradients: Sequence[Vector]
) -> list[Stepped]:
    """Makes one push of each worker; under a synchronous policy that is a round."""
    absent, sent = ABSENT.get(number, []), slice(280 if number in ABSENT else SIZE)
    calls = []
    for session, values in zip(sessions, gradients, strict=True):
        base = number - 1 if policy.HasField("sync") else 3 * (number - 1)
        header = session.header(number, absent_tensors=absent, base_version=base)
        calls.append(wire.begin(header, values[sent]))
    return [streamed(call) for call in calls]


ROUND_POLICIES = {
    "mean": sync(3),
    "median": sync(3, reduction=REDUCTION_MEDIAN),
    "trimmed": sync(3, reduction=REDUCTION_TRIMMED_MEAN, trim=1),
    "clipped": sync(3, clip_norm=1.5),
}


UPDATE_POLICIES = {"async": asynchronous(), "damped": asynchronous(damping=True), "bounded": bounded(3)}


@every_optimizer_under(ROUND_POLICIES)
def test_a_round_has_the_bits_of_the_kernel(wire: Wire, own: Optimizer, policy: Policy) -> None:
    twins = Twins(own)
    _create(wire, "m", own, policy)
    sessions = [wire.open("m", worker) for worker in "abc"]
    for number in range(1, ROUNDS + 1):
        gradients = [gradient(10 * k + number, SIZE) for k in range(3)]
        if number in ABSENT:
            for values in gradients:
                values[B] = 0
        answers = _step(wire, policy, sessions, number, gradients)
        if policy.sync.reduction:  # a median or a trimmed mean: the middle one of three
            total, divisor = np.median(np.stack(gradients), axis=0), 1.0
        else:
            lengths = [answer.result.gradient_norm for answer in answers]
            clip = policy.sync.clip_norm if policy.sync.HasField("clip_norm") else np.inf
            total, divisor = weighted_sum(gradients, [min(1.0, clip / length) for length in lengths]), 3.0
        twins.update(total, divisor, ABSENT.get(number, []))
        assert {answer.result.version for answer in answers} == {number}
    twins.check(wire.snapshot("m"))


@every_optimizer_under(UPDATE_POLICIES)
def test_pushes_that_are_updates_have_the_bits_of_the_kernel(wire: Wire, own: Optimizer, policy: Policy) -> None:
    twins = Twins(own)
    _create(wire, "m", own, policy)
    sessions = [wire.open("m", worker) for worker in "abc"]
    for number in range(1, ROUNDS + 1):
        gradients = [gradient(10 * k + number, SIZE) for k in range(3)]
        answers = _step(wire, policy, sessions, number, gradients)
        assert [answer.result.staleness for answer in answers] == [0, 1, 2]
        for staleness, values in enumerate(gradients):
            damping = 1.0 + staleness if getattr(policy, "async").damping else 1.0
            twins.update(values, absent=ABSENT.get(number, []), damping=damping)
    twins.check(wire.snapshot("m"))


@every_optimizer
def test_shared_pushes_have_the_bits_of_the_kernel(wire: Wire, own: Optimizer) -> None:
    twins = Twins(own)
    _create(wire, "m", own)
    sharer = Sharer(wire, "m", "a")
    for number in range(1, ROUNDS + 1):
        absent = ABSENT.get(number, [])
        sharer.step(number, gradient(number, SIZE), absent_tensors=absent)
        twins.update(gradient(number, SIZE), absent=absent)
    twins.check(wire.snapshot("m"))


@every_optimizer
def test_a_push_s_own_numbers_apply_to_its_update_alone(wire: Wire, own: Optimizer) -> None:
    _create(wire, "m", own)
    session, twins = wire.open("m", "a"), Twins(own)
    wire.step(session.header(1), gradient(1, SIZE))
    sent = [optimizer(own.kind, lr=group.lr / 4) for group in _groups(own)]
    answer = wire.step(session.header(2, hyperparameters=sent), gradient(2, SIZE))
    assert [getattr(group, own.kind).lr for group in answer.result.hyperparameters] == [own.lr / 4, own.lr / 8]
    wire.step(session.header(3), gradient(3, SIZE))
    for number, damping in ((1, 1.0), (2, 4.0), (3, 1.0)):
        twins.update(gradient(number, SIZE), damping=damping)
    twins.check(wire.snapshot("m"))


# --- a state that is put


@every_optimizer
def test_a_state_that_is_pulled_and_put_into_another_model_goes_on_with_the_same_bits(
    wire: Wire, own: Optimizer
) -> None:
    for name in ("m", "copy"):
        _create(wire, name, own)
    original, copy = wire.open("m", "a"), wire.open("copy", "a")
    for number in (1, 2):
        wire.step(original.header(number), gradient(number, SIZE))
    state = wire.snapshot("m")
    wire.put("copy", state.arrays, state.update_counts, state.slots, chunk=100)
    for number in (3, 4):
        left = wire.step(original.header(number), gradient(number, SIZE))
        right = wire.step(copy.header(number - 2), gradient(number, SIZE))
        assert left.weights.tobytes() == right.weights.tobytes()
    assert wire.snapshot("m").vectors == wire.snapshot("copy").vectors
    assert wire.snapshot("m").update_counts == wire.snapshot("copy").update_counts == (4, 4)


SIGNED = {"momentum_buffer", "exp_avg", "grad_avg"}
"""The averages and sums of gradients. All others are of squares."""
LARGEST = float(np.finfo(np.float32).max)


@every_optimizer
def test_a_slot_takes_the_finite_values_that_it_can_have_and_no_others(wire: Wire, own: Optimizer) -> None:
    _create(wire, "m", own)
    names = [slot.name for slot in own.slots]

    def vectors(index: int, value: float) -> list[Vector]:
        made = [np.zeros(SIZE, np.float32) for _ in range(1 + len(names))]
        made[index][283] = value  # element 3 of tensor b
        return made

    for index, name in enumerate(names, start=1):
        negative = (-1e-45, -LARGEST)
        for value in (-0.0, 1e-45, LARGEST, *(negative if name in SIGNED else ())):
            wire.put("m", vectors(index, value), slots=names)
            assert wire.snapshot("m").arrays[index].tobytes() == vectors(index, value)[index].tobytes()
        with unchanged(wire, "m"):
            for value in (np.nan, np.inf, -np.inf):
                refused = wire.refused("PutState", *replacement("m", vectors(index, value), slots=names))
                assert (refused.reason, refused.metadata) == ("VALUE_NOT_FINITE", {"tensor": "b", "index": "3"})
            for value in () if name in SIGNED else negative:
                refused = wire.refused("PutState", *replacement("m", vectors(index, value), slots=names))
                expected = {"field": f"{name} of tensor b at element 3", "allowed": ">= 0"}
                assert (refused.reason, refused.metadata) == ("PUSH_INVALID", expected)


@every_optimizer
def test_the_largest_values_of_a_state_leave_it_finite(wire: Wire, own: Optimizer) -> None:
    _create(wire, "m", own)
    weights = np.full(SIZE, 1e19)
    slots = [np.full(SIZE, -LARGEST if slot.name in SIGNED else LARGEST) for slot in own.slots]
    wire.put("m", [weights, *slots], [1, 1 << 62], [slot.name for slot in own.slots])
    session = wire.open("m", "a")
    for number, scale in enumerate((1.8e19, -1.8e19, 0.0, 1e-30), start=1):
        wire.step(session.header(number), np.full(SIZE, scale))
        for vector in wire.snapshot("m").arrays:
            assert np.isfinite(vector).all()


def test_thousands_of_groups_have_one_optimizer_each_with_its_numbers(wire: Wire) -> None:
    count = 4096
    groups = [Adagrad(lr=1.0 + k, initial_accumulator_value=float(k)) for k in range(count)]
    shapes = {f"t{k}": (1,) for k in range(count)}
    wire.create("m", shapes, groups=list(map(to_message, groups)), group_of=range(count))
    answer = wire.step(wire.open("m", "a").header(1), np.ones(count))
    assert np.array_equal(wire.snapshot("m").slot("sum"), 1 + np.arange(count, dtype=np.float32))
    expected = -(1.0 + np.arange(count)) / np.sqrt(1.0 + np.arange(count))
    np.testing.assert_allclose(answer.weights, expected, rtol=1e-6)


def test_the_tested_structures_are_all_that_there_are() -> None:
    assert {own.kind for own in STRUCTURES.values()} == set(OPTIMIZERS)
    assert next(iter(STRUCTURES.values())) == Adadelta()
    assert to_message(Adadelta()) == adadelta(lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False)
    assert list(STRUCTURES) == [
        "adadelta",
        "sgd",
        "sgd with momentum, nesterov",
        "adagrad",
        "rmsprop",
        "rmsprop with momentum, centered",
        "adam",
        "adam with amsgrad",
        "adamw",
        "adamw with amsgrad",
        "lion",
    ]
