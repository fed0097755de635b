"""A worker repeats a push whose result waits for the disk."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from model_host import MEMORY, Clock, ModelHost, machine, random

from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Push, PushResult, Refused, Session, Sync


def push(engine: ModelEngine, session: Session, sequence: int) -> "Future[PushResult]":
    staging = engine.stage()
    staging.add(0, random(engine.machine.layout.size, sequence))
    given = Push(session_id=session.id, epoch=session.epoch, sequence=sequence, fingerprint=sequence)
    return engine.push(given, staging, MEMORY.reserve(0))


def test_a_push_repeated_while_its_refusal_waits_for_the_disk(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its round has failed, but its worker does not know that yet."""
    clock, host = Clock(monkeypatch), ModelHost(quick / "data")
    engine = host.create(machine(policy=Sync(min_workers=2, round_timeout_seconds=1.0)))
    a, b = engine.open_session("a", 100.0), engine.open_session("b", 100.0)
    push(engine, a, 1)
    clock.ahead += 2
    threads = [threading.Thread(target=engine.tick), threading.Thread(target=push, args=(engine, a, 1))]
    with engine._commits.quiet():
        for thread, waiting in zip(threads, (False, True), strict=True):  # round failed, then accepted again
            thread.start()
            deadline = time.monotonic() + 10
            while a.waiting is not waiting and time.monotonic() < deadline:
                time.sleep(0.005)
    for thread in threads:
        thread.join(10)
    assert a.waiting, "it was taken for the next round"
    push(engine, b, 1)
    assert engine.machine.version == 1
    with engine.lock:  # raises if the model is lost
        assert a.last_applied == 1
    host.die()


def test_a_push_repeated_while_its_answer_waits_for_the_disk(quick: Path) -> None:
    host = ModelHost(quick / "data")
    engine = host.create()
    session = engine.open_session("a", 100.0)
    got: list[PushResult] = []
    with engine._commits.quiet():
        threads = [threading.Thread(target=lambda: got.append(push(engine, session, 1).result(10))) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert got == []
    for thread in threads:
        thread.join(10)
    assert [result.version for result in got] == [1, 1, 1]
    assert engine.machine.version == 1
    host.die()


def test_a_push_that_waits_for_the_disk_is_answered_when_its_model_ends(quick: Path) -> None:
    """Whether its record was written or not."""
    host = ModelHost(quick / "data")
    engine = host.create()
    session = engine.open_session("a", 100.0)
    got: list[object] = []

    def work() -> None:
        try:
            got.append(push(engine, session, 1).result(10))
        except Refused as refusal:
            got.append(refusal.reason)

    with engine._commits.quiet():
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        ending = threading.Thread(target=engine.lose, args=(Refused("MODEL_NOT_FOUND", model="m"),))
        ending.start()
        time.sleep(0.1)
    thread.join(10)
    ending.join(10)
    assert len(got) == 1
    assert isinstance(got[0], PushResult) or got[0] in ("MODEL_NOT_FOUND", "STORAGE_UNAVAILABLE")
    host.die()
