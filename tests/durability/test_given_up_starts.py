"""A start that is cancelled during recovery leaves everything for the next start."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crowd import Crowd
from model_host import Clock, ModelHost, Seen, copied, machine, optimizer_of, seen

from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Folder
from deltaserve_server.durability.recovery import Expected


class GivenUp(Exception):
    """The start is cancelled."""


def give_up_after(calls: int) -> Callable[[], None]:
    """Returns a check that raises GivenUp after a number of calls."""
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise GivenUp

    return check


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def made(path: Path, clock: Clock, durability: str) -> Path:
    """Makes the data directory of a killed server with three models."""
    host = ModelHost(path, durability)
    for seed, name in enumerate("abc"):
        crowd = Crowd(host.create(machine(name, optimizer=optimizer_of(name))), seed, clock)
        for _ in range(2):
            crowd.push()
        crowd.save()
        crowd.push()
    host.die()
    return path


def spoil(path: Path) -> None:
    """Corrupts the second model's last journal in the middle."""
    journal = max((path / "models" / "b").glob("journal-*"))
    content = bytearray(journal.read_bytes())
    content[len(content.rstrip(b"\0")) // 2] ^= 1
    journal.write_bytes(content)


def come_back(path: Path, durability: str, check: Callable[[], None] = lambda: None, **more: Any) -> dict[str, Seen]:
    """Starts a server and returns the models that it recovers; shuts it down in order."""
    kept: Any = {"durability": durability, **more}
    server = LocalServer(ServerConfig(device="cpu", data_dir=path, snapshot_seconds=None, **kept))
    server.start(check)
    restored = {engine.machine.name: seen(engine) for engine in server._catalog.all()}
    server.stop(grace_seconds=0)
    return restored


def given_up(source: Path, place: Path, durability: str, **more: Any) -> Iterator[Path]:
    """Cancels a start at each possible point, each time in a copy."""
    for calls in range(1000):
        left = copied(source, place)
        try:
            come_back(left, durability, give_up_after(calls), **more)
        except GivenUp:
            yield left
        else:
            assert calls > 3
            return


@pytest.mark.parametrize(
    "durability", ["journal", *(pytest.param(name, marks=pytest.mark.deep) for name in ("snapshot", "fsync"))]
)
def test_the_start_after_a_cancelled_one_finds_everything(quick: Path, clock: Clock, durability: str) -> None:
    data = made(quick / "data", clock, durability)
    wanted = {name: one.vectors for name, one in come_back(copied(data, quick / "whole"), durability).items()}
    assert sorted(wanted) == ["a", "b", "c"]
    for left in given_up(data, quick / "left", durability):
        assert {name: one.vectors for name, one in come_back(left, durability).items()} == wanted


def test_a_cancelled_start_neither_forgets_nor_enlarges_an_accepted_loss(quick: Path, clock: Clock) -> None:
    data = made(quick / "data", clock, "journal")
    spoil(data)
    accepted: dict[str, Any] = {"accept_data_loss": True}
    wanted = come_back(copied(data, quick / "whole"), "journal", **accepted)
    for left in given_up(data, quick / "left", "journal", **accepted):
        restored = come_back(left, "journal", **accepted)
        assert {name: one.vectors for name, one in restored.items()} == {
            name: one.vectors for name, one in wanted.items()
        }
        heads = {name: Folder(Files(left / "models" / name)).read_head() for name in "abc"}
        assert [name for name, head in heads.items() if head.lost_at is not None] == ["b"]


def test_the_estimate_counts_the_newest_snapshot_and_its_journals(quick: Path, clock: Clock) -> None:
    """Older journals do not count: the progress would end below 100 %."""
    path = made(quick / "data", clock, "journal") / "models" / "a"
    journals, tensors = sorted(path.glob("journal-*")), sorted(path.glob("*.safetensors"))
    assert len(journals) > 1
    assert Expected.of(Folder(Files(path))).bytes == journals[-1].stat().st_size + tensors[-1].stat().st_size
