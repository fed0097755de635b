"""What was done is told when it is safe, in order, many at a time; and not at all where it could not be written."""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from deltaserve_server.durability.commits import Commits, Journaled, StorageError
from deltaserve_server.durability.files import File, Files
from deltaserve_server.durability.journal import Journal, JournalReader
from deltaserve_server.durability.records import Ended, Record, VersionBumped


class Slow(Files):
    """A folder whose files take their time to be safe, or do not get there.

    Attributes:
        seconds: What a sync takes.
        error: What a sync of a file, or a write where `at` says so, raises.
        syncs: How many there were.
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
    """The records that a journal holds."""
    reading = JournalReader(Files(files.folder), number, after, lost_power=False)
    return [record.index for record in reading.records()]


def test_nothing_is_told_before_it_is_on_the_disk(files: Slow, commits: Journaled) -> None:
    told: list[str] = []
    files.gate.clear()
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: told.append("answer"))
    thread = threading.Thread(target=commits.flush)
    thread.start()
    time.sleep(0.1)
    assert told == []
    assert thread.is_alive(), "who brought it waits"
    files.gate.set()
    thread.join(10)
    assert told == ["answer"]
    assert written(files) == [1]


def test_without_fsync_it_is_told_once_the_system_has_it(files: Slow, commits: Journaled) -> None:
    quick = Journaled(Journal(files, 2), 0, sync=False)
    files.syncs = 0
    quick.add(VersionBumped(1))
    quick.flush()
    assert files.syncs == 0
    assert written(files, 2) == [1]
    quick.close()


def test_without_a_journal_all_is_told_at_once() -> None:
    commits, told = Commits(5), []
    commits.add(VersionBumped(1), done=lambda: told.append("done"))
    commits.on_durable(lambda: told.append("then"))
    commits.flush()
    commits.ready(1 << 40, 1 << 40, 0)
    assert (told, commits.index) == (["done", "then"], 6)


def test_many_threads_are_told_in_order_and_share_their_writes(
    files: Slow, commits: Journaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 threads, 10 records each: what each is told was safe by then, and few syncs serve all."""
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
            told = threading.Event()
            with owner:
                commits.add(VersionBumped(commits.index + 1))
                mine = commits.index

                def tell(index: int = mine, told: threading.Event = told) -> None:
                    assert index in safe
                    order.append(index)
                    told.set()

                commits.on_durable(tell)
            commits.flush()
            assert told.is_set()
            time.sleep(files.seconds)  # as if it computed: those who were told with it get their turn

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order == list(range(1, 321))
    assert written(files) == order
    assert files.syncs < 160, f"{files.syncs} syncs for 320 records"


def test_what_is_not_needed_any_more_is_given_back_before_what_follows_is_told(commits: Journaled) -> None:
    told: list[str] = []
    values = np.arange(6, dtype=np.float32)
    commits.add(Ended(()), [(0, values)], lambda: told.append("values"))
    commits.on_durable(lambda: told.append("answer"))
    assert told == []
    commits.flush()
    assert told == ["values", "answer"]
    commits.flush()
    assert told == ["values", "answer"], "once"


@pytest.mark.parametrize(("at", "number"), [("sync", errno.EIO), ("write", errno.ENOSPC), ("write", errno.EIO)])
def test_what_cannot_be_written_is_not_told_until_a_snapshot_has_it(
    files: Slow, commits: Journaled, at: str, number: int
) -> None:
    told: list[int] = []
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: told.append(1))
    commits.flush()
    files.error, files.at = number, at
    for index in (2, 3):
        commits.add(VersionBumped(index))
        commits.on_durable(lambda index=index: told.append(index))  # type: ignore[misc]
        with pytest.raises(StorageError, match=os.strerror(number)):
            commits.flush()
    with pytest.raises(StorageError):
        commits.ready(1, 1, 0)
    files.error = None
    syncs = files.syncs
    with pytest.raises(StorageError):
        commits.flush()
    assert files.syncs == syncs, "after an error nothing is tried again on this file"
    assert told == [1]
    journal = Journal(files, 2)
    commits.rotate(journal)
    commits.add(VersionBumped(4))
    commits.on_durable(lambda: told.append(4))
    with pytest.raises(StorageError):
        commits.flush()
    commits.adopt(journal)
    assert told == [1, 2, 3]
    commits.adopt(journal)
    commits.flush()
    assert told == [1, 2, 3, 4]
    assert written(files, 2, 3) == [4]
    commits.ready(1, 1, 0)


