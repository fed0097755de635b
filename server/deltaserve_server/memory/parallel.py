"""Work that several threads share."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

_Item = TypeVar("_Item")


def run_parallel(run: Callable[[_Item], object], items: Iterable[_Item], executor: Executor, threads: int) -> None:
    """Calls `run` with every item, on the calling thread and up to `threads` - 1 others.

    Whoever is free takes the next item: so a thread that something else holds up does not hold up the work.

    Args:
        run: Is called on any of the threads, with one item.
        items: In the order in which they are begun.
        executor: Has the other threads. If they are busy, the calling thread goes on alone.
        threads: How many work at most, >= 1.

    Raises:
        Exception: The first that `run` raised. No item is begun after that, and none is still worked on.
    """
    left = deque(items)

    def work() -> None:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return
            try:
                run(item)
            except BaseException:
                left.clear()
                raise

    others = [executor.submit(work) for _ in range(min(threads, len(left)) - 1)]
    try:
        work()
    finally:
        errors = [other.exception() for other in others if not other.cancel()]
    for error in errors:
        if error:
            raise error
