"""How far the recovery of the data directory is, for clients that ask for a model too early."""

import threading
from collections.abc import Mapping

from deltaserve_server.engine.clock import SYSTEM_CLOCK, Clock
from deltaserve_server.model import Refused

_RETRY_SECONDS = 0.25
_SHORTEST_SECONDS = 0.1


class RecoveryProgress:
    """The models that are not recovered yet, by the number of bytes to read, and how long that may take."""

    def __init__(self, sizes: Mapping[str, int], clock: Clock = SYSTEM_CLOCK) -> None:
        self._pending = dict(sizes)
        self._total = max(sum(sizes.values()), 1)
        self._read = 0
        self._clock = clock
        self._began = clock.monotonic()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, name: str) -> bool:
        return name in self._pending

    @property
    def next(self) -> str | None:
        """The model that is recovered next; None once all are."""
        return next(iter(list(self._pending)), None)  # list() copies in one step: the recovering thread changes it

    def add(self, count: int) -> None:
        """Counts bytes that were read."""
        with self._lock:
            self._read += count

    def done(self, name: str) -> None:
        """Removes a model that is recovered, or set aside."""
        del self._pending[name]

    def refusal(self, name: str) -> Refused:
        """Returns the refusal of a request for a model that is not recovered yet."""
        read = max(min(self._read, self._total), 1)
        seconds = (self._clock.monotonic() - self._began) * (self._total - read) / read
        return Refused(
            "RECOVERING",
            _RETRY_SECONDS,
            model=name,
            percent=100 * read // self._total,
            # From the bytes so far; after the first byte that would be a guess.
            seconds=f"{max(seconds, _SHORTEST_SECONDS):.1f}" if read > 1 else "?",
        )
