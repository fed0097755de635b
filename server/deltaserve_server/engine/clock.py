"""The clock that leases, rounds and snapshots run on. Tests pass one that they advance themselves."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time and waits for it."""

    def monotonic(self) -> float:
        """Returns seconds of a clock that never goes back."""

    def time(self) -> float:
        """Returns seconds since the epoch."""

    def wait(self, condition: threading.Condition, until: float) -> None:
        """Waits for a notification of `condition`, which the caller holds, but not past the time `until`.

        A wait may end early: callers check their own predicate again.
        """


class SystemClock:
    """The operating system's clock."""

    # The functions themselves: each push reads the clock, so a wrapper would be called on the hot path.
    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    def wait(self, condition: threading.Condition, until: float) -> None:
        """Waits for a notification, but not past `until`."""
        condition.wait(max(until - time.monotonic(), 0.0))


SYSTEM_CLOCK = SystemClock()
