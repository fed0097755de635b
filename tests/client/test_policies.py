"""The policies as Python workers see them, each worker in its own thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Adadelta, Async, Bounded, Client, Model, StaleGradientError, Sync, Worker

if TYPE_CHECKING:
    from tests.client.conftest import Eventually

SIZE = 3


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def gradient(value: float) -> dict[str, Any]:
    return {"w": np.full(SIZE, value, np.float32)}


def create(client: Client, policy: deltaserve.Sync | Async | Bounded) -> Model:
    return client.create_model("m", gradient(0.0), policy=policy)


def waits(model: Model, *workers: str) -> Callable[[], bool]:
    return lambda: {s.worker for s in model.info().sessions if s.waiting} >= set(workers)


def in_place(worker: Worker, model: Model) -> None:
    """Asserts that a worker has the current weights and version of the model."""
    state = model.pull_state()
    assert worker.version == state.version
    np.testing.assert_array_equal(worker.weights["w"], state.weights["w"])


def left_out(worker: Worker) -> bool:
    """Returns whether the worker reports that its last push is in no update."""
    return worker.last_result is None


# --- every setting goes both ways


@pytest.mark.parametrize(
    "policy",
    [
        Sync(), Sync(min_workers=3), Sync(min_workers=2, quorum=4, grace_seconds=1.5), Sync(round_timeout_seconds=0.5),
        Sync(min_workers=5, reduction="trimmed_mean", trim=2), Sync(reduction="median", clip_norm=1e-3),
        Sync(quorum=1, grace_seconds=0.0, reduction="mean"), Async(), Async(max_staleness=0), Async(damping=True),
        Async(max_staleness=7, damping=True), Bounded(), Bounded(slack=3),
    ],
    ids=str,
)  # fmt: skip
def test_a_policy_comes_back_as_it_was_given(client: Client, policy: Sync | Async | Bounded) -> None:
    assert create(client, policy).policy == policy
    assert client.model("m").policy == client.model("m").info().policy == client.models()[0].policy == policy
    other = client.create_model("n", gradient(0.0))
    other.update(policy=policy)
    assert other.policy == client.model("n").policy == policy


@pytest.mark.parametrize(
    "policy",
    [
        Sync(min_workers=0), Sync(quorum=0), Sync(grace_seconds=1.0), Sync(quorum=1, grace_seconds=-1.0),
        Sync(quorum=1, grace_seconds=float("nan")), Sync(round_timeout_seconds=0.0), Sync(trim=1), Sync(clip_norm=0.0),
        Sync(reduction="trimmed_mean"), Sync(min_workers=2, reduction="trimmed_mean", trim=1),
        Sync(round_timeout_seconds=float("inf")), Sync(clip_norm=float("nan")),
    ],
    ids=str,
)  # fmt: skip
def test_a_policy_that_is_out_of_range_is_refused(client: Client, policy: Sync) -> None:
    model = create(client, Async())
    for call in (lambda: client.create_model("n", gradient(0.0), policy=policy), lambda: model.update(policy=policy)):
        with pytest.raises(deltaserve.RequestError) as caught:
            call()
        assert caught.value.reason == "POLICY_INVALID"
    assert (model.policy, model.info().policy) == (Async(), Async())


@pytest.mark.parametrize("reduction", ["", "Mean", "mode", "unspecified", "REDUCTION_MEAN"])
def test_an_unknown_reduction_is_refused(client: Client, reduction: Any) -> None:
    with pytest.raises(ValueError, match="reduction: expected mean, trimmed_mean or median"):
        create(client, Sync(reduction=reduction))
    assert client.models() == []


# --- sync


def test_a_straggler_of_a_quorum_gets_the_newer_weights_and_continues(client: Client) -> None:
    model = create(client, Sync(quorum=1))
    with model.worker("a") as quick, model.worker("b") as slow:
        quick.pull()
        slow.pull()
        quick.step(gradient(1.0))
        with pytest.raises(StaleGradientError, match="pull that, compute again, push") as caught:
            slow.step(gradient(2.0))
        assert "in place now" in caught.value.__notes__[0]
        assert left_out(slow)
        in_place(slow, model)
        slow.step(gradient(3.0))
        assert slow.last_result is not None
        assert (slow.last_result.version, slow.last_result.contributors) == (2, 1)


def test_a_straggler_writes_the_newer_weights_to_its_out_argument(client: Client) -> None:
    model = create(client, Sync(quorum=1))
    mine = np.zeros(SIZE, np.float32)
    with model.worker("a") as quick, model.worker("b") as slow:
        quick.pull()
        slow.pull()
        expected = quick.step(gradient(1.0))["w"]
        with pytest.raises(StaleGradientError):
            slow.step(gradient(2.0), out={"w": mine})
        np.testing.assert_array_equal(mine, expected)


def test_grace_lets_a_straggler_in(client: Client, threads: ThreadPoolExecutor, eventually: "Eventually") -> None:
    model = create(client, Sync(quorum=1, grace_seconds=3600.0))
    with model.worker("a") as quick, model.worker("b") as slow:
        slow.pull()
        step = threads.submit(quick.step, gradient(1.0))
        eventually(waits(model, "a"))
        slow.step(gradient(3.0))
        step.result()
        for worker in (quick, slow):
            assert worker.last_result is not None
            assert (worker.last_result.version, worker.last_result.contributors) == (1, 2)


def test_stepping_again_retries_a_failed_round(
    client: Client, threads: ThreadPoolExecutor, eventually: "Eventually"
) -> None:
    model = create(client, Sync(min_workers=2, round_timeout_seconds=0.2))
    with model.worker("a") as a:
        for _ in range(2):
            with pytest.raises(deltaserve.UnavailableError, match="1 of the 2 pushes that it needs") as caught:
                a.step(gradient(1.0))
            assert (caught.value.reason, caught.value.metadata) == ("ROUND_FAILED", {"got": "1", "need": "2"})
            assert left_out(a)
            assert model.info().version == 0
        model.update(policy=Sync(min_workers=2))
        step = threads.submit(a.step, gradient(1.0))
        eventually(waits(model, "a"))
        with model.worker("b") as b:
            b.step(gradient(3.0))
        step.result()
        assert a.last_result is not None
        assert (a.last_result.version, a.last_result.duplicate, a.last_result.contributors) == (1, False, 2)


def test_pushes_are_weighted_by_samples(client: Client, threads: ThreadPoolExecutor, eventually: "Eventually") -> None:
    """The mean of 12 samples of 1 and 4 samples of -3 is 0."""
    model = create(client, Sync(min_workers=2))
    twin = client.create_model("twin", gradient(0.0))
    with model.worker("a") as a, model.worker("b") as b, twin.worker() as alone:
        b.pull()
        step = threads.submit(a.step, gradient(1.0), weight=12)
        eventually(waits(model, "a"))
        weights = b.step(gradient(-3.0), weight=4)
        step.result()
        assert (weights["w"] == 0).all()
        step = threads.submit(a.step, gradient(1.0), weight=3.0)
        eventually(waits(model, "a"))
        weights = b.step(gradient(-3.0), weight=1e-9)
        step.result()
        alone.step(gradient(0.0))
        np.testing.assert_allclose(weights["w"], alone.step(gradient(1.0))["w"], rtol=1e-6)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), 1e10])
def test_a_weight_that_is_out_of_range_is_refused(client: Client, weight: float) -> None:
    model = create(client, Async())
    with model.worker() as worker:
        with pytest.raises(deltaserve.RequestError, match="weight: expected 1e-09 to 1e"):
            worker.step(gradient(1.0), weight=weight)
        assert model.info().version == 0
        worker.step(gradient(1.0))


def test_racing_workers_make_every_version_with_a_quorum(client: Client, threads: ThreadPoolExecutor) -> None:
    """Late workers drop their gradients, nobody waits forever, and every accepted push counts once."""
    model = create(client, Sync(min_workers=2, quorum=2))
    steps = 25

    def train(name: str) -> int:
        applied = 0
        with model.worker(name) as worker:
            worker.pull()
            while worker.version < steps:
                with suppress(StaleGradientError):
                    worker.step(gradient(1.0))
                    applied += 1
        return applied

    watched: Any = model.watch()
    with closing(watched) as events:
        next(events)
        trained = [threads.submit(train, name) for name in "abcd"]
        seen = [next(events) for _ in range(steps)]
        model.update(policy=Async())  # answers a worker that is alone in its round
        applied = sum(done.result() for done in trained)
        seen += [next(events) for _ in range(model.info().version - steps)]
    assert [event.version for event in seen] == list(range(1, len(seen) + 1))
    assert all(len(event.contributions) >= 2 for event in seen[:steps])
    assert applied == sum(len(event.contributions) for event in seen)


# --- async


def test_a_gradient_beyond_max_staleness_is_left_out_and_the_newer_weights_are_in_place(client: Client) -> None:
    model = create(client, Async(max_staleness=1))
    with model.worker("a") as a, model.worker("b") as b:
        b.pull()
        for value in (1.0, 2.0):
            a.step(gradient(value))
        with pytest.raises(StaleGradientError, match="more than 1 before the current 2") as caught:
            b.step(gradient(3.0))
        assert caught.value.metadata == {"base": "0", "current": "2", "bound": "1"}
        assert left_out(b)
        in_place(b, model)
        a.step(gradient(4.0))
        b.step(gradient(5.0))
        assert b.last_result is not None
        assert (b.last_result.version, b.last_result.staleness) == (4, 1)


def test_the_result_shows_the_damped_lr(client: Client) -> None:
    model = client.create_model("m", gradient(0.0), optimizer=Adadelta(lr=0.8), policy=Async(damping=True))
    with model.worker("a") as a, model.worker("b") as b:
        b.pull()
        for value in (1.0, 2.0, 3.0):
            a.step(gradient(value))
        b.step(gradient(4.0), hyperparameters=[Adadelta(lr=0.4)])
        assert a.last_result is not None
        assert b.last_result is not None
        assert (a.last_result.hyperparameters[0].lr, b.last_result.hyperparameters[0].lr) == (0.8, 0.1)
        assert b.last_result.staleness == 3


# --- bounded


def ahead(
    client: Client, model: Model, worker: Worker, threads: ThreadPoolExecutor, eventually: "Eventually"
) -> Future[Any]:
    """Starts a step that the server applies at once, but whose answer it withholds."""
    before = model.info().version
    step = threads.submit(worker.step, gradient(1.0))
    eventually(lambda: model.info().version == before + 1)
    assert not step.done()
    return step


def test_fast_workers_wait_for_the_slowest(
    client: Client, threads: ThreadPoolExecutor, eventually: "Eventually"
) -> None:
    model = create(client, Bounded(slack=1))
    with model.worker("a") as quick, model.worker("b") as slow:
        quick.step(gradient(1.0))
        step = ahead(client, model, quick, threads, eventually)
        slow.step(gradient(2.0))
        step.result()
        in_place(quick, model)
        assert quick.last_result is not None
        assert (quick.last_result.version, quick.last_result.duplicate) == (2, False)
        step = ahead(client, model, quick, threads, eventually)
        slow.close()
        step.result()
        quick.step(gradient(1.0))


def test_a_worker_that_timed_out_finds_its_push_again(
    client: Client, threads: ThreadPoolExecutor, eventually: "Eventually"
) -> None:
    model = create(client, Bounded())
    with deltaserve.connect(client.target, timeout_seconds=20) as hasty, model.worker("b") as slow:
        quick = hasty.model("m").worker("a")
        quick.pull()
        while not model.info().version:
            hasty._connection.timeout_seconds = 0.5
            with pytest.raises(deltaserve.UnavailableError, match="did not answer"):
                quick.step(gradient(1.0))
            hasty._connection.timeout_seconds = 20
        status = quick.get_push()
        assert (status.state, status.final) == ("applied", True)
        slow.step(gradient(2.0))
        quick.step(gradient(1.0))
        assert quick.last_result is not None
        assert (quick.last_result.version, quick.last_result.duplicate) == (1, True)
        assert model.info().version == 2


def test_workers_in_threads_are_never_further_apart_than_the_slack(client: Client, threads: ThreadPoolExecutor) -> None:
    model, slack, steps = create(client, Bounded(slack=2)), 2, 30
    workers = [model.worker(name) for name in "abc"]
    answered = dict.fromkeys("abc", 0)
    apart = []

    def train(worker: Worker) -> None:
        with worker:
            for number in range(1, steps + 1):
                worker.step(gradient(1.0))
                answered[worker.name] = number
                apart.append(number - min(answered.values()))

    for done in [threads.submit(train, worker) for worker in workers]:
        done.result()
    assert model.info().version == 3 * steps
    # An answered worker is at most `slack` ahead of the slowest worker's pushes, whose last answer may be on its way.
    assert max(apart) <= slack + 1


# --- what was refused


@pytest.mark.parametrize("kind", ["value", "weight", "hyperparameters", "stale", "failed"])
def test_there_is_no_last_result_after_a_refusal(client: Client, kind: str) -> None:
    model = create(client, Async(max_staleness=0))
    with model.worker("a") as a, model.worker("b") as b:
        a.step(gradient(1.0))
        assert a.last_result is not None
        arguments: dict[str, Any] = {}
        if kind == "stale":
            b.step(gradient(1.0))
        elif kind == "failed":
            model.update(policy=Sync(min_workers=3, round_timeout_seconds=0.1))
        elif kind == "hyperparameters":
            arguments["hyperparameters"] = [Adadelta(rho=2.0)]
        elif kind == "weight":
            arguments["weight"] = 0.0
        with pytest.raises(deltaserve.Error):
            a.step(gradient(float("nan") if kind == "value" else 2.0), **arguments)
        assert left_out(a)
        model.update(policy=Async())
        a.step(gradient(3.0))
        assert a.last_result is not None
        assert a.last_result.version == model.info().version


# --- changes under way


def test_a_change_affects_all_workers_from_the_returned_version(client: Client) -> None:
    model, other = create(client, Async()), client.model("m")
    with model.worker() as worker:
        worker.step(gradient(1.0))
        assert model.update(groups=[Adadelta(lr=0.25)]) == 2
        assert model.groups == (Adadelta(lr=0.25),)
        assert (other.groups, other.info().groups) == ((Adadelta(),), (Adadelta(lr=0.25),))
        worker.step(gradient(1.0))
        assert worker.last_result is not None
        assert worker.last_result.hyperparameters == (Adadelta(lr=0.25),)
        assert other.update(policy=Bounded(slack=4)) == 3
        assert (other.groups, other.policy) == ((Adadelta(lr=0.25),), Bounded(slack=4))
        assert other.update() == 3


@pytest.mark.parametrize("policy", [Async(), Bounded(slack=1), Sync(min_workers=1)], ids=str)
def test_a_change_answers_waiting_workers(
    client: Client, threads: ThreadPoolExecutor, eventually: "Eventually", policy: Sync | Async | Bounded
) -> None:
    model = create(client, Sync(min_workers=3))
    with model.worker("a") as a, model.worker("b") as b:
        steps = [threads.submit(worker.step, gradient(1.0)) for worker in (a, b)]
        eventually(waits(model, "a", "b"))
        assert model.update(policy=policy) == 1
        for step in steps:
            step.result()
        assert model.info().version == (1 if isinstance(policy, Sync) else 2)


def test_a_model_is_joined_with_its_initial_or_current_settings(client: Client) -> None:
    create(client, Sync(min_workers=2)).update(groups=[Adadelta(lr=0.5)], policy=Async(damping=True))
    assert not create(client, Sync(min_workers=2)).created
    joined = client.create_model("m", gradient(0.0), optimizer=Adadelta(lr=0.5), policy=Async(damping=True))
    assert not joined.created
    with pytest.raises(deltaserve.ConflictError, match="differs") as caught:
        client.create_model("m", gradient(0.0), optimizer=Adadelta(lr=0.25), policy=Async(damping=True))
    assert caught.value.reason == "MODEL_MISMATCH"
