"""A clock that a test advances, so that leases and rounds end without waiting."""

import threading
from collections.abc import Callable

_STUCK_SECONDS = 20.0


class ManualClock:
    """Stands still until a test advances it.

    Args:
        now: The time that it begins with, in seconds.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        # By waiting thread's condition: the time that it waits for; None while the thread runs.
        self._waiting: dict[threading.Condition, float | None] = {}
        self._changed = threading.Condition()

    def monotonic(self) -> float:
        return self._now

    def time(self) -> float:
        return self._now

    def wait(self, condition: threading.Condition, until: float) -> None:
        with self._changed:
            if until <= self._now:
                return
            self._waiting[condition] = until
            self._changed.notify_all()
        # `advance` cannot be missed: it changes the time first, and needs the condition to notify.
        condition.wait()
        with self._changed:
            self._waiting[condition] = None

    def advance(self, seconds: float) -> None:
        """Advances the time, and returns when every thread that waits for it has seen that and waits again.

        With `LocalServer(clock=...)`, leases and rounds that are over have then ended. Models with a journal are an
        exception: their ticks run in a pool.
        """
        with self._changed:
            self._wait_for(lambda: bool(self._waiting), "no thread waits for this clock")
            self._now += seconds
            conditions = list(self._waiting)
        for condition in conditions:
            with condition:
                condition.notify_all()
        with self._changed:
            self._wait_for(self._is_settled, "a thread does not come back to wait")

    def _is_settled(self) -> bool:
        return all(until is not None and until > self._now for until in self._waiting.values())

    def _wait_for(self, predicate: Callable[[], bool], otherwise: str) -> None:
        assert self._changed.wait_for(predicate, _STUCK_SECONDS), otherwise
