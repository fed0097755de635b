"""Effects are called when their records are durable, in order; never if the records could not be written."""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve_server.durability import journal
from deltaserve_server.durability.commits import Commits, Journaled, StorageError, extension_entries
from deltaserve_server.durability.files import File, Files
from deltaserve_server.durability.journal import Journal, JournalReader
from deltaserve_server.durability.records import Ended, Extended, Record, VersionBumped


class Slow(Files):
    """A folder whose files are slow to sync, or fail.

    Attributes:
        seconds: Duration of a sync.
        error: Error number that the operation `at` raises.
        syncs: Number of syncs.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seconds = 0.0
        self.error: int | None = None
        self.at = "sync"
        self.syncs = 0
        self.gate = threading.Event()
        self.gate.set()

    def create(self, name: str) -> File:
        return _SlowFile(self.folder / name, self)


class _SlowFile(File):
    def __init__(self, path: Path, files: Slow) -> None:
        super().__init__(path)
        self._files = files

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        self._fail("write")
        super().write(offset, buffers)

    def allocate(self, start: int, stop: int) -> None:
        self._fail("allocate")
        super().allocate(start, stop)

    def sync(self) -> None:
        self._files.gate.wait(20)
        time.sleep(self._files.seconds)
        self._files.syncs += 1
        self._fail("sync")
        super().sync()

    def _fail(self, what: str) -> None:
        if self._files.error and self._files.at == what:
            raise OSError(self._files.error, os.strerror(self._files.error))


@pytest.fixture
def files(quick: Path) -> Slow:
    return Slow(quick)


@pytest.fixture
def commits(files: Slow) -> Iterator[Journaled]:
    made = Journaled(Journal(files, 1), 0, sync=True)
    files.syncs = 0
    yield made
    made.close()


def written(files: Files, number: int = 1, after: int = 0) -> list[int]:
    """Returns the indices of the records in a journal."""
    reading = JournalReader(Files(files.folder), number, after, lost_power=False)
    return [record.index for record in reading.records()]


def test_effects_wait_for_the_disk(files: Slow, commits: Journaled) -> None:
    called: list[str] = []
    files.gate.clear()
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: called.append("answer"))
    thread = threading.Thread(target=commits.flush)
    thread.start()
    time.sleep(0.1)
    assert called == []
    assert thread.is_alive(), "who brought it waits"
    files.gate.set()
    thread.join(10)
    assert called == ["answer"]
    assert written(files) == [1]


def test_without_fsync_effects_wait_for_the_write_only(files: Slow, commits: Journaled) -> None:
    quick = Journaled(Journal(files, 2), 0, sync=False)
    files.syncs = 0
    quick.add(VersionBumped(1))
    quick.flush()
    assert files.syncs == 0
    assert written(files, 2) == [1]
    quick.close()


def test_without_a_journal_effects_are_called_at_once() -> None:
    commits, called = Commits(5), []
    commits.add(VersionBumped(1), done=lambda: called.append("done"))
    commits.on_durable(lambda: called.append("then"))
    commits.flush()
    commits.ready(1 << 40, 1 << 40, 0)
    assert (called, commits.index) == (["done", "then"], 6)


def test_group_commit_keeps_the_order_and_shares_syncs(
    files: Slow, commits: Journaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 threads with 10 records each; every effect finds its record synced."""
    files.seconds = 0.005
    owner, order = threading.Lock(), []
    safe: set[int] = set()
    journal = commits._journal
    write = journal.write

    def noted(records: Sequence[Record], safe_before: int, *, sync: bool) -> None:
        assert sync
        write(records, safe_before, sync=sync)
        safe.update(record.index for record in records)

    monkeypatch.setattr(journal, "write", noted)

    def work() -> None:
        for _ in range(10):
            called = threading.Event()
            with owner:
                commits.add(VersionBumped(commits.index + 1))
                mine = commits.index

                def tell(index: int = mine, called: threading.Event = called) -> None:
                    assert index in safe
                    order.append(index)
                    called.set()

                commits.on_durable(tell)
            commits.flush()
            assert called.is_set()
            time.sleep(files.seconds)  # stands for computing: gives other threads their turn

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order == list(range(1, 321))
    assert written(files) == order
    assert files.syncs < 160, f"{files.syncs} syncs for 320 records"


