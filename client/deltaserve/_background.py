"""Calls that Ctrl+C cannot break: another thread makes them while the main thread waits.

Python runs signal handlers in the main thread, between any two instructions. An interrupt can therefore end gRPC's own
Python code while it holds a lock, or after it has counted a call that it has not started. Such a channel answers no
further call, whatever the deadline, and closing it never returns. So the main thread hands every call to a pool of
threads and waits. Each step of that is a single instruction, so an interrupt comes before it or after it.

Measured with a model of six parameters: a step through the pool takes 1.1 times as long as one whose call the main
thread makes itself, and 1.3 to 1.5 times as long with two new threads for every call.
"""

import os
import sys
import threading
from _thread import start_new_thread  # Thread.start is Python code that waits and holds locks
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import sleep
from typing import Generic, TypeVar

T = TypeVar("T")

_CANCEL_SECONDS = 0.01
_WAKE_SECONDS = 0.2

_MAX_IDLE_THREADS = 3
"""A call takes two threads, and a third stands ready: a call in progress then starts and ends no thread."""


class _ThreadPool:
    """Threads that run jobs. One more starts whenever a job takes the last idle thread, so no job waits for another."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = threading.Lock()  # taken by the pool's threads alone: an interrupt never leaves it locked
        self._idle = 0
        self._started = False

    def submit(self, job: Callable[[], object]) -> None:
        """Hands a job to a thread."""
        if not self._started:
            start_new_thread(self._work, ())
            self._started = True
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._idle == _MAX_IDLE_THREADS:
                    return
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
                was_last = not self._idle
            if was_last:
                with suppress(RuntimeError):  # the interpreter is shutting down, or the process has its most threads
                    start_new_thread(self._work, ())
            job()
            del job  # a waiting thread keeps no caller's memory


_pool = _ThreadPool()


def _reset() -> None:
    global _pool
    _pool = _ThreadPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)  # threads do not survive a fork


class BackgroundCall(Generic[T]):
    """One call of a function, made in another thread if the caller is the main thread.

    Args:
        function: The function to call.
        cancel: Makes the call end soon. After an interrupt another thread calls it until the call is over. None means
            that the call goes on by itself.
    """

    def __init__(self, function: Callable[[], T], cancel: Callable[[], object] | None = None) -> None:
        self._function = function
        self._cancel = cancel
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._over = False
        self._end: SimpleQueue[None] = SimpleQueue()
        self._begun = threading.Lock()  # whoever acquires it decides whether the call is made
        self._awaited = threading.Lock()  # held while the main thread waits; `with` releases it whatever happens

    def run(self) -> T:
        """Makes the call once. Returns the function's result, or raises its exception.

        An interrupt ends the wait. If the call can be cancelled, `run` still waits for its end, because the call uses
        the caller's memory. A second interrupt ends that wait too; the cancelling goes on.
        """
        if threading.get_ident() != threading.main_thread().ident or sys.is_finalizing():
            self._call(None)
        else:
            try:
                with self._awaited:
                    _pool.submit(partial(self._call, self._cancel))
                    self._await_end()
            except BaseException:
                if self._cancel and not self._begun.acquire(blocking=False) and not self._over:
                    self._await_end()
                raise
        if self._error is None:
            return self._result[0]
        try:
            raise self._error
        finally:
            self._error = None  # breaks a cycle that would keep the caller's memory until the garbage collector runs

    def _await_end(self) -> None:
        # With a timeout: a signal that arrives just before the main thread blocks does not wake it, and Python handles
        # the signal only after the main thread wakes.
        while True:
            with suppress(Empty):
                return self._end.get(timeout=_WAKE_SECONDS)

    def _call(self, cancel: Callable[[], object] | None) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            if cancel:
                _pool.submit(partial(self._cancel_if_interrupted, cancel))
            self._result.append(self._function())
        except BaseException as error:
            self._error = error
        self._over = True
        self._end.put(None)

    def _cancel_if_interrupted(self, cancel: Callable[[], object]) -> None:
        with self._awaited:
            pass
        while not self._over:
            cancel()
            sleep(_CANCEL_SECONDS)
