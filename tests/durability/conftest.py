"""Fixtures of the durability tests: a fast folder, small journals, and a guard against code execution.

`make test` runs samples; `make test-deep` runs the enumerations. With DELTASERVE_FULL=1 the deep tier reaches the
numbers of the promises G2, G4 and G19, which takes many minutes.
"""

import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba.core.caching
import pytest

from deltaserve_server.durability import journal

# Folders of tests are no packages: the helpers of these tests, and the random histories of the simulation.
_HERE = Path(__file__).parent
sys.path += [str(_HERE / "scene"), str(_HERE.parent / "simulation")]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.deep)], ids=["sample", "many"])
def many(request: pytest.FixtureRequest) -> bool:
    """Whether a test runs many trials (deep tier) or a sample."""
    return bool(request.param)


@pytest.fixture
def full() -> bool:
    """Whether a deep test reaches the numbers of the promises."""
    return os.environ.get("DELTASERVE_FULL") == "1"


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where fsync costs nothing; on disk if the system has no /dev/shm."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="deltaserve-test-", dir=memory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def small_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocates 64 KiB at a time instead of 16 MiB, so that a data directory is quick to copy.

    Also checks that a journal never writes beyond what it has allocated.
    """
    monkeypatch.setattr(journal, "_ALLOCATED", 1 << 16)
    write = journal.Journal.write

    def within(made: journal.Journal, *given: Any, **more: Any) -> None:
        write(made, *given, **more)
        assert made.size <= made._allocated

    monkeypatch.setattr(journal.Journal, "write", within)


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """G19: nothing that is read from a disk is unpickled, except for kernels in numba's own cache."""
    monkeypatch.setattr(numba.core.caching, "pickle", SimpleNamespace(**vars(pickle)))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