def test_pieces_are_released_before_later_effects_are_called(commits: Journaled) -> None:
    called: list[str] = []
    values = np.arange(6, dtype=np.float32)
    commits.add(Ended(()), [(0, values)], lambda: called.append("values"))
    commits.on_durable(lambda: called.append("answer"))
    assert called == []
    commits.flush()
    assert called == ["values", "answer"]
    commits.flush()
    assert called == ["values", "answer"], "once"


@pytest.mark.parametrize(("at", "number"), [("sync", errno.EIO), ("write", errno.ENOSPC), ("write", errno.EIO)])
def test_a_failed_write_delays_effects_until_a_snapshot_is_adopted(
    files: Slow, commits: Journaled, at: str, number: int
) -> None:
    called: list[int] = []
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: called.append(1))
    commits.flush()
    files.error, files.at = number, at
    for index in (2, 3):
        commits.add(VersionBumped(index))
        commits.on_durable(lambda index=index: called.append(index))  # type: ignore[misc]
        with pytest.raises(StorageError, match=os.strerror(number)):
            commits.flush()
    with pytest.raises(StorageError):
        commits.ready(1, 1, 0)
    files.error = None
    syncs = files.syncs
    with pytest.raises(StorageError):
        commits.flush()
    assert files.syncs == syncs, "after an error nothing is tried again on this file"
    assert called == [1]
    journal = Journal(files, 2)
    commits.rotate(journal)
    commits.add(VersionBumped(4))
    commits.on_durable(lambda: called.append(4))
    with pytest.raises(StorageError):
        commits.flush()
    commits.adopt(journal)
    assert called == [1, 2, 3]
    commits.adopt(journal)
    commits.flush()
    assert called == [1, 2, 3, 4]
    assert written(files, 2, 3) == [4]
    commits.ready(1, 1, 0)


def test_the_journal_of_the_successful_snapshot_is_adopted_after_failed_ones(files: Slow, commits: Journaled) -> None:
    called: list[int] = []
    files.error = errno.EIO
    for index in (1, 2, 3):
        commits.add(VersionBumped(index))
        commits.on_durable(lambda index=index: called.append(index))  # type: ignore[misc]
        with pytest.raises(StorageError):
            commits.flush()
        files.error = None
        commits.rotate(journal := Journal(files, index + 1))
        files.error = errno.EIO
    files.error = None
    commits.adopt(journal)
    assert called == [1, 2, 3]
    commits.add(VersionBumped(4))
    commits.flush()
    assert [written(files, number) for number in (2, 3)] == [[], []]
    assert written(files, 4, 3) == [4]


def test_adopting_a_journal_still_writes_what_the_old_one_can_take(files: Slow, commits: Journaled) -> None:
    """If the snapshot is corrupt, the earlier one and the journals must lead to the same state."""
    called: list[int] = []
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: called.append(1))
    commits.rotate(journal := Journal(files, 2))
    commits.add(VersionBumped(2))
    commits.adopt(journal)
    commits.flush()
    assert called == [1]
    assert (written(files, 1), written(files, 2, 1)) == ([1], [2])


def test_a_rotation_separates_two_records(files: Slow, commits: Journaled) -> None:
    for index in range(1, 4):
        commits.add(VersionBumped(index))
    commits.rotate(Journal(files, 2))
    for index in range(4, 7):
        commits.add(VersionBumped(index))
    commits.flush()
    assert (written(files, 1), written(files, 2, 3)) == ([1, 2, 3], [4, 5, 6])


