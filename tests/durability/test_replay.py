"""A server that dies at any moment comes back as it was: what is written down makes the same history again."""

from pathlib import Path

import pytest
from crowd import POLICIES, Crowd
from house import MEMORY, Clock, House, check_comes_back, copied, machine, random, recovered, seen

from deltaserve_server.durability import folder
from deltaserve_server.durability.commits import Journaled
from deltaserve_server.durability.errors import CorruptError
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Push, Session, Sync


@pytest.mark.parametrize("seed", range(8))
def test_a_model_whose_server_dies_after_any_call_comes_back_as_it_was(
    quick: Path, monkeypatch: pytest.MonkeyPatch, seed: int, full: bool
) -> None:
    clock, house = Clock(monkeypatch), House(quick / "data")
    crowd = Crowd(house.create(machine(policy=POLICIES[seed % len(POLICIES)])), seed, clock)
    for _ in range(800 if full else 100):
        crowd.act()
        check_comes_back(recovered(copied(quick / "data", quick / "copy")), crowd.engine)
    house.die()


@pytest.mark.parametrize("durability", ["journal", "fsync"])
@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_dies_and_comes_back_again_and_again_goes_on(
    quick: Path, monkeypatch: pytest.MonkeyPatch, seed: int, durability: str, full: bool
) -> None:
    clock, house = Clock(monkeypatch), House(quick / "data", durability)
    crowd = Crowd(house.create(), seed + 100, clock)
    lives = 0
    for _ in range(2000 if full else 250):
        crowd.act()
        if crowd.chance.random() < 0.08:
            before = crowd.engine
            house.die()
            house = House(quick / "data", durability)
            crowd.engine = house.restore()
            check_comes_back(seen(crowd.engine), before)
            live = {session.worker: session for session in crowd.engine.machine.sessions.live()}
            crowd.sessions = live or crowd.sessions
            lives += 1
    house.die()
    assert lives > 5


def test_vectors_that_came_back_are_not_used_for_anything_else(quick: Path) -> None:
    """A round of several pushes is summed in a vector of the store's own, which was the weights' once."""
    house = House(quick / "data")
    house.create(machine(policy=Sync(min_workers=2)))
    house.die()
    house = House(quick / "data")
    engine = house.restore()
    before, current = seen(engine).vectors[0], engine._store.current
    first, second = engine.open_session("a", 100.0), engine.open_session("b", 100.0)
    with engine.reading() as (_, weights):
        for session in (first, second):
            _push(engine, session, 1)
        assert engine.machine.version == 1
        assert weights.tobytes() == before == current.weights.tobytes()
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    house.die()


def test_who_was_taken_into_a_round_beside_one_who_came_back_is_in_it_after_a_restart(quick: Path) -> None:
    house = House(quick / "data")
    engine = house.create(machine(policy=Sync(min_workers=2, reduction="median")))
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
    came = recovered(copied(quick / "data", quick / "copy"))
    assert came.version == 1
    check_comes_back(came, engine)
    house.die()


@pytest.mark.parametrize("first", ["snapshot", "journal", "fsync"])
def test_a_model_keeps_what_it_was_told_whatever_durability_it_had_before(
    quick: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that was taken without a journal is followed by one when the next server keeps one."""
    clock, modes = Clock(monkeypatch), [first, "journal", "snapshot", "fsync", "journal"]
    house = House(quick / "data", first)
    crowd = Crowd(house.create(), 7, clock)
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
            before.storage.close(before._checkpoint)
        house.die()
        house = House(quick / "data", modes[(seed + 1) % len(modes)])
        crowd.engine = house.restore()
        crowd.sessions = {}
        if mode != "snapshot":
            check_comes_back(seen(crowd.engine), before)
    house.die()


def test_a_journal_that_a_loss_of_power_has_shortened_is_whole_afterwards(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(quick / "data", "fsync")
    crowd = Crowd(house.create(), 7, Clock(monkeypatch))
    crowd.push()
    journal, commits = quick / "data" / "models" / "m" / "journal-00000002", crowd.engine._commits
    assert isinstance(commits, Journaled)
    content = journal.read_bytes()[: commits._journal.size]
    house.die()
    journal.write_bytes(content)
    with monkeypatch.context() as power:
        power.setattr(folder, "boot", lambda: "another")
        house = House(quick / "data", "fsync")
        house.restore()
        house.die()
    check_comes_back(recovered(quick / "data", durability="fsync"), crowd.engine)


def test_the_journal_that_a_server_began_with_is_missed(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No snapshot speaks of it yet."""
    house = House(quick / "data")
    crowd = Crowd(house.create(), 7, Clock(monkeypatch))
    crowd.push()
    house.die()
    house = House(quick / "data")
    house.restore()
    house.die()
    (quick / "data" / "models" / "m" / "journal-00000003").unlink()
    with pytest.raises(CorruptError, match="journal-00000003: it is missing"):
        recovered(quick / "data")
    assert recovered(quick / "data", accept_data_loss=True).version == 1


def test_a_very_small_clip_norm_and_a_large_weight_come_back(quick: Path) -> None:
    house = House(quick / "data")
    engine = house.create(machine(policy=Sync(clip_norm=1e-300)))
    session = engine.open_session("a", 100.0)
    _push(engine, session, 1, weight=1e9, norm=1e10)
    assert engine.machine.version == 1
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    house.die()


def test_an_update_of_infinite_norm_comes_back(quick: Path) -> None:
    house = House(quick / "data")
    engine = house.create()
    session = engine.open_session("a", 100.0)
    monkeypatched = engine._store.update
    engine._store.update = lambda *given: (monkeypatched(*given), float("inf"))[1]  # type: ignore[method-assign]
    _push(engine, session, 1)
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    house.die()


def test_coming_back_twice_from_one_loss_is_as_coming_back_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that end because versions were lost are not alive again when the next server comes back."""
    house = House(quick / "data")
    engine = house.create()
    sessions = [engine.open_session(name, 100.0) for name in "ab"]
    _push(engine, sessions[0], 1)
    house.die()
    monkeypatch.setattr(folder, "boot", lambda: "another")
    house = House(quick / "data")
    monkeypatch.undo()
    engine = house.restore()
    monkeypatch.setattr(folder, "boot", lambda: "another")
    house.die()
    house = House(quick / "data")
    engine = house.restore()
    assert not len(engine.machine.sessions), "the machine was started anew: what they know may be lost"
    monkeypatch.undo()
    check_comes_back(recovered(copied(quick / "data", quick / "copy")), engine)
    house.die()


def _push(engine: ModelEngine, session: Session, sequence: int, weight: float = 1.0, norm: float = 1.0) -> None:
    size = engine.machine.layout.offsets[session.tensor_count]
    staging = engine.stage()
    staging.add(0, random(size, sequence))
    push = Push(
        session_id=session.id, epoch=session.epoch, sequence=sequence, weight=weight, norm=norm, fingerprint=sequence
    )
    engine.push(push, staging, MEMORY.reserve(0))
