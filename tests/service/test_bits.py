"""The same pushes give the same bits, and those are close to the reference."""

import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import grpc
import numpy as np
import pytest
from messages import Vector, cut, push, sync
from numpy.typing import NDArray
from wire import Snapshot, Wire, streamed

from deltaserve._common.optimizer_messages import to_message
from deltaserve._common.optimizers import Adadelta
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.optimizers import reference

NAMES = ("Zoe", "0.a_-", "b" * 128)
SHAPES = {"w": (40, 7), "b": (20,)}
SIZE = 300
GROUPS = (Adadelta(lr=0.5, weight_decay=0.01), Adadelta(rho=0.95, eps=1e-4, maximize=True))
SENT = list(map(to_message, GROUPS))


def _gradient(seed: int, size: int = SIZE) -> Vector:
    """Returns values of very different magnitudes, so that another order of summation gives other bits."""
    source = np.random.default_rng(seed)
    return (source.standard_normal(size) * 10.0 ** source.integers(-4, 5, size)).astype(np.float32)


def _train(wire: Wire, model: str, joining: Sequence[str], arriving: Sequence[str], rounds: int = 3) -> Snapshot:
    """Trains with one worker for each name. A name determines its gradients, whatever the order."""
    weights = _gradient(99)
    wire.create(model, SHAPES, weights=weights, groups=SENT, group_of=[0, 1], policy=sync(len(NAMES)))
    sessions = {name: wire.open(model, name) for name in joining}
    for number in range(1, rounds + 1):
        calls = []
        for name in arriving:
            gradient = _gradient(NAMES.index(name) + 10 * number)
            calls.append(wire.begin(sessions[name].header(number), gradient))
        answers = [streamed(call) for call in calls]
        assert {answer.result.contributors for answer in answers} == {3}
    return wire.snapshot(model)


def _expected(rounds: int = 3) -> list[Vector]:
    """Returns the weights and the optimizer state, computed in float64."""
    parts = []
    for own, part in zip(GROUPS, (slice(0, 280), slice(280, 300)), strict=True):
        weights = _gradient(99)[part].astype(np.float64)
        slots: Sequence[NDArray[np.float64]] = [np.zeros_like(weights)] * 2
        for number in range(1, rounds + 1):
            mean = np.mean([_gradient(k + 10 * number)[part] for k in range(3)], axis=0, dtype=np.float64)
            slots, weights = reference.update(own, mean, slots, weights, number)
        parts.append((weights, *slots))
    return [np.concatenate(vector).astype(np.float32) for vector in zip(*parts, strict=True)]


def test_the_order_of_these_sums_shows() -> None:
    first, second, third = (_gradient(k) for k in range(3))
    assert ((first + second) + third).tobytes() != (first + (second + third)).tobytes()


@pytest.mark.parametrize("orders", [2, pytest.param(None, marks=pytest.mark.deep)], ids=["some orders", "all orders"])
def test_arrival_and_joining_in_any_order_give_the_same_bits(wire: Wire, orders: int | None) -> None:
    states = []
    for joining in list(permutations(NAMES))[:orders]:
        for arriving in list(permutations(reversed(NAMES)))[:orders]:
            state = _train(wire, "m", joining, arriving)
            wire.delete("m")
            states.append((state.vectors, state.version, state.update_counts))
    assert len(states) == (orders or 6) ** 2
    assert all(state == states[0] for state in states)


def test_a_late_member_of_the_round_changes_no_bit(wire: Wire) -> None:
    before = _train(wire, "m", NAMES, NAMES, rounds=1)
    wire.create("late", SHAPES, weights=_gradient(99), groups=SENT, group_of=[0, 1], policy=sync(3))
    calls = []
    for name in reversed(NAMES):
        session = wire.open("late", name)
        calls.append(wire.begin(session.header(1), _gradient(NAMES.index(name) + 10)))
    for call in calls:
        streamed(call)
    assert wire.snapshot("late").vectors == before.vectors


