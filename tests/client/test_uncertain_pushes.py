"""The next step after a push whose outcome is unknown."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

import deltaserve
from deltaserve import Adadelta, Client, Sync
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, GiveUp, StartProxy

ONE, TWO = {"w": np.ones(3)}, {"w": np.full(3, 2.0)}


@pytest.fixture
def model(client: Client) -> deltaserve.Model:
    return client.create_model("m", {"w": np.zeros(3)}, policy=Sync(min_workers=2))


def test_a_step_with_the_same_gradient_finds_the_push(model: deltaserve.Model, give_up: "GiveUp") -> None:
    a = model.worker("a")
    give_up(a, ONE)
    with a, model.worker("b") as b:
        assert model.info().sessions[0].waiting
        b.step(ONE)
        a.step(ONE)
        assert a.last_result is not None
        assert (a.last_result.version, a.last_result.duplicate, a.last_result.contributors) == (1, True, 2)
        assert model.info().version == 1


def test_with_another_gradient_both_pushes_count(client: Client, model: deltaserve.Model, give_up: "GiveUp") -> None:
    a = model.worker("a")
    give_up(a, ONE)
    with a, model.worker("b") as b, ThreadPoolExecutor(1) as pool:
        b.step(ONE)
        with pytest.raises(deltaserve.ConflictError) as stale:
            a.step(TWO)
        assert stale.value.reason == "ROUND_CLOSED"  # it was computed on the weights before the first push
        assert a.version == 1
        other = pool.submit(b.step, TWO)
        a.step(TWO)
        other.result()
        assert a.last_result is not None
        assert (a.last_result.version, a.last_result.duplicate, a.last_result.contributors) == (2, False, 2)
        assert [session.last_sequence for session in model.info().sessions] == [2, 2]
    twin = client.create_model("twin", {"w": np.zeros(3)})
    with twin.worker() as worker:
        worker.step(ONE)
        np.testing.assert_array_equal(worker.step(TWO)["w"], a.weights["w"])


def test_a_refused_second_push_leaves_the_first_uncertain(model: deltaserve.Model, give_up: "GiveUp") -> None:
    """The first push waits in a round, the second has invalid hyperparameters, and the third finds the first."""
    a = model.worker("a")
    give_up(a, ONE)
    with a, model.worker("b") as b:
        with pytest.raises(deltaserve.RequestError, match="lr"):
            a.step(TWO, hyperparameters=[Adadelta(lr=-1.0)])
        b.step(ONE)
        with pytest.raises(deltaserve.ConflictError, match="compute again"):
            a.step(TWO)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(b.step, TWO)
            a.step(TWO)
            other.result()
        assert a.last_result is not None
        assert a.last_result.version == 2


@pytest.mark.usefixtures("own_server")
def test_a_worker_continues_after_a_lost_answer_and_a_refusal(
    server: LocalServer,
    client: Client,
    start_proxy: "StartProxy",
    eventually: "Eventually",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server applies the push, its answer is lost, and then the server drains and refuses every retry."""
    proxy = start_proxy(server.target)
    model = client.create_model("m", {"w": np.zeros(3)})
    with deltaserve.connect(proxy.target, timeout_seconds=2.0) as far, ThreadPoolExecutor(1) as pool:
        worker = far.model("m").worker("a")
        worker.pull()
        proxy.hold_answers()
        step = pool.submit(worker.step, ONE)
        eventually(lambda: model.info().version == 1)
        server._catalog.quotas.draining = True
        refuse, refused = server._catalog.quotas.check_open, threading.Event()

        def record_refusal() -> None:
            refused.set()
            refuse()

        monkeypatch.setattr(server._catalog.quotas, "check_open", record_refusal)
        proxy.cut()
        with pytest.raises(deltaserve.UnavailableError):
            step.result()
        assert refused.is_set()
        server._catalog.quotas.draining = False
        worker.step(TWO)
        assert worker.last_result is not None
        result = worker.last_result
        assert (result.version, result.duplicate, result.staleness) == (2, False, 1)


def test_a_refused_push_leaves_its_number_free(client: Client) -> None:
    with client.create_model("m", {"w": np.zeros(3)}).worker() as worker:
        for _ in range(3):
            with pytest.raises(deltaserve.RequestError, match="NaN"):
                worker.step({"w": np.full(3, np.nan)})
        worker.step(ONE)
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (1, False)


def test_a_worker_continues_after_an_interrupt_before_the_answer_is_recorded(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT may arrive after the answer of the server and before the worker records it."""
    with client.create_model("m", {"w": np.zeros(3)}).worker() as worker:
        worker.pull()
        with monkeypatch.context() as patch:
            patch.setattr(worker._weights, "finish", lambda position: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                worker.step(ONE)
        worker.step(TWO)
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (2, False)
