"""A worker that knows a lineage and a version finds out from the model's chain whether its weights are lost.

Every start of a server begins a lineage. Backups are taken at any moment, put back at any later one, under any
durability and on any boot; the chain of the server that starts then never calls a version shared that is not, nor lost
one that is there.
"""

import random
import shutil
from itertools import product
from pathlib import Path

import pytest
from boots import Boots
from crowd import Crowd
from model_host import Clock, ModelHost, copied
from trouble import Crash, crashing

from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Ancestor, Folder, Head
from deltaserve_server.durability.model_storage import Durability
from deltaserve_server.engine.model_engine import ModelEngine

DURABILITIES = ("snapshot", "journal", "fsync")
Made = tuple[int, bytes]
"""A version: a number of its own, since the same push may be applied again in another lineage; and the weights."""

Known = tuple[Head, int, Made]
"""What a worker knows: a chain, from OpenSession or KeepSession, a version, and what that version was."""


def verdict(now: Head, known: Head, version: int) -> str:
    """What a worker concludes from the chain of now and the one it knows: "there", "lost", or "unknown".

    The newest lineage that is in both chains was left at some version in each; what came before is shared. The worker's
    own lineage is not in the new chain if the server restarted after the backup was taken.
    """
    chain = {ancestor.lineage: ancestor.version for ancestor in now.ancestors}
    chain[now.lineage] = version  # of the present lineage, every version that the worker knows is there
    for lineage, left_at in ((known.lineage, version), *((a.lineage, a.version) for a in reversed(known.ancestors))):
        if lineage in chain:
            return "there" if version <= min(left_at, chain[lineage]) else "lost"
    return "unknown"


