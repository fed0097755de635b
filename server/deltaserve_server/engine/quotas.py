"""What the server may hold: memory, sessions, watchers, and whether it takes new work at all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deltaserve_server.config import ServerConfig
from deltaserve_server.memory import Budget, Reservation
from deltaserve_server.memory.store import ELEMENT_BYTES
from deltaserve_server.model import Refused

DRAIN_RETRY_SECONDS = 1.0

_MODEL_VECTORS = 4
"""Vectors of a model beside its slots: the weights, the next version, an older one that is read, and a round's sum."""


class Quotas:
    """The limits of a server, and what counts against them.

    Attributes:
        memory: The budget for everything.
        staged: The budget for pushes that are not part of an update yet; part of `memory`.
        draining: Whether the server refuses new work because it is about to stop.
    """

    def __init__(self, config: ServerConfig, memory_bytes: int) -> None:
        self.memory = Budget(memory_bytes)
        self.staged = Budget(config.staged_bytes or memory_bytes // 2, parent=self.memory)
        self.draining = False
        self._config = config
        # Slots exist twice while a snapshot is written.
        self._slot_copies = 1 if config.effective_durability == "none" else 2
        self._watchers = threading.BoundedSemaphore(config.watchers)
        self._opening = 0
        self._lock = threading.Lock()

    def check_open(self) -> None:
        """Raises Refused DRAINING if the server is about to stop."""
        if self.draining:
            raise Refused("DRAINING", DRAIN_RETRY_SECONDS)

    def model_bytes(self, elements: int, slots: int) -> int:
        """Returns how much memory a model of that many elements needs, if its optimizer has that many slots."""
        return (_MODEL_VECTORS + self._slot_copies * slots) * ELEMENT_BYTES * elements

    def reserve_model(self, elements: int, slots: int) -> Reservation:
        """Reserves the memory of a model, or of an extension, of that many elements; raises BudgetExceeded."""
        return self.memory.reserve(self.model_bytes(elements, slots))

    @contextmanager
    def session(self, count_live: Callable[[], int], *, replaces: bool) -> Iterator[None]:
        """Holds a place for a session that is being opened.

        Opening a session may take as long as its model's disk does, so the lock is not held for that long. A session
        that `replaces` an older one of its worker takes its place; any other may be refused with SESSION_LIMIT.
        """
        with self._lock:  # one thread at a time counts, so that two cannot take the last place
            if count_live() + self._opening >= self._config.sessions and not replaces:
                raise Refused("SESSION_LIMIT", limit=self._config.sessions)
            self._opening += not replaces
        try:
            yield
        finally:
            with self._lock:
                self._opening -= not replaces

    @contextmanager
    def watcher(self) -> Iterator[None]:
        """Holds a place for a watcher; raises Refused WATCHER_LIMIT."""
        # A watcher occupies a thread of gRPC's pool for as long as it watches.
        if not self._watchers.acquire(blocking=False):
            raise Refused("WATCHER_LIMIT", limit=self._config.watchers)
        try:
            yield
        finally:
            self._watchers.release()
