"""The parallel loop."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltaserve_server.memory.parallel import run_parallel


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_every_item_runs_once(threads: int, count: int) -> None:
    done: list[int] = []
    with ThreadPoolExecutor(4) as executor:
        run_parallel(done.append, range(count), executor, threads)
    assert sorted(done) == list(range(count))


def test_the_calling_thread_works_and_the_number_of_threads_is_limited() -> None:
    seen, together = set(), threading.Barrier(3, timeout=10)

    def run(_item: int) -> None:
        seen.add(threading.current_thread())
        together.wait()

    with ThreadPoolExecutor(8) as executor:
        run_parallel(run, range(30), executor, 3)
    assert len(seen) == 3
    assert threading.current_thread() in seen


def test_the_loop_does_not_wait_for_a_busy_executor() -> None:
    release, done = threading.Event(), list[int]()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(release.wait, 60)
        run_parallel(done.append, range(10), executor, 4)
        assert done == list(range(10))
        release.set()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_stops_the_loop_and_is_raised_after_all_calls_have_ended(threads: int) -> None:
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


def test_an_index_error_of_an_item_is_raised() -> None:
    with ThreadPoolExecutor(2) as executor, pytest.raises(IndexError):
        run_parallel([1, 2].__getitem__, [0, 1, 2], executor, 2)
