"""Models through the client: create, join, pull and put the state, extend, delete."""

from typing import Any

import numpy as np
import pytest
from tests.support.states import assert_same_state

import deltaserve
from deltaserve import Adadelta, Async, Client, Sync, TensorSpec

WEIGHTS: dict[str, Any] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32(7),
    "none": np.zeros((0, 4), np.float32),
}


def test_a_model_is_created_and_described(client: Client) -> None:
    optimizer = Adadelta(lr=0.5, rho=0.95, eps=1e-4, weight_decay=0.01, maximize=True)
    model = client.create_model("m", WEIGHTS, optimizer=optimizer)
    assert model.created
    assert model.tensors == (TensorSpec("w", (2, 3)), TensorSpec("b", ()), TensorSpec("none", (0, 4)))
    assert model.groups == (optimizer,)
    assert model.policy == Async()
    info = model.info()
    assert (info.name, info.tensors, info.groups, info.policy) == ("m", model.tensors, model.groups, model.policy)
    assert (info.version, info.durable_version, info.sessions) == (0, None, ())
    (summary,) = client.models()
    assert (summary.name, summary.optimizer, summary.element_count, summary.tensor_count) == ("m", "adadelta", 7, 3)
    assert (summary.session_count, summary.policy, summary.version) == (0, Async(), 0)
    found = client.model("m")
    assert not found.created
    assert (found.tensors, found.groups, found.policy) == (model.tensors, model.groups, model.policy)


def test_a_second_creator_joins_and_the_weights_stay(client: Client) -> None:
    client.create_model("m", WEIGHTS, policy=Sync(min_workers=2))
    joined = client.create_model("m", {key: value * 0 for key, value in WEIGHTS.items()}, policy=Sync(min_workers=2))
    assert not joined.created
    for name, value in joined.pull_state().weights.items():
        np.testing.assert_array_equal(value, WEIGHTS[name])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"optimizer": Adadelta(lr=0.1)}, "lr of group 0 is 1.0, not 0.1"),
        ({"policy": Sync()}, "policy"),
        ({"tensors": {"w": np.zeros((3, 2))}}, "tensor 0 is w [2, 3] in group 0, not w [3, 2] in group 0"),
        ({"groups": [Adadelta()] * 2}, "it has 1 parameter groups, not 2"),
    ],
)
def test_a_mismatch_says_what_differs(client: Client, change: dict[str, object], difference: str) -> None:
    client.create_model("m", WEIGHTS)
    arguments: dict[str, object] = {"tensors": WEIGHTS, **change}
    with pytest.raises(deltaserve.ConflictError, match="model m exists and differs") as caught:
        client.create_model("m", **arguments)  # type: ignore[arg-type]
    assert difference in str(caught.value)
    assert caught.value.reason == "MODEL_MISMATCH"


def test_a_group_for_an_unknown_tensor_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="group_of: there is no tensor named bias"):
        client.create_model("m", {"b": np.ones(2)}, groups=[Adadelta()] * 2, group_of={"bias": 1})
    model = client.create_model("m", {"b": np.ones(2)})
    with pytest.raises(ValueError, match="group_of: there is no tensor named bias"):
        model.extend({"c": np.ones(2)}, group_of={"bias": 0})
    assert client.models()[0].tensor_count == 1


