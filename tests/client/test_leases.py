"""A background thread renews the lease of a session; the session ends with its worker, however that ends."""

import gc
import logging
import signal
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Client
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProgram, StartProxy

ONE = {"w": np.ones(3, np.float32)}


@pytest.fixture
def model(client: Client) -> deltaserve.Model:
    return client.create_model("m", ONE)


def workers(model: deltaserve.Model) -> list[str]:
    return [session.worker for session in model.info().sessions]


def renewed(model: deltaserve.Model, eventually: "Eventually") -> None:
    """Waits until the lease of the only session is renewed: its remaining time grows between two looks."""
    left: list[float] = []

    def grows() -> bool:
        (session,) = model.info().sessions
        left.append(session.lease_left_seconds)
        return len(left) > 1 and left[-1] > left[-2]

    eventually(grows)


def test_the_lease_of_an_idle_worker_is_renewed(
    model: deltaserve.Model, frequent_renewals: list[float], eventually: "Eventually"
) -> None:
    with model.worker("a", lease_seconds=60.0) as worker:
        worker.step(ONE)
        for _ in range(3):
            renewed(model, eventually)
        assert frequent_renewals == [20.0], "it is renewed at a third"
        assert [session.epoch for session in model.info().sessions] == [1]
        worker.step(ONE)
        assert worker.version == 2


@pytest.mark.usefixtures("frequent_renewals")
def test_the_lease_is_renewed_after_a_broken_connection(
    server: LocalServer,
    model: deltaserve.Model,
    start_proxy: "StartProxy",
    eventually: "Eventually",
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy = start_proxy(server.target)
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far, far.model("m").worker("a", lease_seconds=20.0):
        proxy.refusing = True
        proxy.cut()
        with caplog.at_level(logging.INFO, "deltaserve"):
            eventually(lambda: "the lease was not renewed" in caplog.text)
        proxy.refusing = False
        renewed(model, eventually)


@pytest.mark.usefixtures("frequent_renewals")
def test_renewals_continue_after_a_failed_one(
    model: deltaserve.Model, monkeypatch: pytest.MonkeyPatch, eventually: "Eventually"
) -> None:
    """Renewals continue even after an error that the client does not retry."""
    with model.worker("a", lease_seconds=60.0) as worker:
        keep, failed = worker._session.keep, list[float | None]()

        def fail_once(timeout_seconds: float | None = None) -> Any:
            if failed:
                return keep(timeout_seconds)
            failed.append(timeout_seconds)
            raise deltaserve.Error("INTERNAL: Received RST_STREAM with error code 2")

        monkeypatch.setattr(worker._session, "keep", fail_once)
        eventually(lambda: failed)
        renewed(model, eventually)


@pytest.mark.usefixtures("frequent_renewals")
def test_a_refused_renewal_is_logged_and_ends_the_renewals(
    model: deltaserve.Model, caplog: pytest.LogCaptureFixture, eventually: "Eventually"
) -> None:
    with caplog.at_level(logging.WARNING, "deltaserve"):
        older = model.worker("a", lease_seconds=20.0)
        with model.worker("a"):
            eventually(lambda: "a newer session of worker a has taken over" in caplog.text)
            sleep(0.3)
    assert caplog.text.count("taken over") == 1
    older.close()


def test_a_close_that_is_interrupted_can_be_repeated(client: Client, model: deltaserve.Model) -> None:
    worker = model.worker("a")

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client._connection, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.close()
    worker.close()
    assert not workers(model)


OPEN = """
import sys, threading, time
import numpy as np
import deltaserve

client = deltaserve.connect(sys.argv[1], timeout_seconds=20)
worker = client.model("m").worker("a", lease_seconds=float(sys.argv[3]))
worker.step({"w": np.ones(3)})
print("open", flush=True)
sys.stdin.readline()
if sys.argv[2] == "falls off the end":
    pass
elif sys.argv[2] == "raises":
    raise ValueError("as planned")
elif sys.argv[2] == "exits":
    sys.exit(3)
elif sys.argv[2] == "closes the client":
    client.close()
elif sys.argv[2] == "has a thread":
    threading.Thread(target=time.sleep, args=(0.3,)).start()
elif sys.argv[2] == "is interrupted":
    raise KeyboardInterrupt
"""

WAYS = {
    "falls off the end": 0, "raises": 1, "exits": 3, "closes the client": 0, "has a thread": 0, "is interrupted": -2,
}  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize(("way", "status"), WAYS.items(), ids=lambda value: str(value).replace(" ", "-"))
def test_a_worker_that_is_not_closed_ends_with_its_program(
    way: str, status: int, server: LocalServer, model: deltaserve.Model, start_program: "StartProgram"
) -> None:
    program = start_program(OPEN, server.target, way, "60")
    assert program.line() == "open"
    assert workers(model) == ["a"]
    began = monotonic()
    program.tell("go")
    assert program.finish()[0] == status
    assert workers(model) == [], "at once, and not with its lease"
    assert monotonic() - began < 10


@pytest.mark.deep
def test_the_session_of_a_killed_program_ends_with_its_lease(
    server: LocalServer, model: deltaserve.Model, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    program = start_program(OPEN, server.target, "", "4")
    assert program.line() == "open"
    program.process.send_signal(signal.SIGKILL)
    killed = monotonic()
    program.process.wait()
    assert workers(model) == ["a"]
    eventually(lambda: not workers(model))
    assert monotonic() - killed > 0.8


@pytest.mark.deep
def test_a_program_stopped_for_longer_than_its_lease_continues(
    server: LocalServer, model: deltaserve.Model, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    source = OPEN.replace("if sys.argv[2] ==", 'worker.step({"w": np.ones(3)})\nif sys.argv[2] ==', 1)
    program = start_program(source, server.target, "", "1")
    assert program.line() == "open"
    program.process.send_signal(signal.SIGSTOP)
    eventually(lambda: not workers(model))
    program.process.send_signal(signal.SIGCONT)
    program.tell("go")
    status, _, errors = program.finish()
    assert status == 0
    assert "the lease had run out; it goes on in a new session" in errors


def test_a_garbage_collected_worker_ends_its_session(model: deltaserve.Model, eventually: "Eventually") -> None:
    worker = model.worker("a")
    assert workers(model) == ["a"]
    del worker
    assert workers(model) == []


def test_a_worker_in_a_reference_cycle_ends_its_session(model: deltaserve.Model) -> None:
    cycle: list[object] = [model.worker("a")]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert workers(model) == []


def test_a_client_closes_the_workers_that_are_still_open(server: LocalServer, model: deltaserve.Model) -> None:
    with deltaserve.connect(server.target, timeout_seconds=20) as other:
        kept = [other.model("m").worker(name) for name in ("a", "b")]
        assert workers(model) == ["a", "b"]
    assert workers(model) == []
    del kept


@pytest.mark.usefixtures("own_server")
def test_closing_a_worker_without_a_server_raises_nothing(server: LocalServer, model: deltaserve.Model) -> None:
    worker = model.worker("a")
    server.stop(grace_seconds=0)
    began = monotonic()
    worker.close()
    assert monotonic() - began < 15, "it does not try for as long as a call may take"