class Life:
    """A model over many starts of its server, with backups of its directory.

    Attributes:
        made: The versions that lead to the present one, by number.
        known: Everything that workers have ever learnt.
    """

    def __init__(self, quick: Path, durability: str, clock: Clock, boots: Boots) -> None:
        self.durability = durability
        self._quick, self._clock, self._boots = quick, clock, boots
        self._data = quick / "data"
        self._backups: list[tuple[Path, list[Made]]] = []
        self.known: list[Known] = []
        self.made: list[Made] = []
        self._seed = 0
        self.host = ModelHost(self._data, durability)
        self._serve(self.host.create())

    def _serve(self, engine: ModelEngine) -> None:
        self._seed += 1
        self.engine, self._crowd = engine, Crowd(engine, self._seed, self._clock)
        self._note()

    def _note(self) -> None:
        """Lets a worker learn the present version."""
        version, weights = self.engine.machine.version, self.engine.state().weights.tobytes()
        del self.made[version + 1 :]
        if version == len(self.made):
            self.made.append((len(self.known), weights))
        self.known.append((self.engine.head, version, self.made[version]))

    def push(self, times: int = 1) -> None:
        for _ in range(times):
            self._crowd.push()
            self._note()

    def save(self) -> None:
        self.engine.save()

    def backup(self) -> None:
        """Copies the directory as it is now."""
        place = copied(self._data, self._quick / f"backup-{len(self._backups)}")
        self._backups.append((place, self.made[:]))

    def restore(self, number: int) -> None:
        """Puts a backup back; the server must not run."""
        place, made = self._backups[number]
        copied(place, self._data)
        self.made = made[:]

    def kill(self) -> None:
        self.host.die()

    def stop(self) -> None:
        self.engine.close()
        self.host.die()

    def start(self, *, power: bool = False) -> ModelEngine:
        """Starts a server and checks what each worker concludes from the chain."""
        self._boots.number += power
        self.host = ModelHost(self._data, self.durability)
        engine = self.host.restore()
        found = engine.state().weights.tobytes()
        version = engine.machine.version
        assert self.made[version][1] == found, "the server recovered something that the model never was"
        for known, known_version, made in self.known:
            kept = known_version <= version and self.made[known_version] == made
            assert verdict(engine.head, known, known_version) == ("there" if kept else "lost")
        self._serve(engine)
        return engine

    def start_that_crashes(self, at: int) -> bool:
        """Starts a server that dies at an operation on the disk; returns False if it does not get that far."""
        host = ModelHost(self._data, self.durability)
        try:
            with crashing(at):
                host.restore()
        except Crash:
            return True
        finally:
            host.die()
        return False


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Boots:
    return Boots(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("moment", ["running", "killed", "stopped"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_backup_that_is_put_back(quick: Path, clock: Clock, boots: Boots, durability: str, moment: str) -> None:
    """The original continues for some versions after the backup, restarted or not."""
    for number, (power, further, restarted) in enumerate(product((False, True), (0, 3), (False, True))):
        life = Life(quick / str(number), durability, clock, boots)
        life.push(2)
        life.save()
        life.push(2)
        if moment == "killed":
            life.kill()
        elif moment == "stopped":
            life.stop()
        life.backup()
        if moment != "running":
            life.start()
        life.push(further)
        original = life.engine
        if restarted:
            life.kill()
            original = life.start()
            life.push(further)
        live = life.known[-1]
        life.kill()
        life.restore(0)
        engine = life.start(power=power)
        assert engine.machine.version == (2 if durability == "snapshot" and moment != "stopped" else 4)
        kept_power = durability == "fsync" or (durability == "journal" and not power) or moment == "stopped"
        assert bool(engine.machine.sessions.live()) == kept_power, "only what the server knows to be lost ends sessions"
        assert original.head.lineage != engine.head.lineage
        if further:
            assert verdict(engine.head, live[0], live[1]) == "lost"


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_backups_kills_boots_and_restores(
    quick: Path, clock: Clock, boots: Boots, durability: str, seed: int
) -> None:
    _walk(quick, clock, boots, durability, seed, 40)


@pytest.mark.deep
@pytest.mark.parametrize("durability", DURABILITIES)
def test_many_orders_of_backups_kills_boots_and_restores(
    quick: Path, clock: Clock, boots: Boots, durability: str
) -> None:
    for seed in range(100, 130):
        _walk(quick / str(seed), clock, boots, durability, seed, 60)
        shutil.rmtree(quick / str(seed))


def _walk(quick: Path, clock: Clock, boots: Boots, durability: str, seed: int, steps: int) -> None:
    chance = random.Random(seed)
    life = Life(quick, durability, clock, boots)
    life.backup()
    backups = 1
    for _ in range(steps):
        step = chance.choice(("push", "push", "push", "save", "backup", "restart", "restart"))
        if step == "push":
            life.push()
        elif step == "save":
            life.save()
        elif step == "backup":
            life.backup()
            backups += 1
        else:
            chance.choice((life.kill, life.stop))()
            if chance.random() < 0.5:
                life.restore(chance.randrange(backups))
            if chance.random() < 0.3:
                life.start_that_crashes(chance.randrange(12))
            if chance.random() < 0.3:
                life.durability = chance.choice(DURABILITIES)
            life.start(power=chance.random() < 0.3)
    life.kill()


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_crash_at_any_operation_of_a_start(quick: Path, clock: Clock, boots: Boots, durability: str) -> None:
    """The new lineage is either unknown to everybody or in the chain of the next start."""
    life = Life(quick, durability, clock, boots)
    life.push(2)
    life.save()
    life.push(2)
    life.kill()
    life.backup()
    for at in range(100):
        life.restore(0)
        crashed = life.start_that_crashes(at)
        life.start()
        life.kill()
        if not crashed:
            break
    assert 3 < at < 99


def test_a_start_ends_no_sessions_and_records_the_version_at_which_it_left_the_lineage(
    quick: Path, clock: Clock, boots: Boots
) -> None:
    life = Life(quick, "fsync", clock, boots)
    life.push(3)
    first = life.engine
    life.kill()
    second = life.start()
    life.push(1)
    life.stop()
    third = life.start()
    life.kill()
    assert third.machine.sessions.live()
    assert third.head.ancestors == (Ancestor(first.head.lineage, 3), Ancestor(second.head.lineage, 4))
    assert Folder(Files(quick / "data" / "models" / "m")).read_head() == third.head, "before anybody is served"


def test_sessions_that_ended_with_a_loss_stay_ended_over_later_starts(quick: Path, clock: Clock, boots: Boots) -> None:
    """The journal still has the records that opened them."""
    life = Life(quick, "journal", clock, boots)
    life.push(2)
    life.kill()
    assert not life.start(power=True).machine.sessions.live()
    life.kill()
    assert not life.start().machine.sessions.live()
    life.kill()


def test_a_chain_has_at_most_256_ancestors_the_newest(quick: Path) -> None:
    heads = [Head.new()]
    for version in range(262):
        heads.append(heads[-1].next_lineage(version))
    chain = heads[-1].ancestors
    assert chain == tuple(Ancestor(heads[version].lineage, version) for version in range(6, 262))
    assert {ancestor.version for ancestor in heads[-1].next_lineage(3).ancestors} == {3}, "later versions are lost"


@pytest.mark.parametrize("moved", [False, True], ids=["restored", "served again"])
def test_a_start_in_a_copied_directory_says_so(
    quick: Path, clock: Clock, boots: Boots, moved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(quick, Durability.FSYNC, clock, boots)
    life.push(1)
    life.kill()
    if not moved:
        (quick / "data").rename(quick / "original")  # whose inode is not free for the copy
        copied(quick / "original", quick / "data")
    life.start()
    life.kill()
    assert ("is a copy, perhaps restored from a backup; the model continues from version 1" in caplog.text) != moved