@pytest.mark.parametrize("policy", ["sync", Sync, 0, False])
def test_an_object_that_is_no_policy_is_refused(client: Client, policy: object) -> None:
    with pytest.raises(TypeError, match="policy: expected Sync"):
        client.create_model("m", WEIGHTS, policy=policy)  # type: ignore[arg-type]
    assert client.models() == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "no spaces"}, "NAME_INVALID"), ({"name": ""}, "NAME_INVALID"), ({"tensors": {}}, "SHAPE_INVALID"),
        ({"tensors": {"w": np.zeros(0)}}, "SHAPE_INVALID"),
        ({"optimizer": Adadelta(eps=0.0)}, "HYPERPARAMETER_INVALID"),
        ({"optimizer": Adadelta(rho=1.1)}, "HYPERPARAMETER_INVALID"),
        ({"optimizer": Adadelta(lr=-1.0)}, "HYPERPARAMETER_INVALID"),
        ({"policy": Sync(min_workers=0)}, "POLICY_INVALID"), ({"tensors": {"w": [np.inf]}}, "VALUE_NOT_FINITE"),
        ({"tensors": {"w": [1e20]}}, "VALUE_TOO_LARGE"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(client: Client, arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(deltaserve.RequestError) as caught:
        client.create_model(**{"name": "m", "tensors": WEIGHTS, **arguments})  # type: ignore[arg-type]
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    assert client.models() == []


def test_the_state_is_pulled_and_put_back(client: Client) -> None:
    model = client.create_model("m", WEIGHTS)
    with model.worker() as worker:
        for _ in range(3):
            worker.step({key: np.ones_like(value) for key, value in WEIGHTS.items()})
        kept = model.pull_state()
        worker.step({key: np.ones_like(value) for key, value in WEIGHTS.items()})
        further = model.pull_state()
        model.put_state(kept)
        again = model.pull_state()
        worker.pull()
        worker.step({key: np.ones_like(value) for key, value in WEIGHTS.items()})
    assert (kept.version, kept.update_counts) == (3, {"w": 3, "b": 3, "none": 3})
    assert (again.version, again.update_counts) == (5, kept.update_counts)
    repeated = model.pull_state()
    assert_same_state(again, kept)
    assert_same_state(repeated, further)


def test_a_state_that_does_not_fit_is_refused(client: Client) -> None:
    model = client.create_model("m", WEIGHTS)
    good = model.pull_state()

    def state(weights: dict[str, Any]) -> deltaserve.ModelState:
        return deltaserve.ModelState(version=0, weights=weights, slots=None, update_counts={})

    with pytest.raises(ValueError, match="weights: tensor b is missing"):
        model.put_state(state({"w": WEIGHTS["w"]}))
    with pytest.raises(ValueError, match=r"weights: tensor w has shape \(3, 2\), not \(2, 3\)"):
        model.put_state(state({**WEIGHTS, "w": np.zeros((3, 2))}))
    with pytest.raises(deltaserve.RequestError, match="NaN or infinity in tensor b at element 0"):
        model.put_state(state({**WEIGHTS, "b": np.nan}))
    after = model.pull_state()
    assert after.version == 0
    for tensor in WEIGHTS:
        np.testing.assert_array_equal(after.weights[tensor], good.weights[tensor])


def test_a_worker_continues_after_its_model_was_extended(client: Client) -> None:
    model = client.create_model("m", {"a": np.zeros(2)})
    with model.worker("old") as old:
        old.step({"a": np.ones(2)})
        assert model.extend({"b": np.ones(3)}, groups=[Adadelta(lr=0.1)], group_of={"b": 1})
        assert model.tensors == (TensorSpec("a", (2,)), TensorSpec("b", (3,), 1))
        assert not client.model("m").extend({})
        assert set(old.step({"a": np.ones(2)})) == {"a"}
        assert set(old.pull()) == {"a"}
        with model.worker("new") as new:
            new.step({"a": np.ones(2), "b": np.ones(3)})
    assert model.pull_state().update_counts == {"a": 3, "b": 1}
    assert client.model("m").groups == (Adadelta(), Adadelta(lr=0.1))


def test_the_same_extension_is_made_once(client: Client) -> None:
    one, two, three = client.create_model("m", {"a": np.zeros(2)}), client.model("m"), client.model("m")
    assert one.extend({"b": np.ones(3)})
    assert not two.extend({"b": np.zeros(3)})
    assert two.pull_state().weights["b"].tolist() == [1, 1, 1]
    with pytest.raises(deltaserve.ConflictError, match="it has 2 tensors"):
        three.extend({"c": np.ones(3)})


def test_a_model_is_deleted_once(client: Client) -> None:
    model = client.create_model("m", WEIGHTS)
    worker = model.worker()
    client.create_model("other", WEIGHTS).delete()
    client.delete_model("m")
    assert client.models() == []
    for call in (model.info, model.delete, worker.pull, lambda: client.model("m"), lambda: client.delete_model("m")):
        with pytest.raises(deltaserve.RequestError, match="no model is named 'm'") as caught:
            call()
        assert caught.value.reason == "MODEL_NOT_FOUND"


def test_a_closed_client_raises_an_error(client: Client) -> None:
    model = client.create_model("m", WEIGHTS)
    worker = model.worker()
    client.close()
    client.close()
    for call in (client.models, model.info, worker.pull):
        with pytest.raises(ValueError, match="the connection is closed"):
            call()
    worker.close()


@pytest.mark.parametrize(
    "target",
    ["", "localhost", "localhost:", ":50051", "http://localhost:50051", "localhost:50051/", "a:65536", "unix:"],
)
def test_an_address_is_a_host_and_a_port_or_a_path(target: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{target!r} is no address; write HOST:PORT, as in localhost:50051, or unix:"
    ):
        deltaserve.connect(target)


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_timeout_is_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_seconds: expected a finite number above 0"):
        deltaserve.connect("localhost:1", timeout_seconds=seconds)
