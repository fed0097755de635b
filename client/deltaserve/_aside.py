"""Calls in a thread of their own, where no signal interrupts them."""

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from time import sleep
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_CANCEL_SECONDS = 0.01


class _Task(Generic[T]):
    """A function and what became of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._wake: SimpleQueue[None] = SimpleQueue()
        self.ended = False

    def run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:
            self._error = error
        self.ended = True
        self._wake.put(None)

    def wait(self) -> None:
        self._wake.get()

    def outcome(self) -> T:
        """Returns or raises what the function did."""
        if self._error:
            raise self._error
        return self._result[0]


class Aside:
    """A thread that runs functions, one at a time, for the main thread, which waits for them.

    The handlers of signals run in the main thread, between any two instructions of Python: Ctrl+C can end gRPC's code
    while it holds a lock, or has counted a call that it has not begun. Such a channel answers no further call,
    whatever the deadline, and closing it never ends. Here an interrupt meets the wait alone.
    """

    def __init__(self) -> None:
        """Raises RuntimeError where no thread can be started, as when the interpreter is about to end."""
        self._tasks: SimpleQueue[_Task[Any] | None] = SimpleQueue()
        # Not at exit: workers that are open still say goodbye then.
        weakref.finalize(self, self._tasks.put, None).atexit = False
        threading.Thread(target=_serve, args=(self._tasks,), name="calls", daemon=True).start()

    def run(self, function: Callable[[], T], cancel: Callable[[], object] | None) -> Callable[[], T]:
        """Runs a function; where the wait for it is interrupted, this object is not to be used again.

        Args:
            function: What to run.
            cancel: Makes it end soon; an interrupt waits for that. None means that it may go on by itself.

        Returns:
            What returns or raises what the function did.
        """
        task = _Task(function)
        self._tasks.put(task)
        try:
            task.wait()
        except BaseException:
            self._tasks.put(None)
            while cancel and not task.ended:
                cancel()
                sleep(_CANCEL_SECONDS)
            raise
        return task.outcome


def _serve(tasks: "SimpleQueue[_Task[Any] | None]") -> None:
    while task := tasks.get():
        task.run()
        del task  # or what it refers to would live until the next one comes
