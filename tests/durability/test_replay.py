"""Replay: a server that is killed after any call recovers the same state, bit for bit."""

from pathlib import Path

import pytest
from crowd import POLICIES, Crowd
from model_host import (
    MEMORY,
    Clock,
    ModelHost,
    check_comes_back,
    copied,
    machine,
    optimizer_of,
    random,
    recovered,
    seen,
)

from deltaserve_server.durability import folder
from deltaserve_server.durability.commits import Journaled
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Push, Session, Sync


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.deep) for seed in range(2, 8))])
def test_a_crash_after_any_call_recovers_the_same_state(
    quick: Path, monkeypatch: pytest.MonkeyPatch, seed: int, full: bool
) -> None:
    clock, host = Clock(monkeypatch), ModelHost(quick / "data")
    summary = machine(policy=POLICIES[seed % len(POLICIES)], optimizer=optimizer_of(f"after any call {seed}"))
    crowd = Crowd(host.create(summary), seed, clock)
    for _ in range(800 if full else 100):
        crowd.act()
        check_comes_back(recovered(copied(quick / "data", quick / "copy")), crowd.engine)
    host.die()


@pytest.mark.parametrize("durability", ["journal", "fsync"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.deep) for seed in range(1, 4))])
def test_a_model_survives_many_crashes(
    quick: Path, monkeypatch: pytest.MonkeyPatch, seed: int, durability: str, full: bool
) -> None:
    clock, host = Clock(monkeypatch), ModelHost(quick / "data", durability)
    crowd = Crowd(host.create(machine(optimizer=optimizer_of(f"{durability} {seed}"))), seed + 100, clock)
    lives = 0
    for _ in range(2000 if full else 250):
        crowd.act()
        if crowd.chance.random() < 0.08:
            before = crowd.engine
            host.die()
            host = ModelHost(quick / "data", durability)
            crowd.engine = host.restore()
            check_comes_back(seen(crowd.engine), before)
            live = {session.worker: session for session in crowd.engine.machine.sessions.live()}
            crowd.sessions = live or crowd.sessions
            lives += 1
    host.die()
    assert lives > 5


def test_recovered_vectors_are_not_reused_as_buffers(quick: Path) -> None:
    """The store sums a round in a vector that once held weights."""
    host = ModelHost(quick / "data")
    host.create(machine(policy=Sync(min_workers=2)))
    host.die()
    host = ModelHost(quick / "data")
    engine = host.restore()
    before, current = seen(engine).vectors[0], engine._store.current
    first, second = engine.open_session("a", 100.0), engine.open_session("b", 100.0)
    with engine.reading() as (_, weights):
        for session in (first, second):
            _push(engine, session, 1)
        assert engine.machine.version == 1
        assert weights.tobytes() == before == current.weights.tobytes()
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    host.die()


def test_members_of_a_round_stay_members_after_a_restart(quick: Path) -> None:
    host = ModelHost(quick / "data")
    engine = host.create(machine(policy=Sync(min_workers=2, reduction="median")))
    a, b, c = (engine.open_session(name, 100.0) for name in "abc")
    _push(engine, a, 1)
    _push(engine, b, 1)
    late = engine.open_session("d", 100.0)
    again = engine.open_session("a", 100.0)
    assert [late.first_version, again.first_version] == [1, 1]
    engine.change(engine.machine.groups, Sync(min_workers=3, reduction="median"))
    engine.close_session(c.id, c.epoch)
    assert engine.machine.version == 1, "d is taken in"
    assert not again.member
    back = recovered(copied(quick / "data", quick / "copy"))
    assert back.version == 1
    check_comes_back(back, engine)
    host.die()


