"""When a worker uses shared memory, and how it falls back to messages."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deltaserve
from deltaserve import Client, Model, Sync, Worker
from deltaserve._transport.protocol import TRANSPORTS, TransportName
from deltaserve._transport.shared_memory import SharedMemory
from deltaserve._transport.stream import StreamTransport
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.engine.model_engine import ModelEngine

if TYPE_CHECKING:
    pass

SIZE = 300_001
"""Size of a model that needs several messages; not a multiple of the chunk size."""


def shares(worker: Worker) -> bool:
    return getattr(worker._membership.transport(), "memory", None) is not None


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.mark.parametrize(
    ("size", "transport", "expected"),
    [
        (SIZE, "auto", True),
        (1 << 18, "auto", False),
        ((1 << 18) + 1, "auto", True),
        (3, "auto", False),
        (3, "shared", True),
        (SIZE, "shared", True),
        (SIZE, "stream", False),
        (3, "stream", False),
    ],
)
def test_who_shares_memory(client: Client, size: int, transport: TransportName, expected: bool) -> None:
    model = client.create_model("m", {"w": np.zeros(size)})
    with model.worker(transport=transport) as worker:
        assert shares(worker) == expected
        worker.step({"w": np.ones(size)})
        assert model.info().version == 1


@pytest.fixture
def reserved() -> Iterator[Client]:
    """A client of a server with shared memory disabled."""
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", shared_memory=False)
    with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=20) as client:
        yield client


def test_a_server_that_does_not_share_memory(reserved: Client) -> None:
    model = reserved.create_model("m", {"w": np.zeros(SIZE)})
    with model.worker(transport="auto") as worker:
        assert not shares(worker)
        worker.step({"w": np.ones(SIZE)})
    with pytest.raises(deltaserve.RequestError, match="no shared memory: the server does not offer it") as caught:
        model.worker(transport="shared")
    assert caught.value.reason == "SHARED_MEMORY_UNAVAILABLE"
    assert model.info().sessions == ()


@pytest.mark.parametrize(
    ("bind", "asked", "expected"),
    [
        ("127.0.0.1:0", None, True),
        ("127.0.0.2:50051", None, True),
        ("localhost:0", None, True),
        ("[::1]:0", None, True),
        ("unix:/tmp/a.sock", None, True),
        ("0.0.0.0:0", None, False),
        ("[::]:0", None, False),
        ("10.0.0.1:0", None, False),
        ("localhost.example:0", None, False),
        ("0.0.0.0:0", True, True),
        ("127.0.0.1:0", False, False),
        ("unix:/tmp/a.sock", False, False),
    ],
)
def test_the_default_depends_on_where_the_server_listens(bind: str, asked: bool | None, expected: bool) -> None:
    assert ServerConfig(bind=bind, shared_memory=asked).offers_shared_memory is expected


def test_a_server_on_all_addresses_shares_memory_only_with_its_host_and_if_asked() -> None:
    for asked in (None, True):
        config = ServerConfig(bind="0.0.0.0:0", device="cpu", shared_memory=asked)
        with LocalServer(config) as server:
            port = server.target.rpartition(":")[2]
            with deltaserve.connect(f"127.0.0.1:{port}", timeout_seconds=20) as client:
                worker = client.create_model("m", {"w": np.zeros(SIZE)}).worker()
                assert shares(worker) == bool(asked)


@pytest.mark.parametrize("transport", ["", "AUTO", "tcp", None])
def test_an_unknown_transport_is_refused(client: Client, transport: Any) -> None:
    model = client.create_model("m", {"w": np.zeros(3)})
    with pytest.raises(ValueError, match="transport: expected one of auto, stream, shared, got"):
        model.worker(transport=transport)
    assert model.info().sessions == ()
    assert set(TRANSPORTS) == {"auto", "stream", "shared"}


@pytest.mark.parametrize("field", ["name", "process_id", "descriptor", "bytes"])
def test_memory_that_is_not_the_servers_is_not_used(
    client: Client, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """In another container the same process id and descriptor may name another file."""
    honest = ModelEngine.open_shared_memory

    def misleading(*arguments: Any) -> Any:
        handle = honest(*arguments)
        fields = {
            "name": ("name", "deltaserve-" + "0" * 32),
            "process_id": ("process_id", 1 << 40),
            "descriptor": ("descriptor", 0),
            "bytes": ("size_bytes", 4),
        }
        from dataclasses import replace

        key, value = fields[field]
        return replace(handle, **{key: value})  # type: ignore[arg-type]

    monkeypatch.setattr(ModelEngine, "open_shared_memory", misleading)
    model = client.create_model("m", {"w": np.zeros(SIZE)})
    with model.worker("a") as worker:
        assert not shares(worker)
        worker.step({"w": np.ones(SIZE)})
    with pytest.raises(OSError):  # noqa: PT011  # the operating system chooses the subclass
        model.worker("b", transport="shared")
    assert model.info().sessions == ()
    assert model.info().version == 1


def test_without_room_for_shared_memory_messages_are_used() -> None:
    """Shared memory for gradients belongs to a session; messages need memory only during a push."""
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", memory_bytes=(6 + 2) * 4 * SIZE)
    with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=20) as client:
        model = client.create_model("m", {"w": np.zeros(SIZE)})
        with model.worker("a") as a, model.worker("b") as b, model.worker("c") as c:
            assert [shares(worker) for worker in (a, b, c)] == [True, True, False]
            with pytest.raises(deltaserve.UnavailableError) as caught:
                model.worker("d", transport="shared")
            assert caught.value.reason == "MEMORY_BUDGET"
            assert len(model.info().sessions) == 3


def test_memory_that_the_server_lost_is_replaced_by_messages(client: Client, server: LocalServer) -> None:
    """As after a restart that restored the session but not its shared memory."""
    model = client.create_model("m", {"w": np.zeros(SIZE)})
    with model.worker("a") as worker:
        worker.step({"w": np.ones(SIZE)})
        server._catalog.get("m")._shared.clear()
        worker.step({"w": np.ones(SIZE)})
        worker.step({"w": np.ones(SIZE)})
        assert model.info().version == 3


def test_a_bad_value_changes_nothing_and_the_next_push_has_its_number(client: Client) -> None:
    model = client.create_model("m", {"w": np.zeros(SIZE)})
    with model.worker("a") as worker:
        assert shares(worker)
        worker.step({"w": np.ones(SIZE)})
        before = model.pull_state()
        bad = np.ones(SIZE)
        bad[SIZE - 2] = np.nan
        with pytest.raises(deltaserve.RequestError, match=f"NaN or infinity in tensor w at element {SIZE - 2}"):
            worker.step({"w": bad})
        after = model.pull_state()
        assert after.version == before.version
        np.testing.assert_array_equal(before.weights["w"], after.weights["w"])
        worker.step({"w": np.ones(SIZE)})
        assert worker.last_result is not None
        assert (worker.last_result.version, worker.last_result.duplicate) == (2, False)


def test_the_push_after_an_uncertain_one_uses_messages(
    client: Client, server: LocalServer, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor
) -> None:
    ways: list[str] = []
    for kind, way in ((SharedMemory, "shared"), (StreamTransport, "stream")):
        name = "write_gradient" if kind is SharedMemory else "step"
        honest = getattr(kind, name)

        def traced(*arguments: Any, way: str = way, honest: Any = honest) -> Any:
            ways.append(way)
            return honest(*arguments)

        monkeypatch.setattr(kind, name, traced)
    model: Model = client.create_model("m", {"w": np.zeros(SIZE)}, policy=Sync(min_workers=2))
    with deltaserve.connect(server.target, timeout_seconds=20) as short, model.worker("b", transport="stream") as b:
        a = short.model("m").worker("a", transport="shared")
        a.pull()
        short._connection.timeout_seconds = 0.4
        with pytest.raises(deltaserve.UnavailableError, match="did not answer"):
            a.step({"w": np.ones(SIZE)})
        short._connection.timeout_seconds = 20.0
        assert ways == ["shared"]
        step = threads.submit(a.step, {"w": np.ones(SIZE)})
        b.step({"w": np.full(SIZE, 3.0)})
        step.result()
        assert ways == ["shared", "stream", "stream"]
        assert a.last_result is not None
        assert (a.last_result.version, a.last_result.contributors) == (1, 2)
        step = threads.submit(a.step, {"w": np.ones(SIZE)})
        b.step({"w": np.full(SIZE, 3.0)})
        step.result()
        assert sorted(ways[3:]) == ["shared", "stream"]
        assert model.info().version == 2
        states = {session.worker: session.last_sequence for session in model.info().sessions}
        assert states == {"a": 2, "b": 2}
