"""From the lineages of a server, a worker decides to continue, to roll back, or that the model is another one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve import Client, ConflictError, RolledBackError, StateLostError, Worker
from deltaserve._recovery import NothingLost, RolledBack, compare
from deltaserve._transport.unary import UnaryTransport
from deltaserve.v1 import worker_service_pb2 as rpc

A, B, C, D = b"a", b"b", b"c", b"d"
NOTHING, NO_PUSH = NothingLost(), range(10, 10)
ONE = {"w": np.ones(3, np.float32)}

TABLE = {
    # The worker's lineages, the server's, and the acknowledged and applied pushes.
    "the same lineage, further on": ({A: 7}, {A: 9}, 9, 9, NOTHING),
    "a clean restart": ({A: 7}, {A: 7, B: 7}, 9, 9, NOTHING),
    "a clean restart, and others have gone on": ({A: 7}, {A: 7, B: 20}, 9, 9, NOTHING),
    "two restarts since": ({A: 7}, {A: 8, B: 8, C: 12}, 9, 9, NOTHING),
    "versions after the worker's were lost": ({A: 7}, {A: 8, B: 9}, 9, 9, NOTHING),
    "the push under way was applied": ({A: 7}, {A: 8, B: 8}, 9, 10, NOTHING),
    "the session is not known, the weights are": ({A: 7}, {A: 7, B: 8}, 9, None, NOTHING),
    "weights and pushes were lost": ({A: 7}, {A: 3, B: 3}, 9, 5, RolledBack(3, range(6, 10))),
    "lost, and others have gone beyond": ({A: 7}, {A: 3, B: 23}, 9, 5, RolledBack(3, range(6, 10))),
    "weights were lost, made by others": ({A: 7}, {A: 6, B: 6}, 9, 9, RolledBack(6, NO_PUSH)),
    "a lost session": ({A: 7}, {A: 3, B: 3}, 9, None, RolledBack(3, range(1, 10))),
    "a backup from before the worker's lineage": ({A: 5, B: 9}, {A: 5, C: 5}, 9, 5, RolledBack(5, range(6, 10))),
    "the same, of a worker that has nothing newer": ({A: 5, B: 5}, {A: 5, C: 8}, 9, 9, NOTHING),
    "a backup from within an older lineage": ({A: 5, B: 9, C: 9}, {A: 3, D: 4}, 9, 2, RolledBack(3, range(3, 10))),
    "a backup of the worker's own lineage": ({A: 5, B: 9}, {A: 5, B: 6}, 9, 6, RolledBack(6, range(7, 10))),
    "a backup that kept its lineage": ({A: 1457}, {A: 486}, 1457, 486, RolledBack(486, range(487, 1458))),
    "an acknowledged push is missing": ({A: 7}, {A: 7, B: 7}, 9, 8, RolledBack(7, range(9, 10))),
    "another model": ({A: 7}, {B: 7}, 9, 9, None),
    "another model with a past": ({A: 5, B: 7}, {C: 5, D: 7}, 9, 9, None),
}


@pytest.mark.parametrize("what", TABLE)
def test_what_is_lost(what: str) -> None:
    worker, server, acknowledged, applied, expected = TABLE[what]
    assert compare(worker, server, acknowledged=acknowledged, last_applied=applied) == expected


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_a_server_that_loses_nothing_never_rolls_a_worker_back(growth: list[int], data: st.DataObject) -> None:
    """The server may have begun any number of lineages since the worker's last one."""
    version, server = 0, dict[bytes, int]()
    for number, versions in enumerate(growth):
        version += versions
        server[bytes([number])] = version
    known = data.draw(st.integers(1, len(growth)))
    lineages = list(server)[:known]
    first = server[lineages[-2]] if known > 1 else 0
    worker = {
        **{one: server[one] for one in lineages},
        lineages[-1]: data.draw(st.integers(first, server[lineages[-1]])),
    }
    assert compare(worker, server, acknowledged=4, last_applied=4) == NOTHING


@pytest.fixture
def worker(client: Client) -> Worker:
    opened = client.create_model("m", ONE).worker("a")
    for _ in range(3):
        opened.step(ONE)
    return opened