@pytest.mark.parametrize("first", ["snapshot", "journal", "fsync"])
def test_a_change_of_durability_loses_nothing(quick: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot taken without a journal may be continued by one."""
    clock, modes = Clock(monkeypatch), [first, "journal", "snapshot", "fsync", "journal"]
    host = ModelHost(quick / "data", first)
    crowd = Crowd(host.create(), 7, clock)
    for seed, mode in enumerate(modes):
        for _ in range(10):
            crowd.push()
        if mode == "snapshot":
            crowd.save()
        before = crowd.engine
        if mode != "snapshot":
            check_comes_back(recovered(copied(quick / "data", quick / "copy"), durability=mode), before)
        if seed == 1:
            assert before.storage
            before.close()
        host.die()
        host = ModelHost(quick / "data", modes[(seed + 1) % len(modes)])
        crowd.engine = host.restore()
        crowd.sessions = {}
        if mode != "snapshot":
            check_comes_back(seen(crowd.engine), before)
    host.die()


def test_recovery_repairs_a_journal_that_a_power_failure_has_shortened(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ModelHost(quick / "data", "fsync")
    crowd = Crowd(host.create(), 7, Clock(monkeypatch))
    crowd.push()
    journal, commits = quick / "data" / "models" / "m" / "journal-00000002", crowd.engine._commits
    assert isinstance(commits, Journaled)
    content = journal.read_bytes()[: commits._journal.size]
    host.die()
    journal.write_bytes(content)
    with monkeypatch.context() as power:
        power.setattr(folder, "boot", lambda: "another")
        host = ModelHost(quick / "data", "fsync")
        host.restore()
        host.die()
    check_comes_back(recovered(quick / "data", durability="fsync"), crowd.engine)


def test_a_missing_first_journal_of_a_server_is_detected(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the head names it."""
    host = ModelHost(quick / "data")
    crowd = Crowd(host.create(), 7, Clock(monkeypatch))
    crowd.push()
    host.die()
    host = ModelHost(quick / "data")
    host.restore()
    host.die()
    (quick / "data" / "models" / "m" / "journal-00000003").unlink()
    with pytest.raises(CorruptError, match="journal-00000003: it is missing"):
        recovered(quick / "data")
    assert recovered(quick / "data", accept_data_loss=True).version == 1


def test_a_very_small_clip_norm_and_a_large_weight_come_back(quick: Path) -> None:
    host = ModelHost(quick / "data")
    engine = host.create(machine(policy=Sync(clip_norm=1e-300)))
    session = engine.open_session("a", 100.0)
    _push(engine, session, 1, weight=1e9, norm=1e10)
    assert engine.machine.version == 1
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    host.die()


def test_an_update_of_infinite_norm_comes_back(quick: Path) -> None:
    host = ModelHost(quick / "data")
    engine = host.create()
    session = engine.open_session("a", 100.0)
    monkeypatched = engine._store.update
    engine._store.update = lambda *given: (monkeypatched(*given), float("inf"))[1]  # type: ignore[method-assign]
    _push(engine, session, 1)
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    host.die()


def test_recovering_twice_from_one_loss_gives_the_same_state(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that ended with the loss stay ended."""
    host = ModelHost(quick / "data")
    engine = host.create()
    sessions = [engine.open_session(name, 100.0) for name in "ab"]
    _push(engine, sessions[0], 1)
    host.die()
    monkeypatch.setattr(folder, "boot", lambda: "another")
    host = ModelHost(quick / "data")
    monkeypatch.undo()
    engine = host.restore()
    monkeypatch.setattr(folder, "boot", lambda: "another")
    host.die()
    host = ModelHost(quick / "data")
    engine = host.restore()
    assert not len(engine.machine.sessions), "the machine was started anew: what they know may be lost"
    monkeypatch.undo()
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    host.die()


def _push(engine: ModelEngine, session: Session, sequence: int, weight: float = 1.0, norm: float = 1.0) -> None:
    size = engine.machine.layout.offsets[session.tensor_count]
    staging = engine.stage()
    staging.add(0, random(size, sequence))
    push = Push(
        session_id=session.id, epoch=session.epoch, sequence=sequence, weight=weight, norm=norm, fingerprint=sequence
    )
    engine.push(push, staging, MEMORY.reserve(0))
