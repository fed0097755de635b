"""When a failed call is tried again, and after how long."""

import random
from dataclasses import dataclass
from typing import NamedTuple

from deltaserve._errors import Error

_RESTARTING = None, "RECOVERING"
"""Reasons of a server that is on its way back: nobody answers, or the server still reads its data directory."""

_FATE_UNKNOWN = None, "STORAGE_UNAVAILABLE", "DRAINING"
"""Reasons after which the server may have carried out the request, as errors.proto says."""

_MAX_DOUBLINGS = 10


class AttemptFailed(NamedTuple):
    """The failure of one attempt at a call.

    Attributes:
        error: What the caller gets if no further attempt is made.
        retry_after_seconds: The least wait before the next attempt; None if a retry does not help.
    """

    error: Error
    retry_after_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often and how long a failed call is tried again: exponential backoff with full jitter, within a budget.

    Attributes:
        budget_seconds: Time for the call in all, retries and the waits between them included.
        first_backoff_seconds: Upper bound of the first wait; it doubles as long as the reason stays the same.
        max_backoff_seconds: Upper bound of every wait.
        max_reconnect_seconds: The same while the server restarts. It is short, because an attempt then costs nothing.
        repeats_uncertain: Whether a request that the server may have carried out is sent again. False for requests that
            would do something else the second time.
    """

    budget_seconds: float
    first_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 5.0
    max_reconnect_seconds: float = 0.5
    repeats_uncertain: bool = True

    def wait_seconds(self, failed: AttemptFailed, repeats: int, *, delivered: bool) -> float | None:
        """Returns the wait before the next attempt; None if there is to be none.

        Args:
            failed: The attempt that failed.
            repeats: How many attempts in a row have failed for the same reason before it.
            delivered: Whether the server may have received the whole request.
        """
        reason = failed.error.reason
        if failed.retry_after_seconds is None:
            return None
        if delivered and not self.repeats_uncertain and reason in _FATE_UNKNOWN:
            return None
        limit = self.max_reconnect_seconds if reason in _RESTARTING else self.max_backoff_seconds
        # Without the limit of doublings, a long outage would overflow the float.
        backoff = min(self.first_backoff_seconds * 2 ** min(repeats, _MAX_DOUBLINGS), limit)
        # Random, so that workers that lost the same server do not all come back at the same moment.
        return max(failed.retry_after_seconds, random.uniform(0, backoff))  # noqa: S311