def test_space_is_reserved_in_advance(files: Slow, commits: Journaled) -> None:
    files.error, files.at = errno.ENOSPC, "allocate"
    with pytest.raises(StorageError, match="No space left"):
        commits.ready(1, 1 << 16, 0)
    files.error = None
    commits.ready(1, 1 << 16, 0)
    assert files.folder.joinpath("journal-00000001").stat().st_size >= 1 << 18
    commits.add(VersionBumped(1), [(0, np.zeros(1 << 16, np.float32))])
    files.error = errno.ENOSPC
    commits.flush()
    assert written(files) == [1]


def test_quiet_delays_effects(commits: Journaled) -> None:
    called: list[int] = []
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: called.append(1))
    with commits.quiet():
        thread = threading.Thread(target=commits.flush)
        thread.start()
        time.sleep(0.05)
        assert called == []
    thread.join(10)
    assert called == [1]


def test_a_closed_journal_is_not_written(files: Slow, quick: Path) -> None:
    """Its descriptor's number may be another file's."""
    commits = Journaled(Journal(files, 7), 0, sync=True)
    switched = Journal(files, 8)
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: pytest.fail("it was called"))
    commits.rotate(switched)
    descriptors = {commits._journal._file._descriptor, switched._file._descriptor}
    commits.close()
    others = [os.open(quick / f"other-{k}", os.O_RDWR | os.O_CREAT) for k in range(2)]
    assert set(others) == descriptors
    with pytest.raises(StorageError):
        commits.flush()
    with pytest.raises(StorageError):
        commits.ready(1, 1, 0)
    commits.close()
    for other in others:
        assert os.fstat(other).st_size == 0
        os.close(other)


def test_an_effect_may_add_effects(commits: Journaled) -> None:
    called: list[str] = []

    def first() -> None:
        called.append("first")
        commits.on_durable(lambda: called.append("second"))

    commits.add(VersionBumped(1))
    commits.on_durable(first)
    commits.flush()
    commits.flush()
    assert called == ["first", "second"]


def test_a_journal_that_cannot_be_created_leaves_no_file(files: Slow) -> None:
    for at in ("allocate", "write", "sync"):
        files.error, files.at = errno.ENOSPC, at
        with pytest.raises(OSError, match="No space left"):
            Journal(files, 3)
    assert files.names() == []
    files.error = None
    Journal(files, 3).close()


def test_a_rotation_is_taken_back(files: Slow, commits: Journaled) -> None:
    called: list[int] = []
    commits.add(VersionBumped(1))
    commits.rotate(journal := Journal(files, 2))
    commits.add(VersionBumped(2))
    commits.on_durable(lambda: called.append(2))
    assert commits.take_back(journal)
    commits.flush()
    assert called == [2]
    assert written(files) == [1, 2]
    commits.rotate(journal)
    commits.add(VersionBumped(3))
    commits.flush()
    assert not commits.take_back(journal), "it is written to already"
    assert written(files, 2, 2) == [3]


def test_a_record_written_by_one_of_two_system_calls_is_torn(
    files: Slow, commits: Journaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pwritev takes 1,024 buffers at a time; the process may die between two calls."""
    commits.add(VersionBumped(1))
    commits.flush()
    values = np.arange(5, dtype=np.float32) + 1
    commits.add(Ended(()), [(5 * k, values) for k in range(1023)])  # with its head, the first call takes them all

    def dying(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        monkeypatch.undo()
        os.pwritev(descriptor, buffers, offset)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwritev", dying)
    with pytest.raises(KeyboardInterrupt):
        commits.flush()
    assert written(files) == [1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_record_takes_no_more_space_than_is_reserved_for_it(kind: str) -> None:
    optimizer: Any = OPTIMIZERS[kind]
    long = {field.name: 1e-300 / 9 for field in fields(optimizer) if field.metadata.get("bounds")}
    groups = (optimizer(**long),) * 1000
    written = journal._encoded(Record(1, Extended((), groups)), bytes(8), 0)
    assert sum(map(len, written)) <= journal.record_bytes(0, extension_entries((), groups))
