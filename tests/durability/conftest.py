"""What the tests of the durability room begin with: a quick place for files, small journals, and nothing executed."""

import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaserve_server.durability import journal

# What several files of tests use, and the random histories of the simulation; no folder of tests is a package.
_HERE = Path(__file__).parent
sys.path += [str(_HERE / "scene"), str(_HERE.parent / "simulation")]

FULL = os.environ.get("DELTASERVE_FULL") == "1"
"""Whether the numbers of the promises are reached, which takes minutes; else a few hundred trials each."""


@pytest.fixture
def full() -> bool:
    """Whether all trials are wanted."""
    return FULL


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has such; an fsync is free there, and every byte is kept as on a disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="deltaserve-test-", dir=memory))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(autouse=True)
def small_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is set aside in portions of 64 KiB, not of 16 MiB, so that a data directory is quick to copy.

    What is written to a journal that a model has was never more than what was set aside.
    """
    monkeypatch.setattr(journal, "_ALLOCATED", 1 << 16)
    write = journal.Journal.write

    def within(made: journal.Journal, *given: Any, **more: Any) -> None:
        write(made, *given, **more)
        assert made.size <= made._allocated

    monkeypatch.setattr(journal.Journal, "write", within)


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """G19: whatever is read from a disk, nobody asks for a pickle."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
