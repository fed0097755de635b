"""A start that is given up while models are read: whenever that is, the next one finds what this one would have."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crowd import Crowd
from house import Clock, House, Seen, copied, machine, seen

from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability.files import Files
from deltaserve_server.durability.folder import Folder
from deltaserve_server.durability.recovery import Expected


class GivenUp(Exception):
    """Somebody does not want the server any more."""


def give_up_after(calls: int) -> Callable[[], None]:
    """Is called so many times, and then not any more."""
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise GivenUp

    return check


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def made(path: Path, clock: Clock, durability: str) -> Path:
    """A data directory of three models whose server has died."""
    house = House(path, durability)
    for seed, name in enumerate("abc"):
        crowd = Crowd(house.create(machine(name)), seed, clock)
        for _ in range(2):
            crowd.push()
        crowd.save()
        crowd.push()
    house.die()
    return path


def spoil(path: Path) -> None:
    """Makes the second model's last journal bad in its middle."""
    journal = max((path / "models" / "b").glob("journal-*"))
    content = bytearray(journal.read_bytes())
    content[len(content.rstrip(b"\0")) // 2] ^= 1
    journal.write_bytes(content)


def come_back(path: Path, durability: str, check: Callable[[], None] = lambda: None, **more: Any) -> dict[str, Seen]:
    """What a server has in a data directory once it has started; it stops in good order, whether it has or not."""
    kept: Any = {"durability": durability, **more}
    server = LocalServer(ServerConfig(device="cpu", data_dir=path, snapshot_seconds=None, **kept))
    server.start(check)
    came = {engine.machine.name: seen(engine) for engine in server._catalog.all()}
    server.stop(grace_seconds=0)
    return came


def given_up(source: Path, place: Path, durability: str, **more: Any) -> Iterator[Path]:
    """Gives up a start at each point where that is possible, each time in a copy."""
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
def test_the_next_start_finds_everything(quick: Path, clock: Clock, durability: str) -> None:
    data = made(quick / "data", clock, durability)
    wanted = {name: one.vectors for name, one in come_back(copied(data, quick / "whole"), durability).items()}
    assert sorted(wanted) == ["a", "b", "c"]
    for left in given_up(data, quick / "left", durability):
        assert {name: one.vectors for name, one in come_back(left, durability).items()} == wanted


def test_a_loss_that_is_accepted_is_neither_forgotten_nor_larger(quick: Path, clock: Clock) -> None:
    data = made(quick / "data", clock, "journal")
    spoil(data)
    accepted: dict[str, Any] = {"accept_data_loss": True}
    wanted = come_back(copied(data, quick / "whole"), "journal", **accepted)
    for left in given_up(data, quick / "left", "journal", **accepted):
        came = come_back(left, "journal", **accepted)
        assert {name: one.vectors for name, one in came.items()} == {name: one.vectors for name, one in wanted.items()}
        heads = {name: Folder(Files(left / "models" / name)).read_head() for name in "abc"}
        assert [name for name, head in heads.items() if head.lost_at is not None] == ["b"]


def test_how_much_is_to_be_read_is_told(quick: Path, clock: Clock) -> None:
    """Of the journals, those that follow the newest snapshot: the percentage does not end at a half."""
    path = made(quick / "data", clock, "journal") / "models" / "a"
    journals, tensors = sorted(path.glob("journal-*")), sorted(path.glob("*.safetensors"))
    assert len(journals) > 1
    assert Expected.of(Folder(Files(path))).bytes == journals[-1].stat().st_size + tensors[-1].stat().st_size
