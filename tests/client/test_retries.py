"""The client retries when a connection breaks, the server is down, or no answer comes."""

import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from time import monotonic
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from tests.support.ports import held_port

import deltaserve
from deltaserve import Client, Sync
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, Proxy, StartProxy, StartServer

SIZES = [5, 700_000]
"""Sizes of a model that fits into one message, and of one that uses a stream."""

SLACK = 10.0
"""Tolerance for a busy machine, in seconds. The default timeout is a minute."""

every_size = pytest.mark.parametrize("size", SIZES, ids=["unary", "stream"])


@pytest.fixture
def proxy(server: LocalServer, start_proxy: "StartProxy") -> "Proxy":
    return start_proxy(server.target)


@pytest.fixture
def far(proxy: "Proxy") -> Iterator[Client]:
    """A client behind the proxy; `client` has a direct connection."""
    with deltaserve.connect(proxy.target, timeout_seconds=20) as client:
        yield client


def gradient(size: int, step: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return {"w": np.random.default_rng(step).standard_normal(size).astype(np.float32)}


def expected(client: Client, size: int, steps: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Returns the weights after the same steps over a direct connection."""
    with client.create_model(f"twin-{steps}", {"w": np.zeros(size)}).worker() as worker:
        for step in range(steps):
            worker.step(gradient(size, step))
        return worker.weights["w"]


@every_size
def test_a_push_whose_answer_is_lost_is_applied_once(
    client: Client, far: Client, proxy: "Proxy", size: int, eventually: "Eventually"
) -> None:
    model = far.create_model("m", {"w": np.zeros(size)})
    with model.worker() as worker, ThreadPoolExecutor(1) as pool:
        worker.step(gradient(size, 0))
        proxy.hold_answers()
        step = pool.submit(worker.step, gradient(size, 1))
        eventually(lambda: client.model("m").info().version == 2)
        assert not step.done(), "the answer must not have come"
        proxy.cut()
        step.result()
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (2, True)
        worker.step(gradient(size, 2))
        assert worker.version == 3
        np.testing.assert_array_equal(worker.weights["w"], expected(client, size, 3))


def test_an_interrupted_upload_is_sent_again(client: Client, far: Client, proxy: "Proxy") -> None:
    with far.create_model("m", {"w": np.zeros(700_000)}).worker(transport="stream") as worker:
        worker.pull()
        proxy.cut_after("up", 1_500_000)
        worker.step(gradient(700_000, 0))
        assert proxy.cuts == 1
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (1, False)
        np.testing.assert_array_equal(worker.weights["w"], expected(client, 700_000, 1))


def test_an_interrupted_download_is_requested_again(client: Client, far: Client, proxy: "Proxy") -> None:
    with far.create_model("m", {"w": np.zeros(700_000)}).worker(transport="stream") as worker:
        worker.pull()
        proxy.cut_after("down", 1_500_000)
        worker.step(gradient(700_000, 0))
        assert proxy.cuts == 1
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (1, True)
        np.testing.assert_array_equal(worker.weights["w"], expected(client, 700_000, 1))


@every_size
def test_cuts_at_any_point_lose_and_repeat_nothing(client: Client, far: Client, proxy: "Proxy", size: int) -> None:
    steps, chance = 40 if size < 1000 else 8, random.Random(7)
    with far.create_model("m", {"w": np.zeros(size)}).worker(transport="stream") as worker:
        for step in range(steps):
            if step % 2:
                proxy.cut_after(chance.choice(["up", "down"]), chance.randrange(1, 300 + 4 * size))
            worker.step(gradient(size, step))
        assert worker.version == steps
        np.testing.assert_array_equal(worker.weights["w"], expected(client, size, steps))
    assert proxy.cuts > steps / 8, "too few of the faults have struck"


def test_a_push_that_waits_for_its_round_is_found_again(
    client: Client, far: Client, proxy: "Proxy", eventually: "Eventually"
) -> None:
    model = client.create_model("m", {"w": np.zeros(3)}, policy=Sync(min_workers=2))
    with far.model("m").worker("a") as a, model.worker("b") as b, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.step, {"w": np.ones(3)})
        eventually(lambda: model.info().sessions[0].waiting)
        proxy.cut()
        eventually(lambda: proxy._pairs)
        b.step({"w": np.ones(3)})
        waiting.result()
        assert a.last_result is not None
        assert (a.last_result.version, a.last_result.contributors) == (1, 2)
        np.testing.assert_array_equal(a.weights["w"], b.weights["w"])


def test_a_model_whose_creation_is_cut_exists_once_and_whole(client: Client, far: Client, proxy: "Proxy") -> None:
    weights = gradient(700_000, 0)
    far.server_info()
    proxy.cut_after("up", 1_500_000)
    far.create_model("m", weights)
    assert proxy.cuts == 1
    np.testing.assert_array_equal(client.model("m").pull_state().weights["w"], weights["w"])


def test_a_state_arrives_whole_after_a_cut(client: Client, far: Client, proxy: "Proxy") -> None:
    far.create_model("m", gradient(700_000, 0))
    proxy.cut_after("down", 4_000_000)
    state = far.model("m").pull_state()
    assert proxy.cuts == 1
    proxy.cut_after("up", 4_000_000)
    far.model("m").put_state(state)
    assert proxy.cuts == 2
    assert client.model("m").info().version == 1
    np.testing.assert_array_equal(client.model("m").pull_state().weights["w"], gradient(700_000, 0)["w"])


@pytest.mark.deep
def test_a_server_that_was_restarted_between_two_calls_is_reached_again(start_server: "StartServer") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        before = client.server_info()
        server.kill()
        server.start()
        after = client.server_info()
        assert after.incarnation != before.incarnation
        assert client.models() == []


@pytest.mark.deep
def test_a_call_waits_for_a_server_that_comes_back(start_server: "StartServer") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        client.server_info()
        server.kill()
        back = threading.Timer(1.0, server.start)
        back.start()
        client.server_info()
        back.join()


@pytest.mark.deep
@every_size
def test_a_push_that_outlives_its_lease_is_answered(
    client: Client,
    far: Client,
    proxy: "Proxy",
    size: int,
    eventually: "Eventually",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The session has expired by then, but the push counts and the worker gets its result."""
    model, asked = client.create_model("m", {"w": np.zeros(size)}, policy=Sync()), threading.Event()
    with (
        ThreadPoolExecutor(1) as pool,
        far.model("m").worker("a", transport="stream", lease_seconds=1.0) as a,
        model.worker("b") as b,
    ):
        a.pull()
        b.pull()
        step = pool.submit(a.step, gradient(size, 0))
        eventually(lambda: any(session.waiting for session in model.info().sessions))
        proxy.refusing = True
        proxy.cut()
        eventually(lambda: [session.worker for session in model.info().sessions] == ["b"])
        ask = a._membership.find_push

        def answered(number: int) -> Any:
            answer = ask(number)
            asked.set()
            return answer

        monkeypatch.setattr(a._membership, "find_push", answered)
        proxy.refusing = False
        if size > SIZES[0]:  # a small push is sent again without asking for its status
            assert asked.wait(20)
        b.step(gradient(size, 1))
        step.result()
        assert a.last_result is not None
        assert (a.last_result.version, a.last_result.contributors) == (1, 2)
        assert model.info().version == 1


def test_put_state_is_not_repeated_over_newer_weights(
    client: Client, far: Client, proxy: "Proxy", eventually: "Eventually"
) -> None:
    """Only the caller can know whether the state should still replace newer weights."""
    model = far.create_model("m", {"w": np.zeros(3)})
    here, state = client.model("m"), model.pull_state()
    proxy.hold_answers()
    with ThreadPoolExecutor(1) as pool, here.worker() as worker:
        put = pool.submit(model.put_state, state)
        eventually(lambda: here.info().version == 1)
        worker.step({"w": np.ones(3)})
        proxy.cut()
        with pytest.raises(deltaserve.UnavailableError) as caught:
            put.result()
        assert caught.value.reason is None
        assert here.info().version == 2


def test_a_closed_port_is_named_in_the_error_within_the_timeout() -> None:
    with held_port() as nobody:
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
        with deltaserve.connect(target, timeout_seconds=0.5) as client:
            began = monotonic()
            with pytest.raises(
                deltaserve.UnavailableError, match=f"cannot reach a server at {target}: is it running"
            ) as caught:
                client.models()
            assert monotonic() - began < 0.5 + SLACK
            assert caught.value.reason is None
            assert "\n" not in str(caught.value)


def test_an_unknown_host_is_named_in_the_error() -> None:
    with (
        deltaserve.connect("no-such-host.invalid:50051", timeout_seconds=0.4) as client,
        pytest.raises(deltaserve.UnavailableError, match=r"no-such-host\.invalid:50051"),
    ):
        client.models()


def test_a_silent_port_is_named_in_the_error_within_the_timeout() -> None:
    """The port accepts connections and data and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with deltaserve.connect(target, timeout_seconds=0.4) as client:
            began = monotonic()
            with pytest.raises(
                deltaserve.UnavailableError, match=rf"{target}.*(did not answer within 0\.4 s|timed out)"
            ):
                client.models()
            assert monotonic() - began < 0.4 + SLACK


def test_a_port_with_another_protocol_raises_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    caller.close()

        threading.Thread(target=answer, daemon=True).start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with deltaserve.connect(target, timeout_seconds=0.4) as client:
            began = monotonic()
            with pytest.raises(deltaserve.Error, match=target):
                client.models()
            assert monotonic() - began < 0.4 + SLACK
        listener.shutdown(socket.SHUT_RDWR)


def test_a_grpc_server_of_another_kind_is_recognised() -> None:
    with ThreadPoolExecutor(1) as pool:
        other = grpc.server(pool)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        try:
            with deltaserve.connect(f"127.0.0.1:{port}", timeout_seconds=10) as client:
                began = monotonic()
                with pytest.raises(deltaserve.Error, match=r"does not speak deltaserve\.v1: is it the right port"):
                    client.models()
                assert monotonic() - began < 5, "nothing is gained by trying again"
        finally:
            other.stop(0).wait()


def test_a_refusal_is_not_retried(client: Client) -> None:
    began = monotonic()
    with pytest.raises(deltaserve.RequestError):
        client.model("no such model")
    assert monotonic() - began < 5


@pytest.mark.deep
@pytest.mark.usefixtures("own_server")
def test_a_draining_server_is_retried_until_the_timeout(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits at least as long as the server asks."""
    budget = 3.5
    with deltaserve.connect(server.target, timeout_seconds=budget) as client:
        model = client.create_model("m", {"w": np.zeros(3)})
        server._catalog.quotas.draining = True
        refuse, attempts = server._catalog.quotas.check_open, list[float]()

        def counted() -> None:
            attempts.append(monotonic())
            refuse()

        monkeypatch.setattr(server._catalog.quotas, "check_open", counted)
        began = monotonic()
        with pytest.raises(deltaserve.UnavailableError, match="about to stop") as caught:
            model.worker()
        assert caught.value.reason == "DRAINING"
        assert budget - 1.5 < monotonic() - began < budget + SLACK
        assert 2 <= len(attempts) <= 4
        gaps = [later - before for before, later in pairwise(attempts)]
        assert min(gaps) > 0.99, "the server asks for a second's patience"