def test_after_several_snapshots_that_failed_the_one_that_did_not_is_gone_on_with(
    files: Slow, commits: Journaled
) -> None:
    told: list[int] = []
    files.error = errno.EIO
    for index in (1, 2, 3):
        commits.add(VersionBumped(index))
        commits.on_durable(lambda index=index: told.append(index))  # type: ignore[misc]
        with pytest.raises(StorageError):
            commits.flush()
        files.error = None
        commits.rotate(journal := Journal(files, index + 1))
        files.error = errno.EIO
    files.error = None
    commits.adopt(journal)
    assert told == [1, 2, 3]
    commits.add(VersionBumped(4))
    commits.flush()
    assert [written(files, number) for number in (2, 3)] == [[], []]
    assert written(files, 4, 3) == [4]


def test_a_snapshot_does_not_spare_what_waits_its_journal(files: Slow, commits: Journaled) -> None:
    """Should that snapshot turn out to be bad, the one before it and the journals lead to the same."""
    told: list[int] = []
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: told.append(1))
    commits.rotate(journal := Journal(files, 2))
    commits.add(VersionBumped(2))
    commits.adopt(journal)
    commits.flush()
    assert told == [1]
    assert (written(files, 1), written(files, 2, 1)) == ([1], [2])


def test_a_journal_is_switched_to_between_two_records(files: Slow, commits: Journaled) -> None:
    for index in range(1, 4):
        commits.add(VersionBumped(index))
    commits.rotate(Journal(files, 2))
    for index in range(4, 7):
        commits.add(VersionBumped(index))
    commits.flush()
    assert (written(files, 1), written(files, 2, 3)) == ([1, 2, 3], [4, 5, 6])


def test_space_is_set_aside_before_anything_happens(files: Slow, commits: Journaled) -> None:
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


def test_who_looks_meanwhile_keeps_effects_from_being_told(commits: Journaled) -> None:
    told: list[int] = []
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: told.append(1))
    with commits.quiet():
        thread = threading.Thread(target=commits.flush)
        thread.start()
        time.sleep(0.05)
        assert told == []
    thread.join(10)
    assert told == [1]


def test_a_journal_that_has_ended_is_not_written_to(files: Slow, quick: Path) -> None:
    """Its descriptor's number may be another file's by then."""
    commits = Journaled(Journal(files, 7), 0, sync=True)
    switched = Journal(files, 8)
    commits.add(VersionBumped(1))
    commits.on_durable(lambda: pytest.fail("it was told"))
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


def test_an_effect_may_bring_more_effects(commits: Journaled) -> None:
    told: list[str] = []

    def first() -> None:
        told.append("first")
        commits.on_durable(lambda: told.append("second"))

    commits.add(VersionBumped(1))
    commits.on_durable(first)
    commits.flush()
    commits.flush()
    assert told == ["first", "second"]


def test_a_journal_that_cannot_be_made_leaves_nothing(files: Slow) -> None:
    for at in ("allocate", "write", "sync"):
        files.error, files.at = errno.ENOSPC, at
        with pytest.raises(OSError, match="No space left"):
            Journal(files, 3)
    assert files.names() == []
    files.error = None
    Journal(files, 3).close()


def test_a_journal_that_was_to_be_switched_to_is_taken_back(files: Slow, commits: Journaled) -> None:
    told: list[int] = []
    commits.add(VersionBumped(1))
    commits.rotate(journal := Journal(files, 2))
    commits.add(VersionBumped(2))
    commits.on_durable(lambda: told.append(2))
    assert commits.take_back(journal)
    commits.flush()
    assert told == [2]
    assert written(files) == [1, 2]
    commits.rotate(journal)
    commits.add(VersionBumped(3))
    commits.flush()
    assert not commits.take_back(journal), "it is written to already"
    assert written(files, 2, 2) == [3]


def test_a_write_that_dies_between_two_calls_of_the_system_is_torn(
    files: Slow, commits: Journaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system takes 1,024 buffers at a time; a record of more is a part of itself if the process dies between."""
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
