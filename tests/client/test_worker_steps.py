"""The inputs, results and memory of a worker's pulls and steps."""

from typing import Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Adadelta, Client

SMALL, LARGE = 5, 700_000
"""Sizes of a model that fits into one message, and of one that uses a stream of three."""

sizes = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["unary", "stream"])


@pytest.mark.parametrize(
    "gradient",
    [
        np.ones((2, 3), np.float64), np.ones((3, 2), np.float32).T, np.ones((4, 6), np.float32)[::2, ::2],
        np.ones((2, 3), np.int64), [[1, 1, 1], [1, 1, 1]], np.ones((2, 3), ">f4"), np.ones((2, 3), bool),
        np.broadcast_to(np.float32(1), (2, 3)),
    ],
)  # fmt: skip
def test_a_gradient_of_any_layout_and_real_type_is_accepted(client: Client, gradient: Any) -> None:
    twin, model = (client.create_model(name, {"w": np.zeros((2, 3))}) for name in ("twin", "m"))
    with twin.worker() as one, model.worker() as other:
        expected = one.step({"w": np.ones((2, 3), np.float32)})
        np.testing.assert_array_equal(other.step({"w": gradient})["w"], expected["w"])


@pytest.mark.parametrize(
    ("gradients", "kind", "text"),
    [
        ({}, ValueError, "the gradient of tensor w is missing: give None if it has none"),
        ({"w": np.ones(3), "x": np.ones(3)}, ValueError, "the model has no tensor named x"),
        ({"w": np.ones(4)}, ValueError, r"the gradient of tensor w has shape \(4,\), not \(3,\)"),
        ({"w": np.ones((3, 1))}, ValueError, r"has shape \(3, 1\), not \(3,\)"),
        ({"w": np.ones(3, complex)}, TypeError, "expected real numbers, got complex128"),
        ({"w": ["1", "2", "3"]}, TypeError, "expected real numbers"),
        ([np.ones(3)], TypeError, "gradients: expected a mapping of tensor names to arrays, got list"),
        ({"w": [1, np.nan, 3]}, deltaserve.RequestError, "NaN or infinity in tensor w at element 1"),
        ({"w": [1, 2, 1e30]}, deltaserve.RequestError, "tensor w at element 2 is too large"),
    ],
)
def test_a_gradient_that_does_not_fit_changes_nothing(
    client: Client, gradients: Any, kind: type[Exception], text: str
) -> None:
    model = client.create_model("m", {"w": np.zeros(3)})
    with model.worker() as worker:
        with pytest.raises(kind, match=text):
            worker.step(gradients)
        assert model.info().version == 0
        worker.step({"w": np.ones(3)})
        assert worker.version == 1


@sizes
def test_a_tensor_without_gradient_keeps_weights_and_state(client: Client, size: int) -> None:
    tensors = {"a": np.ones(size), "b": np.ones(3), "c": np.ones(size)}
    model = client.create_model("m", tensors)
    with model.worker() as worker:
        weights = worker.step({"a": np.ones(size), "b": None, "c": np.ones(size)})
        assert (weights["b"] == 1).all()
        assert (weights["a"] < 1).all()
        assert (weights["c"] < 1).all()
        worker.step(dict.fromkeys(tensors))
        assert worker.version == 2
    assert model.pull_state().update_counts == {"a": 1, "b": 0, "c": 1}


def test_a_step_has_its_own_hyperparameters(client: Client) -> None:
    model = client.create_model("m", {"w": np.ones(3)})
    with model.worker() as worker:
        assert (worker.step({"w": np.ones(3)}, hyperparameters=[Adadelta(lr=0.0)])["w"] == 1).all()
        assert (worker.step({"w": np.ones(3)})["w"] < 1).all()
        with pytest.raises(deltaserve.RequestError, match="rho"):
            worker.step({"w": np.ones(3)}, hyperparameters=[Adadelta(rho=2.0)])
        with pytest.raises(deltaserve.RequestError, match="groups"):
            worker.step({"w": np.ones(3)}, hyperparameters=[Adadelta()] * 2)


