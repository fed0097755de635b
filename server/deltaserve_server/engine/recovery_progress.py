"""Models that are read from the data directory while the server already answers: how far that is."""

import threading
from collections.abc import Mapping
from time import monotonic

from deltaserve_server.model import Refused

_RETRY_SECONDS = 0.25


class RecoveryProgress:
    """Which models are still to come, and when.

    Args:
        sizes: Bytes that are read, by model.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._left = dict(sizes)
        self._total = max(sum(sizes.values()), 1)
        self._read = 0
        self._began = monotonic()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._left)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @property
    def coming(self) -> str | None:
        """The model that is to come next; None where all are here."""
        return next(iter(list(self._left)), None)  # which copies in one step: others come meanwhile

    def progress(self, count: int) -> None:
        """Takes note of so many further bytes."""
        with self._lock:
            self._read += count

    def came(self, name: str) -> None:
        """Takes note of a model that is here."""
        del self._left[name]

    def refusal(self, name: str) -> Refused:
        """Returns what whoever asks for a model is told meanwhile."""
        read = max(min(self._read, self._total), 1)
        seconds = (monotonic() - self._began) * (self._total - read) / read
        return Refused(
            "RECOVERING",
            _RETRY_SECONDS,
            model=name,
            percent=100 * read // self._total,
            seconds=f"{max(seconds, 0.1):.1f}" if read > 1 else "?",
        )
