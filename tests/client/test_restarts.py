"""After a server restarts from its data directory, workers continue or learn what is lost."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.support.states import assert_same_state

import deltaserve
from deltaserve import Model, RolledBackError, Sync, Worker
from deltaserve._connection import Connection

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, ServerProcess, StartServer

pytestmark = pytest.mark.deep

SMALL = {"w": np.linspace(-1, 1, 5, dtype=np.float32), "b": np.ones((), np.float32)}
LARGE = {"w": np.linspace(-1, 1, 400_000, dtype=np.float32)}


def gradient(start: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {name: (values * 0.1 * number).astype(np.float32) for name, values in start.items()}


def steps(worker: Worker, start: Mapping[str, Any], numbers: range) -> None:
    for number in numbers:
        worker.step(gradient(start, number))


def same(one: Model, other: Model) -> None:
    """Asserts that the states of two models have the same bits."""
    assert_same_state(one.pull_state(), other.pull_state())


@pytest.fixture
def undisturbed(client: deltaserve.Client) -> Model:
    """A model on another server that never restarts."""
    return client.create_model("m", SMALL)


@pytest.mark.parametrize(("durability", "ending"), [("journal", "kill"), ("fsync", "kill"), ("journal", "end")])
@pytest.mark.parametrize(
    ("start", "transport", "wire"),
    [(SMALL, "auto", "float32"), (LARGE, "stream", "bfloat16"), (LARGE, "shared", "float32")],
    ids=["one message", "chunks", "shared memory"],
)
def test_a_worker_continues_as_if_nothing_had_happened(
    start_server: "StartServer",
    client: deltaserve.Client,
    tmp_path: Path,
    durability: str,
    ending: str,
    start: dict[str, Any],
    transport: Any,
    wire: Any,
) -> None:
    """The worker keeps its session and its transport, and the bits equal those of a run without a restart."""
    server = start_server(data_dir=str(tmp_path / "data"), durability=durability)
    twin = client.create_model("m", start)
    with (
        deltaserve.connect(server.target, timeout_seconds=30) as mine,
        twin.worker("a", transport=transport, wire=wire) as other,
    ):
        model = mine.create_model("m", start)
        worker = model.worker("a", transport=transport, wire=wire)
        for life in range(2):
            numbers = range(1 + 5 * life, 6 + 5 * life)
            steps(worker, start, numbers)
            steps(other, start, numbers)
            assert model.info().durable_version == worker.version == numbers[-1]
            getattr(server, ending)()
            server.start()
        same(model, twin)
        assert [session.epoch for session in model.info().sessions] == [1]
        steps(worker, start, range(11, 13))
        steps(other, start, range(11, 13))
        same(model, twin)
        assert (getattr(worker._membership.transport(), "memory", None) is not None) == (transport == "shared")
        worker.close()


def test_a_gradient_is_sent_only_after_a_restarted_server_reports_the_session(
    start_server: "StartServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that the worker sends only small calls, so that the gradient is not sent in vain or twice."""
    calls: list[str] = []
    really = Connection.stub

    def counted(connection: Connection, method: str) -> Any:
        calls.append(method)
        return really(connection, method)

    server = start_server(data_dir=str(tmp_path), durability="journal")
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        worker = client.create_model("m", LARGE).worker("a", transport="stream")
        steps(worker, LARGE, range(1, 3))
        server.kill()
        server.start()
        monkeypatch.setattr(Connection, "stub", counted)
        steps(worker, LARGE, range(3, 4))
    assert calls[: calls.index("CloseSession")][-2:] == ["KeepSession", "StreamStep"]
    assert calls.count("StreamStep") == 2


def test_waiting_workers_repeat_their_round_after_a_restart(
    start_server: "StartServer", tmp_path: Path, eventually: "Eventually"
) -> None:
    server = start_server(data_dir=str(tmp_path), durability="journal")
    with deltaserve.connect(server.target, timeout_seconds=30) as client, ThreadPoolExecutor(1) as pool:
        model = client.create_model("m", SMALL, policy=Sync(min_workers=2))
        one, two = model.worker("one"), model.worker("two")
        step = pool.submit(one.step, SMALL)
        eventually(lambda: any(session.waiting for session in model.info().sessions))
        server.kill()
        server.start()
        two.step(SMALL)
        step.result()
        assert one.version == two.version == 1
        assert one.last_result
        assert one.last_result.contributors == 2


def test_a_duplicate_gets_its_first_result_after_a_restart(start_server: "StartServer", tmp_path: Path) -> None:
    server = start_server(data_dir=str(tmp_path), durability="journal")
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        worker = client.create_model("m", SMALL).worker("a")
        steps(worker, SMALL, range(1, 4))
        first = worker.get_push(3)
        server.kill()
        server.start()
        assert worker.get_push(3) == first
        worker._session.sequence -= 1  # as if the answer had been lost
        worker.step(gradient(SMALL, 3))
        result = worker.last_result
        assert result
        assert result.duplicate
        assert first.result
        assert (result.version, result.update_norm) == (3, first.result.update_norm)


class _SavedModel:
    """A model with a snapshot at version 3 that has reached version 7."""

    def __init__(self, client: deltaserve.Client) -> None:
        self.model = client.create_model("m", SMALL)
        self.worker = self.model.worker("a")
        steps(self.worker, SMALL, range(1, 4))
        assert self.model.save_snapshot().version == 3
        steps(self.worker, SMALL, range(4, 8))
        assert self.model.info().durable_version == 3


def _restart(server: "ServerProcess") -> None:
    server.kill()
    server.start()