class Storm:
    """A worker that cuts, doubles, cancels and repeats its calls until each push has its answer.

    Args:
        wire: To the server.
        model: The model's name.
        name: The worker's, whose gradients are the name's.
    """

    def __init__(self, wire: Wire, model: str, name: str) -> None:
        self._wire = wire
        self._random = random.Random(name)
        self._seed = NAMES.index(name)
        self._session = wire.open(model, name)

    def run(self, rounds: int) -> None:
        """Makes this many steps."""
        for number in range(1, rounds + 1):
            while not self._answered(number):
                pass

    def _answered(self, number: int) -> bool:
        gradient = _gradient(self._seed + 10 * number)
        header = self._session.header(number)
        messages = list(push(header, cut(gradient, self._random.choice((40, 100, SIZE)))))
        match self._random.randrange(6):
            case 0:
                self._wire.start("StreamStep", messages[: self._random.randrange(len(messages))])
            case 1:
                self._wire.start("StreamStep", messages).cancel()
            case 2:
                doubled = [self._wire.start("StreamStep", messages) for _ in range(2)]
                return bool(sum(map(self._answer_of, doubled)))
            case 3 if number > 1:
                earlier = self._session.header(number - 1)
                again = self._wire.step(earlier, _gradient(self._seed + 10 * (number - 1)))
                assert (again.result.duplicate, again.result.version) == (True, number - 1)
            case _:
                return self._answer_of(
                    self._wire.start("StreamStep", messages, seconds=self._random.choice((0.01, 0.2)))
                )
        return False

    def _answer_of(self, call: Iterable[bytes]) -> bool:
        try:
            return streamed(call).result.contributors == 3
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            return False


def test_calls_that_are_cut_doubled_and_tried_again_change_no_bit(wire: Wire) -> None:
    rounds = 12
    calm = _train(wire, "calm", NAMES, NAMES, rounds)
    wire.create("m", SHAPES, weights=_gradient(99), groups=SENT, group_of=[0, 1], policy=sync(len(NAMES)))
    workers = [Storm(wire, "m", name) for name in NAMES]
    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(worker.run, rounds) for worker in workers]:
            done.result()
    state = wire.snapshot("m")
    assert (state.version, state.update_counts) == (rounds, (rounds, rounds))
    assert state.vectors == calm.vectors


def test_rounds_are_close_to_the_reference(wire: Wire) -> None:
    """The tolerance has an absolute part because sums of magnitudes that differ by 1e8 lose digits."""
    state = _train(wire, "m", NAMES, NAMES)
    for got, wanted in zip(state.arrays, _expected(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)


def test_a_hundred_steps_are_close_to_the_reference(wire: Wire) -> None:
    wire.create("m", SHAPES, groups=SENT, group_of=[0, 0])
    session = wire.open("m", "a")
    weights = np.zeros(SIZE)
    slots: Sequence[NDArray[np.float64]] = [weights] * 2
    for number in range(1, 101):
        gradient = np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)
        wire.step(session.header(number), gradient)
        slots, weights = reference.update(GROUPS[0], gradient, slots, weights, number)
    for vector, wanted in zip(wire.snapshot("m").arrays, (weights, *slots), strict=True):
        np.testing.assert_allclose(vector, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("policy", ["async", "sync"])
def test_chunks_of_any_size_give_the_same_bits(wire: Wire, policy: str) -> None:
    size = 1_201
    states = set()
    for chunk in (1, 13, 1024, size - 1, size):
        wire.create("m", {"w": (size,)}, weights=_gradient(1, size), policy=sync() if policy == "sync" else None)
        session = wire.open("m", "a")
        for number in (1, 2):
            steps = cut(_gradient(number, size), chunk if number == 1 or chunk > 1 else 64)
            answer = wire.stream_step(session.header(number), steps)
        state = wire.snapshot("m")
        assert answer.weights.tobytes() == state.vectors[0]
        states.add(state.vectors)
        wire.delete("m")
    assert len(states) == 1


def test_both_doors_give_the_same_bits(wire: Wire) -> None:
    for name in ("unary", "streamed"):
        wire.create(name, SHAPES, weights=_gradient(1), groups=SENT, group_of=[0, 1])
    unary, chunked = wire.open("unary", "a"), wire.open("streamed", "a")
    for number in range(1, 6):
        left = wire.step(unary.header(number), _gradient(number))
        right = wire.stream_step(chunked.header(number), cut(_gradient(number), number))
        assert left.weights.tobytes() == right.weights.tobytes()
    assert wire.snapshot("unary").vectors == wire.snapshot("streamed").vectors


def test_any_number_of_threads_gives_the_same_bits() -> None:
    size = 1_000_003
    states = set()
    for threads in (1, 2, 3):
        config = ServerConfig(bind="127.0.0.1:0", device="cpu", threads=threads)
        with LocalServer(config) as server, Wire(server.target) as wire:
            wire.create("m", {"w": (size,)}, weights=_gradient(1, size))
            session = wire.open("m", "a")
            for number, chunk in ((1, 1 << 18), (2, 99_991)):
                wire.stream_step(session.header(number), cut(_gradient(number, size), chunk))
            states.add(wire.snapshot("m").vectors)
    assert len(states) == 1
