"""Calls in a thread of their own, where no signal interrupts them.

The handlers of signals run in the main thread, between any two instructions of Python: Ctrl+C can end gRPC's code while
it holds a lock, or has counted a call that it has not begun. Such a channel answers no further call, whatever the
deadline, and closing it never ends. So the main thread hands the call to a thread and waits, no more, and each step of
that is one instruction: an interrupt comes before it or after it.
"""

import threading
from _thread import start_new_thread  # Thread.start is Python code that waits and holds locks
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import sleep
from typing import Generic, TypeVar

T = TypeVar("T")

_CANCEL_SECONDS = 0.01
_WAKE_SECONDS = 0.2


class BackgroundCall(Generic[T]):
    """One call of a function, aside.

    Args:
        function: What to call.
        cancel: Makes it end soon; called, aside too, if the wait for it is interrupted. None means that it may go on.
    """

    def __init__(self, function: Callable[[], T], cancel: Callable[[], object] | None) -> None:
        self._function = function
        self._cancel = cancel
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._over = False
        self._end: SimpleQueue[None] = SimpleQueue()
        self._begun = threading.Lock()  # taken for good by who makes the call, or sees to it that nobody does
        self._awaited = threading.Lock()  # held while the main thread waits; `with` lets go of it whatever happens

    def run(self) -> T:
        """Makes the call, once; returns what the function returned, raises what it raised.

        An interrupt ends the wait. Where the call is then cancelled, its end is waited for: it uses the caller's
        memory. A second interrupt ends that wait too, though not the cancelling.
        """
        try:
            with self._awaited:
                try:
                    start_new_thread(self._call, ())
                except RuntimeError:  # the interpreter is about to end
                    self._call()
                self._await_end()
        except BaseException:
            if self._cancel and not self._begun.acquire(blocking=False) and not self._over:
                self._await_end()
            raise
        if self._error:
            raise self._error
        return self._result[0]

    def _await_end(self) -> None:
        # Not without a timeout: a signal that comes just before the main thread blocks does not wake it, and is handled
        # no sooner than it wakes.
        while True:
            with suppress(Empty):
                return self._end.get(timeout=_WAKE_SECONDS)

    def _call(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            if self._cancel:
                start_new_thread(self._cancel_when_abandoned, (self._cancel,))
            self._result.append(self._function())
        except BaseException as error:
            self._error = error
        self._over = True
        self._end.put(None)

    def _cancel_when_abandoned(self, cancel: Callable[[], object]) -> None:
        with self._awaited:
            pass
        while not self._over:
            cancel()
            sleep(_CANCEL_SECONDS)