@sizes
def test_weights_are_views_of_the_workers_memory(client: Client, size: int) -> None:
    model = client.create_model("m", {"w": np.ones(size)})
    with model.worker() as worker:
        first = worker.pull()["w"]
        assert (first == 1).all()
        second = worker.step({"w": np.ones(size)})["w"]
        assert np.shares_memory(first, second)
        assert np.shares_memory(first, worker.weights["w"])
        np.testing.assert_array_equal(worker.weights["w"], model.pull_state().weights["w"])


@sizes
def test_weights_are_written_to_the_out_argument(client: Client, size: int) -> None:
    model = client.create_model("m", {"w": np.ones(size)})
    mine = np.zeros(size, np.float32)
    with model.worker() as worker:
        assert worker.pull(out={"w": mine})["w"] is mine
        assert (mine == 1).all()
        assert worker.step({"w": np.ones(size)}, out={"w": mine})["w"] is mine
        np.testing.assert_array_equal(mine, model.pull_state().weights["w"])


def test_weights_are_the_newest_after_a_step_into_other_memory(client: Client) -> None:
    model = client.create_model("m", {"w": np.ones(3)})
    with model.worker() as worker:
        worker.pull()
        mine = np.zeros(3, np.float32)
        worker.step({"w": np.ones(3)}, out={"w": mine})
        np.testing.assert_array_equal(worker.weights["w"], mine)


READ_ONLY = np.broadcast_to(np.float32(0), (3,)).copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "out",
    [{}, {"w": np.zeros(4, np.float32)}, {"w": np.zeros(3)}, {"w": np.zeros(6, np.float32)[::2]}, {"w": READ_ONLY}],
)
def test_an_invalid_out_argument_is_refused_before_the_push(client: Client, out: Any) -> None:
    model = client.create_model("m", {"w": np.ones(3)})
    with model.worker() as worker:
        worker.pull()
        with pytest.raises(ValueError, match="out: tensor w"):
            worker.step({"w": np.ones(3)}, out=out)
        with pytest.raises(ValueError, match="out: tensor w"):
            worker.pull(out=out)
        assert model.info().version == 0


def test_a_worker_has_its_assigned_rank_and_name(client: Client) -> None:
    model = client.create_model("m", {"w": np.ones(3)})
    with model.worker("a") as a, model.worker("b") as b:
        assert [(w.name, w.rank) for w in (a, b)] == [("a", 0), ("b", 1)]
        sessions = model.info().sessions
        assert [(s.worker, s.rank, s.epoch, s.last_sequence, s.waiting) for s in sessions] == [
            ("a", 0, 1, 0, False), ("b", 1, 1, 0, False),
        ]  # fmt: skip
    assert model.info().sessions == ()


def test_a_newer_worker_of_the_same_name_takes_over(client: Client) -> None:
    model = client.create_model("m", {"w": np.ones(3)})
    older, newer = model.worker("a"), model.worker("a")
    with pytest.raises(deltaserve.SessionError, match="a newer session of worker a has taken over") as caught:
        older.step({"w": np.ones(3)})
    assert caught.value.reason == "SESSION_FENCED"
    older.close()
    newer.step({"w": np.ones(3)})
    assert newer.version == 1


def test_a_closed_worker_raises_an_error(client: Client) -> None:
    worker = client.create_model("m", {"w": np.ones(3)}).worker("a")
    worker.close()
    worker.close()
    with pytest.raises(deltaserve.SessionError, match="closed, or its lease ran out; open a new one"):
        worker.step({"w": np.ones(3)})


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"name": "a b"}, "NAME_INVALID"), ({"lease_seconds": 0.1}, "POLICY_INVALID")]
)
def test_invalid_session_arguments_are_refused(client: Client, arguments: dict[str, Any], reason: str) -> None:
    model = client.create_model("m", {"w": np.ones(3)})
    with pytest.raises(deltaserve.RequestError) as caught:
        model.worker(**arguments)
    assert caught.value.reason == reason