@pytest.fixture
def refusing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[rpc.PushHeader]]:
    """Makes the server refuse one push with LINEAGE_CHANGED and then report a new lineage; returns the sent headers."""

    def arm(ancestors: dict[bytes, int], lineage: bytes, version: int, applied: int) -> list[rpc.PushHeader]:
        sent, step = list[rpc.PushHeader](), UnaryTransport.step
        real = worker._session.opened.lineage
        kept = worker._session.keep()
        kept.lineage, kept.position.version, kept.last_applied_sequence = lineage, version, applied
        kept.ancestors.extend(rpc.Ancestor(lineage=name, version=left) for name, left in ancestors.items())

        def refused_once(self: UnaryTransport, push: Any, weights: Any) -> Any:
            sent.append(rpc.PushHeader.FromString(push.header.SerializeToString()))
            if len(sent) == 1:
                raise ConflictError("the lineage changed", reason="LINEAGE_CHANGED")
            push.header.lineage = real  # the server has not restarted
            return step(self, push, weights)

        monkeypatch.setattr(UnaryTransport, "step", refused_once)
        monkeypatch.setattr(worker._session, "keep", lambda *_: kept)
        return sent

    return arm


def test_every_push_names_the_lineage_that_its_weights_belong_to(worker: Worker) -> None:
    header = worker._header([], None, 1.0)
    assert header.lineage == worker._session.opened.lineage


def test_a_worker_continues_in_its_session_under_the_new_lineage(
    worker: Worker, refusing: Callable[..., list[rpc.PushHeader]]
) -> None:
    session, old = worker._session, worker._session.opened.lineage
    sent = refusing({old: 3}, B, 3, 3)
    worker.step(ONE)
    assert [(header.lineage, header.sequence, header.base_version) for header in sent] == [(old, 4, 3), (B, 4, 3)]
    assert worker._session is session
    assert worker.last_result is not None
    assert (worker.version, worker.last_result.duplicate) == (4, False)


def test_a_worker_learns_that_a_backup_was_restored(
    client: Client, worker: Worker, refusing: Callable[..., list[rpc.PushHeader]]
) -> None:
    """The backup includes the session, so only the lineages differ."""
    refusing({worker._session.opened.lineage: 1}, B, 1, 1)
    with pytest.raises(RolledBackError) as caught:
        worker.step(ONE)
    assert (caught.value.version, caught.value.restored_version, caught.value.lost_pushes) == (3, 1, range(2, 4))
    assert [session.epoch for session in client.model("m").info().sessions] == [2]
    worker.step(ONE)
    assert worker.version == 4


def test_an_interrupt_while_a_new_session_opens_does_not_fence_the_worker_for_good(
    client: Client, worker: Worker, refusing: Callable[..., list[rpc.PushHeader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has opened it, so the session that the worker knows is fenced by its own successor."""
    refusing({worker._session.opened.lineage: 1}, B, 1, 1)
    call = client._connection.call

    def interrupted(method: str, *arguments: Any, **options: Any) -> Any:
        answer = call(method, *arguments, **options)
        if method == "OpenSession":
            raise KeyboardInterrupt
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(client._connection, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.step(ONE)
    worker.step(ONE)
    assert worker.version == 4
    assert [session.epoch for session in client.model("m").info().sessions] == [3]


def test_a_worker_does_not_push_to_another_model_of_the_same_name(
    worker: Worker, refusing: Callable[..., list[rpc.PushHeader]]
) -> None:
    sent = refusing({}, B, 3, 3)
    with pytest.raises(StateLostError, match="a different model of the same name"):
        worker.step(ONE)
    assert len(sent) == 1


def test_a_worker_stops_asking_a_contradictory_server(
    worker: Worker, refusing: Callable[..., list[rpc.PushHeader]]
) -> None:
    refusing({}, worker._session.opened.lineage, 3, 3)
    with pytest.raises(ConflictError) as caught:
        worker.step(ONE)
    assert caught.value.reason == "LINEAGE_CHANGED"


def test_a_session_opens_under_the_newest_lineage_that_the_server_knows(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server restored from a backup does not know the lineages that began after it."""
    membership, tried = worker._membership, list[bytes]()
    membership._ancestors = [rpc.Ancestor(lineage=name, version=1) for name in (A, B)]

    def known_to_a_backup(lineage: bytes) -> Any:
        tried.append(lineage)
        if lineage != A:
            raise StateLostError("unknown", reason="LINEAGE_UNKNOWN")
        return "opened"

    monkeypatch.setattr(membership, "_open", known_to_a_backup)
    assert membership._open_session() == "opened"  # type: ignore[comparison-overlap]
    assert tried == [membership.lineage, B, A]
    membership._ancestors = []
    with pytest.raises(StateLostError):
        membership._open_session()


def test_a_worker_without_weights_has_nothing_to_lose(client: Client) -> None:
    model = client.create_model("m", ONE)
    with model.worker("b") as other:
        other.step(ONE)
    fresh = model.worker("a")
    history = {**{one.lineage: one.version for one in fresh._membership._ancestors}, fresh._membership.lineage: 1}
    assert fresh._membership._version == 1
    assert compare(history, {**history, B: 1}, acknowledged=0, last_applied=0) == NOTHING