def test_a_worker_learns_what_the_snapshot_lacks(start_server: "StartServer", tmp_path: Path) -> None:
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        saved = _SavedModel(client)
        _restart(server)
        with pytest.raises(RolledBackError) as caught:
            saved.worker.step(gradient(SMALL, 8))
        error = caught.value
        assert (error.version, error.restored_version, error.lost_pushes) == (7, 3, range(4, 8))
        assert "has gone back to version 3 of model m: what came after is lost, pushes 4 to 7" in str(error)
        assert saved.worker.version == 3
        steps(saved.worker, SMALL, range(4, 8))
        assert saved.worker.version == saved.model.info().version == 7
        assert [session.epoch for session in saved.model.info().sessions] == [2]


def test_an_interrupt_while_the_new_session_opens_hides_no_loss(
    start_server: "StartServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        saved = _SavedModel(client)
        _restart(server)
        call = client._connection.call

        def interrupted(method: str, *arguments: Any, **options: Any) -> Any:
            answer = call(method, *arguments, **options)
            if method == "OpenSession":
                raise KeyboardInterrupt
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(client._connection, "call", interrupted)
            with pytest.raises(KeyboardInterrupt):
                saved.worker.step(gradient(SMALL, 8))
        with pytest.raises(RolledBackError) as caught:
            saved.worker.step(gradient(SMALL, 8))
        assert (caught.value.version, caught.value.lost_pushes) == (7, range(4, 8))
        steps(saved.worker, SMALL, range(4, 8))
        assert saved.worker.version == 7


def test_a_worker_that_only_pulls_gets_the_current_weights_and_a_warning(
    start_server: "StartServer", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        saved = _SavedModel(client)
        _restart(server)
        with caplog.at_level(logging.WARNING, "deltaserve"):
            weights = saved.worker.pull()
        assert "pushes 4 to 7 of this worker among it" in caplog.text
        np.testing.assert_array_equal(weights["w"], saved.model.pull_state().weights["w"])
        assert saved.worker.version == 3


def test_a_lost_lineage_is_detected_at_any_version(start_server: "StartServer", tmp_path: Path) -> None:
    """Another worker took the model past this worker's version, and the server died again."""
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        saved = _SavedModel(client)
        _restart(server)
        with saved.model.worker("b") as other:
            steps(other, SMALL, range(20))
            saved.model.save_snapshot()
        _restart(server)
        assert saved.model.info().version == 23
        with pytest.raises(RolledBackError) as caught:
            saved.worker.step(gradient(SMALL, 8))
        assert (caught.value.version, caught.value.restored_version) == (7, 3)
        assert saved.worker.version == 23


def test_a_worker_that_knows_no_lost_version_continues(start_server: "StartServer", tmp_path: Path) -> None:
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        model = client.create_model("m", SMALL)
        worker = model.worker("a")
        steps(worker, SMALL, range(1, 4))
        model.save_snapshot()
        _restart(server)
        steps(worker, SMALL, range(4, 6))
        assert worker.version == model.info().version == 5


def test_a_clean_stop_loses_nothing_under_snapshot_either(start_server: "StartServer", tmp_path: Path) -> None:
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        saved = _SavedModel(client)
        server.end()
        server.start()
        steps(saved.worker, SMALL, range(8, 10))
        assert saved.worker.version == saved.model.info().version == 9
        assert [session.epoch for session in saved.model.info().sessions] == [1]


@pytest.mark.usefixtures("frequent_renewals")
def test_renewals_of_a_lost_session_log_nothing(
    start_server: "StartServer", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Renewals go on before and after the worker learns that the server lost its session."""
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        model = client.create_model("m", SMALL)
        worker = model.worker("a")
        for _ in range(3):
            model.save_snapshot()  # the snapshot includes the session
            worker.step(gradient(SMALL, 1))
            server.kill()
            server.start()
            before = worker._session
            with pytest.raises(RolledBackError):
                worker.step(gradient(SMALL, 1))
            assert not before.renew(20.0)
            assert worker._session.renew(20.0)
        sleep(0.5)
    assert not [record for record in caplog.records if "lease" in record.getMessage()]


def test_a_worker_learns_that_its_layout_is_lost(start_server: "StartServer", tmp_path: Path) -> None:
    server = start_server(data_dir=str(tmp_path))
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        model = client.create_model("m", SMALL)
        folder = tmp_path / "models" / "m"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        model.extend({"more": np.zeros(3, np.float32)})
        worker = model.worker("a")
        worker.pull()
        server.kill()
        for path in folder.iterdir():  # as if the next snapshot did not exist yet
            path.unlink()
        for name, content in before.items():
            (folder / name).write_bytes(content)
        server.start()
        with pytest.raises(deltaserve.StateLostError, match="extend the model again"):
            worker.step({**SMALL, "more": np.zeros(3, np.float32)})


def test_deleted_models_stay_deleted_and_a_new_one_of_the_name_is_another(
    start_server: "StartServer", tmp_path: Path
) -> None:
    server = start_server(data_dir=str(tmp_path), durability="fsync")
    with deltaserve.connect(server.target, timeout_seconds=30) as client:
        worker = client.create_model("m", SMALL).worker("a")
        steps(worker, SMALL, range(1, 4))
        client.delete_model("m")
        _restart(server)
        assert client.models() == []
        client.create_model("m", SMALL)
        with pytest.raises(deltaserve.StateLostError):
            worker.step(SMALL)
        _restart(server)
        assert [model.version for model in client.models()] == [0]
