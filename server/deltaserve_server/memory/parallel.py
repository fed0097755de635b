"""A parallel loop over items."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

_Item = TypeVar("_Item")


def run_parallel(run: Callable[[_Item], object], items: Iterable[_Item], executor: Executor, threads: int) -> None:
    """Calls `run` with every item, on the calling thread and up to `threads` - 1 others, and waits for all calls.

    Each thread takes the next item when it is free, so one slow thread does not delay the others' items.

    Args:
        run: Function of one item; any of the threads calls it.
        items: The items, in the order in which calls start.
        executor: Runs the other threads. If it is busy, the calling thread does the work alone.
        threads: Maximum number of threads, >= 1.

    Raises:
        Exception: What `run` raised first, after all running calls have ended. No call starts after an exception.
    """
    remaining = deque(items)

    def work() -> None:
        while True:
            try:
                item = remaining.popleft()
            except IndexError:
                return
            try:
                run(item)
            except BaseException:
                # The other threads end after their current items.
                remaining.clear()
                raise

    others = [executor.submit(work) for _ in range(min(threads, len(remaining)) - 1)]
    try:
        work()
    finally:
        # A call that is still in the executor's queue cannot help any more; one that has started must be waited for.
        errors = [other.exception() for other in others if not other.cancel()]
    for error in errors:
        if error:
            raise error
