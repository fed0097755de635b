"""Worker.get_push reports the status of a push after a lost answer, a timeout, or the end of the session."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Client, SessionError, Sync, Worker
from deltaserve._transport.protocol import TransportName
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, GiveUp, Proxy, StartProxy

every_way = pytest.mark.parametrize(
    ("size", "transport"), [(5, "auto"), (700_000, "stream"), (700_000, "shared")], ids=["unary", "stream", "shared"]
)
"""Sizes of a model that fits into one message, and of one that uses a stream or shared memory."""


def gradient(value: float, size: int = 3) -> dict[str, Any]:
    return {"w": np.full(size, value, np.float32)}


def status(worker: Worker, sequence: int | None = None) -> tuple[str, bool]:
    status = worker.get_push(sequence)
    assert (status.result is not None) == (status.state == "applied")
    return status.state, status.final


def known(worker: Worker) -> bool:
    """Returns whether the worker knows the status of its last push."""
    return worker.last_result is not None


@pytest.fixture
def proxy(server: LocalServer, start_proxy: "StartProxy") -> "Proxy":
    return start_proxy(server.target)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_get_push_needs_a_first_push(client: Client) -> None:
    with client.create_model("m", gradient(0)).worker() as worker:
        worker.pull()
        with pytest.raises(ValueError, match="there is no push yet"):
            worker.get_push()
        assert status(worker, 1) == ("not accepted", False)
        for sequence in (0, -1):
            with pytest.raises(ValueError, match=f"sequence: expected 1 or more, got {sequence}"):
                worker.get_push(sequence)


def test_each_of_the_last_pushes_has_its_first_result(client: Client) -> None:
    with client.create_model("m", gradient(0)).worker() as worker:
        results = []
        for number in range(1, 12):
            worker.step(gradient(number))
            results.append(worker.last_result)
            assert worker.get_push().result == worker.last_result
        for number in range(4, 12):
            assert worker.get_push(number).result == results[number - 1]
        lost = worker.get_push(3).result
        assert lost is not None
        assert (lost.version, lost.staleness, lost.gradient_norm, lost.update_norm) == (11, None, None, None)
        assert status(worker, 12) == ("not accepted", False)


def test_a_refused_push_was_not_accepted(client: Client) -> None:
    with client.create_model("m", gradient(0)).worker() as worker:
        worker.step(gradient(1))
        with pytest.raises(deltaserve.RequestError):
            worker.step(gradient(float("nan")))
        assert status(worker) == ("not accepted", False)
        assert status(worker, 1) == ("applied", True)


@every_way
def test_get_push_tells_the_outcome_after_a_lost_answer(
    client: Client,
    proxy: "Proxy",
    size: int,
    transport: TransportName,
    eventually: "Eventually",
    time_is_up: Callable[[], None],
    threads: ThreadPoolExecutor,
) -> None:
    """The server applies the push, its answer is lost, and the client times out before it retries."""
    model = client.create_model("m", gradient(0, size))
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far:
        worker = far.model("m").worker("a", transport=transport)
        worker.step(gradient(1, size))
        proxy.hold_answers()
        step = threads.submit(worker.step, gradient(2, size))
        eventually(lambda: model.info().version == 2)
        time_is_up()
        proxy.cut()
        with pytest.raises(deltaserve.UnavailableError) as caught:
            step.result()
        assert caught.value.reason is None
        assert not known(worker)
        status = worker.get_push()
        assert (status.state, status.final) == ("applied", True)
        assert status.result is not None
        assert (status.result.version, status.result.duplicate) == (2, False)
        worker.step(gradient(2, size))
        assert model.info().version == 2, "the same gradient is not pushed twice"
        assert worker.last_result is not None
        assert worker.last_result.gradient_norm == status.result.gradient_norm


def test_an_upload_that_never_arrived_is_not_accepted(client: Client, proxy: "Proxy") -> None:
    model = client.create_model("m", gradient(0))
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far:
        worker = far.model("m").worker("a")
        worker.pull()
        far._connection.timeout_seconds = 0.5
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(deltaserve.UnavailableError):
            worker.step(gradient(1))
        proxy.refusing = False
        far._connection.timeout_seconds = 20.0
        assert status(worker) == ("not accepted", False)
        worker.step(gradient(1))
        assert model.info().version == 1


@pytest.fixture
def a(client: Client, give_up: "GiveUp") -> Iterator[Worker]:
    """A worker of model "m" whose step timed out while its push waits for the round."""
    with client.create_model("m", gradient(0), policy=Sync(min_workers=2)).worker("a") as worker:
        give_up(worker, gradient(1))
        yield worker


@pytest.mark.parametrize("ends", ["stays", "closed", "fenced"])
def test_a_push_is_waiting_until_its_round_closes(client: Client, a: Worker, ends: str) -> None:
    model = client.model("m")
    with model.worker("b") as b:
        assert status(a) == ("waiting", False)
        if ends == "closed":
            a.close()
        elif ends == "fenced":
            newer = model.worker("a")
            assert newer.version == 1
        assert status(a) == ("waiting", False)
        b.step(gradient(3))
        assert status(a) == ("applied", True)
        result = a.get_push().result
        assert result is not None
        assert b.last_result is not None
        assert (result.version, result.contributors) == (1, 2)
        assert result.update_norm == b.last_result.update_norm
        assert result.gradient_norm == pytest.approx(3**0.5)
        assert status(a, 2) == ("not accepted", ends != "stays")


def test_get_push_finds_both_pushes_after_a_change_of_gradient(
    client: Client, a: Worker, threads: ThreadPoolExecutor, eventually: "Eventually"
) -> None:
    """The first push waits in its round. The second belongs to the next round, whenever the first one closes."""
    model = client.model("m")
    with model.worker("b") as b:
        b.pull()
        ask, closed = a._membership.find_push, list[object]()

        def ask_and_close(number: int) -> Any:
            """Closes the round between two calls of the worker, which is the worst moment."""
            answer = ask(number)
            if not closed:
                closed.append(b.step(gradient(3)))
            return answer

        a._membership.find_push = ask_and_close  # type: ignore[method-assign]
        with pytest.raises(deltaserve.StaleGradientError):
            a.step(gradient(2))
        assert a.version == 1
        step = threads.submit(b.step, gradient(5))
        eventually(lambda: any(session.waiting for session in model.info().sessions))
        a.step(gradient(4))
        step.result()
        assert [a.get_push(number).state for number in (1, 2)] == ["applied", "applied"]


@pytest.mark.parametrize("ends", ["closed", "fenced"])
def test_the_note_of_a_session_error_has_the_status_of_the_last_push(client: Client, ends: str) -> None:
    model = client.create_model("m", gradient(0))
    worker = model.worker("a")
    worker.step(gradient(1))
    newer = None
    if ends == "closed":
        worker.close()
    else:
        newer = model.worker("a")
    for _ in range(2):
        with pytest.raises(SessionError) as caught:
            worker.step(gradient(2))
        assert caught.value.reason == ("SESSION_UNKNOWN" if ends == "closed" else "SESSION_FENCED")
        assert caught.value.__notes__ == ["Its last push, number 2: not accepted."]
    assert status(worker, 1) == ("applied", True)
    assert status(worker, 2) == ("not accepted", True)
    del newer


@pytest.mark.parametrize("closes", [False, True], ids=["waiting", "applied"])
def test_the_note_of_a_worker_that_was_replaced_while_its_push_waited(client: Client, a: Worker, closes: bool) -> None:
    model = client.model("m")
    with model.worker("b") as b, model.worker("a"):
        if closes:
            b.step(gradient(3))
        with pytest.raises(SessionError) as caught:
            a.step(gradient(1))
        expected = "applied, as part of version 1" if closes else "waiting"
        assert caught.value.__notes__ == [f"Its last push, number 1: {expected}."]


def test_a_push_of_a_session_that_ended_long_ago_is_not_known(client: Client) -> None:
    model = client.create_model("m", gradient(0))
    old = model.worker("old")
    old.step(gradient(1))
    old.close()
    assert status(old) == ("applied", True)
    model.delete()
    with pytest.raises(deltaserve.RequestError) as caught:
        old.get_push()
    assert caught.value.reason == "MODEL_NOT_FOUND"
    client.create_model("m", gradient(0))
    with pytest.raises(SessionError, match="ended too long ago"):
        old.get_push()
