"""PullState, PutState and ExtendModel, also during pushes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Event

import numpy as np
import pytest
from messages import adadelta, cut, pieces, push, replacement, sync
from wire import Snapshot, Wire, eventually, pulled, streamed, unchanged

from deltaserve.v1.common_pb2 import TensorSpec
from deltaserve.v1.model_service_pb2 import (
    ExtendModelHeader,
    ExtendModelRequest,
    PullStateRequest,
)
from deltaserve.v1.optimizers_pb2 import Optimizer
from deltaserve.v1.worker_service_pb2 import PullRequest, PullResponse

ONES = np.ones(5, np.float32)


def extend(
    wire: Wire,
    model: str,
    sizes: dict[str, int],
    at: tuple[int, int, int],
    groups: Sequence[Optimizer] = (),
) -> bool:
    """Calls ExtendModel with vectors of ones. `at` is the number of tensors, groups and elements before."""
    tensors = [TensorSpec(name=name, shape=[size], group=at[1] if groups else 0) for name, size in sizes.items()]
    header = ExtendModelHeader(model=model, tensor_count=at[0], group_count=at[1], tensors=tensors, groups=groups)
    messages = [ExtendModelRequest(header=header)]
    messages += [ExtendModelRequest(weights=piece) for piece in pieces(np.ones(sum(sizes.values())), at[2], size=2)]
    return bool(wire.one("ExtendModel", *messages).extended)


# --- pulling


def test_a_pull_is_answered_not_modified_unless_there_is_something_newer(wire: Wire) -> None:
    wire.create("m", weights=np.arange(5))
    session = wire.open("m", "a")
    header, weights = wire.pull("m")
    assert (header.position.version, header.not_modified, header.element_count) == (0, False, 5)
    assert np.array_equal(weights, np.arange(5, dtype=np.float32))
    for known in (0, 1, 1 << 63):
        assert wire.pull("m", newer_than=known)[0].not_modified
    wire.step(session.header(1), ONES)
    assert wire.pull("m", newer_than=0)[1].size == 5
    header, weights = wire.pull("m", newer_than=1)
    assert (header.not_modified, header.element_count, weights.size) == (True, 0, 0)


def test_a_pull_waits_for_a_version(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    call = wire.start("Pull", [PullRequest(model="m", wait_for_version=2)])
    wire.step(session.header(1), ONES)
    assert not call.done()
    wire.step(session.header(2), ONES)
    assert pulled(call)[0].position.version == 2
    assert wire.pull("m", wait_for_version=2)[0].position.version == 2
    call = wire.start("Pull", [PullRequest(model="m", wait_for_version=3)])
    wire.put("m", [ONES] * 3)
    assert pulled(call)[0].position.version == 3


def test_weights_alone_may_be_pulled(wire: Wire) -> None:
    wire.create("m", weights=np.arange(5))
    answer = wire.call("PullState", PullStateRequest(model="m"))
    assert [message.WhichOneof("message") for message in answer] == ["header", "state"]


def test_a_state_pulled_during_updates_is_of_one_version(wire: Wire) -> None:
    """All elements have the same gradients, so the elements of one version are equal."""
    size = 300_000
    wire.create("m", {"w": (size,)})
    stop = Event()

    def work(name: str) -> None:
        session, number = wire.open("m", name), 0
        while not stop.is_set():
            number += 1
            answer = wire.stream_step(session.header(number), cut(np.full(size, float(number % 7) - 3)))
            assert np.ptp(answer.weights) == 0
            seen(answer.position.version, answer.weights[0])

    values: dict[int, float] = {}

    def seen(version: int, value: float) -> None:
        assert values.setdefault(version, value) == value

    with ThreadPoolExecutor() as threads:
        workers = [threads.submit(work, name) for name in "ab"]
        for _ in range(15):
            state = _vectors(wire)
            assert all(np.ptp(vector) == 0 for vector in state.arrays)
            seen(state.version, state.weights[0])
            assert state.update_counts == (state.version,)
            header, weights = wire.pull("m")
            assert np.ptp(weights) == 0
            seen(header.position.version, weights[0])
        stop.set()
        for worker in workers:
            worker.result()
    assert len(values) > 10


def _vectors(wire: Wire) -> Snapshot:
    return wire.snapshot("m")


def test_a_slow_reader_keeps_its_version(wire: Wire) -> None:
    size = 2_000_000
    wire.create("m", {"w": (size,)})
    session = wire.open("m", "a")
    before = wire.info().limits.memory_available_bytes
    slow = [wire.start("Pull", [PullRequest(model="m")])]
    first = next(slow[0])  # the version that it reads is part of the model's own memory
    for number in range(1, 4):
        wire.stream_step(session.header(number), cut(np.ones(size)))
    slow.append(wire.start("Pull", [PullRequest(model="m")]))
    second = next(slow[1])  # only now is it sure which version it reads
    eventually(lambda: wire.info().limits.memory_available_bytes == before - 4 * size, "the version is not held")
    wire.stream_step(session.header(4), cut(np.ones(size)))
    assert PullResponse.FromString(first).header.position.version == 0
    chunks = [PullResponse.FromString(message).weights.data for message in slow[0]]
    assert not np.frombuffer(b"".join(chunks), "<f4").any()
    header, weights = pulled(chain([second], slow[1]))
    assert header.position.version == 3
    assert weights.all()
    assert wire.pull("m")[1].all()
    eventually(lambda: wire.info().limits.memory_available_bytes == before, "a version is still held")


# --- putting


def test_put_state_replaces_the_whole_state_and_makes_a_version(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.step(session.header(1), ONES)
    vectors = [np.arange(5) - 2, np.arange(5) + 1, np.arange(5) / 8]
    assert wire.put("m", vectors, counts=(7, (1 << 63) - 1), chunk=2) == 2
    state = wire.snapshot("m")
    assert (state.version, state.update_counts) == (2, (7, (1 << 63) - 1))
    for got, wanted in zip(state.arrays, vectors, strict=True):
        assert np.array_equal(got, wanted.astype(np.float32))
    assert wire.step(session.header(2), ONES).result.version == 3
    assert wire.snapshot("m").update_counts == (8, 1 << 63)
    assert wire.put("m", vectors) == 4
    assert wire.snapshot("m").update_counts == (0, 0)


def test_a_state_that_is_pulled_and_put_back_goes_on_with_the_same_bits(wire: Wire) -> None:
    for name in ("m", "copy"):
        wire.create(name, weights=np.arange(5))
    original, copy = wire.open("m", "a"), wire.open("copy", "a")
    wire.step(original.header(1), ONES)
    state = wire.snapshot("m")
    wire.put("copy", state.arrays, state.update_counts)
    for number in range(1, 5):
        gradient = np.random.default_rng(number).standard_normal(5)
        left = wire.step(original.header(number + 1), gradient)
        right = wire.step(copy.header(number), gradient)
        assert left.weights.tobytes() == right.weights.tobytes()
    assert wire.snapshot("m").vectors == wire.snapshot("copy").vectors
    assert wire.snapshot("m").update_counts == wire.snapshot("copy").update_counts


def test_a_push_that_waits_for_its_round_stays_when_a_state_is_put(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), ONES)
    assert wire.put("m", [np.full(5, 10.0), np.ones(5), np.ones(5)], counts=(3, 3)) == 1
    assert wire.waiting("m") == {"a"}
    answer = wire.step(b.header(1, base_version=1), 3 * ONES)
    assert (answer.result.version, answer.result.contributors, answer.result.staleness) == (2, 2, 0)
    assert streamed(call).result.staleness == 1
    state = wire.snapshot("m")
    assert state.update_counts == (4, 4)
    np.testing.assert_allclose(state.square_avg, 0.9 + 0.1 * 4, rtol=1e-6)
    np.testing.assert_allclose(state.weights, 10 - np.sqrt(1 + 1e-6) / np.sqrt(1.3 + 1e-6) * 2, rtol=1e-6)


# --- extending


def test_a_model_is_extended_and_old_sessions_go_on(wire: Wire) -> None:
    wire.create("m", weights=np.zeros(5))
    old = wire.open("m", "old")
    wire.step(old.header(1), ONES)
    assert extend(wire, "m", {"new": 3, "none": 0}, (2, 1, 5), [adadelta(lr=0.5)])
    with unchanged(wire, "m"):
        assert not extend(wire, "m", {"new": 3, "none": 0}, (2, 1, 5), [adadelta(lr=0.5)])
    state = wire.snapshot("m")
    assert (state.version, state.update_counts) == (1, (1, 1, 0, 0))
    assert np.array_equal(state.weights[5:], [1, 1, 1])
    new = wire.open("m", "new")
    assert (old.opened.tensor_count, new.opened.tensor_count) == (2, 4)
    answer = wire.step(old.header(2), ONES)
    assert answer.weights.size == 5
    assert [group.adadelta.lr for group in answer.result.hyperparameters] == [1.0, 0.5]
    assert wire.snapshot("m").update_counts == (2, 2, 0, 0)
    answer = wire.stream_step(new.header(1), cut(np.ones(8), 3))
    assert answer.weights.size == 8
    assert wire.snapshot("m").update_counts == (3, 3, 1, 1)
    old_with_its_own = wire.step(old.header(3, hyperparameters=[adadelta(lr=2.0)]), ONES)
    assert [group.adadelta.lr for group in old_with_its_own.result.hyperparameters] == [2.0, 0.5]


def test_an_extension_is_idempotent_after_later_extensions_too(wire: Wire) -> None:
    wire.create("m")
    assert extend(wire, "m", {"x": 2}, (2, 1, 5))
    assert extend(wire, "m", {"y": 2}, (3, 1, 7))
    with unchanged(wire, "m"):
        assert not extend(wire, "m", {"x": 2}, (2, 1, 5))
        assert not extend(wire, "m", {"x": 2, "y": 2}, (2, 1, 5))
        assert not extend(wire, "m", {}, (4, 1, 9))


def test_concurrent_equal_extensions_agree_and_leak_no_memory(wire: Wire) -> None:
    wire.create("m")
    before = wire.info().limits.memory_available_bytes
    with ThreadPoolExecutor() as threads:
        for number in range(20):
            at = (2 + number, 1, 5 + 2 * number)
            answers = threads.map(lambda _, n=number, a=at: extend(wire, "m", {f"x{n}": 2}, a), range(3))
            assert sorted(answers) == [False, False, True]
    assert wire.model("m").config.tensors[-1].name == "x19"
    held = 24 * 2 * 20
    eventually(lambda: wire.info().limits.memory_available_bytes == before - held, "an extension holds too much")
    wire.delete("m")
    limits = wire.info().limits
    assert limits.memory_available_bytes == limits.memory_bytes


def test_an_open_round_continues_when_the_model_is_extended(wire: Wire) -> None:
    wire.create("m", policy=sync(3))
    a, c = wire.open("m", "a"), wire.open("m", "c")
    calls = [wire.begin(a.header(1), ONES), wire.begin(c.header(1), ONES)]
    extend(wire, "m", {"x": 3}, (2, 1, 5))
    b = wire.open("m", "b")
    assert b.opened.first_version == 0
    answer = wire.step(b.header(1), np.full(8, 4.0))
    assert (answer.result.contributors, answer.weights.size) == (3, 8)
    assert [streamed(call).weights.size for call in calls] == [5, 5]
    state = wire.snapshot("m")
    np.testing.assert_allclose(state.square_avg[:5], 0.1 * 2.0**2, rtol=1e-6)
    np.testing.assert_allclose(state.square_avg[5:], 0.1 * (4 / 3) ** 2, rtol=1e-6)
    assert state.update_counts == (1, 1, 1)


@pytest.mark.parametrize("reduced", [1, 2])
def test_pushes_folded_before_an_extension_are_in_the_update_after_it(wire: Wire, reduced: int) -> None:
    wire.create("m", policy=sync())
    sessions = [wire.open("m", name) for name in "abc"[: reduced + 1]]
    calls = [wire.begin(session.header(1), ONES) for session in sessions[:reduced]]
    extend(wire, "m", {"x": 3}, (2, 1, 5))
    answer = wire.step(sessions[-1].header(1), ONES)
    assert {streamed(call).result.version for call in calls} == {answer.result.version} == {1}
    state = wire.snapshot("m")
    np.testing.assert_allclose(state.square_avg, [0.1] * 5 + [0.0] * 3, rtol=1e-6)
    assert np.array_equal(state.weights[5:], np.ones(3, np.float32))
    assert state.update_counts == (1, 1, 0)


def test_a_push_in_flight_continues_when_its_model_is_extended(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")

    def feed() -> Iterator[bytes]:
        header, first, *rest = push(session.header(1), cut(ONES, 2))
        yield from (header, first)
        extend(wire, "m", {"x": 3}, (2, 1, 5))
        yield from rest

    answer = streamed(wire.start("StreamStep", feed()))
    assert (answer.result.version, answer.weights.size) == (1, 5)
    assert wire.snapshot("m").update_counts == (1, 1, 0)


@pytest.mark.parametrize("cancelled", ["ExtendModel", "PutState"])
def test_half_an_upload_changes_nothing(wire: Wire, cancelled: str) -> None:
    wire.create("m", {"w": (500_000,)})
    stop = Event()
    extension = ExtendModelHeader(
        model="m", tensor_count=1, group_count=1, tensors=[TensorSpec(name="x", shape=[500_000])]
    )

    def feed() -> Iterator[bytes]:
        if cancelled == "ExtendModel":
            yield ExtendModelRequest(header=extension).SerializeToString()
            yield ExtendModelRequest(weights=next(pieces(np.ones(500_000), 500_000))).SerializeToString()
        else:
            header, chunk, *_ = replacement("m", [np.ones(500_000)] * 3)
            yield header.SerializeToString()
            yield chunk.SerializeToString()
        stop.wait(30)

    available = wire.info().limits.memory_available_bytes
    with unchanged(wire, "m"):
        call = wire.start(cancelled, feed())
        eventually(lambda: wire.info().limits.memory_available_bytes < available, "no upload")
        call.cancel()
        stop.set()
