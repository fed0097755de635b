"""Work that several threads share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltaserve_server.memory.parallel import run_parallel


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_every_item_once(threads: int, count: int) -> None:
    done: list[int] = []
    with ThreadPoolExecutor(4) as executor:
        run_parallel(done.append, range(count), executor, threads)
    assert sorted(done) == list(range(count))


def test_the_calling_thread_works_too_and_at_most_so_many_others() -> None:
    seen, together = set(), threading.Barrier(3, timeout=10)

    def run(_item: int) -> None:
        seen.add(threading.current_thread())
        together.wait()

    with ThreadPoolExecutor(8) as executor:
        run_parallel(run, range(30), executor, 3)
    assert len(seen) == 3
    assert threading.current_thread() in seen


def test_a_busy_executor_is_not_waited_for() -> None:
    release, done = threading.Event(), list[int]()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(release.wait, 60)
        run_parallel(done.append, range(10), executor, 4)
        assert done == list(range(10))
        release.set()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_ends_the_work_and_is_raised_when_nobody_works_any_more(threads: int) -> None:
    running, begun = [0], []

    def run(item: int) -> None:
        running[0] += 1
        begun.append(item)
        try:
            if item == 5:
                raise KeyError(item)
            threading.Event().wait(0.001)
        finally:
            running[0] -= 1

    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(KeyError):
            run_parallel(run, range(10_000), executor, threads)
        assert running == [0]
    assert len(begun) < 1000


def test_an_index_error_of_an_item_is_none_of_ours() -> None:
    with ThreadPoolExecutor(2) as executor, pytest.raises(IndexError):
        run_parallel([1, 2].__getitem__, [0, 1, 2], executor, 2)
