"""When a snapshot is due, on a clock that the test advances."""

import errno
from pathlib import Path

import pytest
from model_host import ModelHost
from trouble import Trouble

from deltaserve_server.durability import directory, model_storage
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Refused


class Time:
    """A clock that stands still.

    Attributes:
        now: Its time.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def put(engine: ModelEngine) -> None:
    """Adds a record that requests no snapshot."""
    engine.open_session("a", 900.0)


@pytest.mark.parametrize("durability", ["snapshot", "journal"])
def test_a_snapshot_is_due_after_some_seconds_in_which_something_happened(quick: Path, durability: str) -> None:
    time = Time()
    host = ModelHost(quick / "data", durability, seconds=60.0, time=time)
    engine = host.create()
    time.now += 100
    assert not engine.is_due(), "nothing has happened"
    put(engine)
    assert engine.is_due()
    entry = engine.save()
    assert entry.taken_at == time.now
    put(engine)
    time.now += 59
    assert not engine.is_due()
    time.now += 2
    assert engine.is_due()
    host.die()


def test_a_snapshot_is_due_after_some_updates(quick: Path) -> None:
    host = ModelHost(quick / "data", "journal", updates=2, time=Time())
    engine = host.create()
    for expected in (False, True):
        engine.put_state(engine.state(), [0, 0, 0])
        engine.storage._snapshot_wanted = False  # type: ignore[union-attr]
        assert engine.is_due() == expected
    host.die()


def test_a_snapshot_is_due_when_the_journal_has_many_records(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_storage, "_JOURNAL_RECORDS_MAX", 3)
    host = ModelHost(quick / "data", "journal", time=Time())
    engine = host.create()
    for expected in (False, False, True):
        put(engine)
        assert engine.is_due() == expected
    engine.save()
    put(engine)
    assert not engine.is_due()
    host.die()


def test_a_failed_snapshot_is_tried_again_later_and_sooner_while_the_journal_is_broken(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, trouble = Time(), Trouble()
    monkeypatch.setattr(directory, "Files", trouble.files)
    host = ModelHost(quick / "data", "journal", seconds=1.0, time=time)
    engine = host.create()
    put(engine)
    time.now += 10
    trouble.errors["create"] = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        engine.save()
    time.now += 4.9
    assert not engine.is_due()
    time.now += 0.2
    assert engine.is_due()
    trouble.errors["write"] = errno.EIO
    with pytest.raises(Refused, match="STORAGE_UNAVAILABLE"):
        put(engine)
    assert engine.is_due(), "nothing else can make it durable"
    with pytest.raises(OSError, match="No space left"):
        engine.save()
    time.now += 0.4
    assert not engine.is_due()
    time.now += 0.2
    assert engine.is_due()
    trouble.lift()
    engine.save()
    assert not engine.is_due()
    host.die()
