"""The shared memory through which local workers push their gradients."""

from collections.abc import Collection

from deltaserve_server.memory import Budget, BudgetExceeded, shared_memory
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector
from deltaserve_server.model import Refused


class SharedGradients:
    """One vector in shared memory for each session of a model that asked for one."""

    def __init__(self) -> None:
        self._vectors: dict[bytes, Vector] = {}

    def get(self, session_id: bytes) -> Vector | None:
        """Returns a session's vector; None if it has none."""
        return self._vectors.get(session_id)

    def open(self, session_id: bytes, size: int, budget: Budget) -> Handle:
        """Returns what a worker needs to map its session's vector; the first call allocates `size` elements.

        Raises:
            Refused: SHARED_MEMORY_UNAVAILABLE: the system has none. MEMORY_BUDGET: the budget has none left.
        """
        vector = self._vectors.get(session_id)
        if vector is None:
            vector = self._vectors[session_id] = _allocate(size, budget)
        handle = shared_memory.handle(vector)
        assert handle is not None
        return handle

    def retain(self, session_ids: Collection[bytes]) -> None:
        """Drops the vectors of all sessions but these."""
        self._vectors = {
            session_id: vector for session_id, vector in self._vectors.items() if session_id in session_ids
        }

    def clear(self) -> None:
        """Drops every vector."""
        self._vectors.clear()


def _allocate(size: int, budget: Budget) -> Vector:
    try:
        reservation = budget.reserve(size * ELEMENT_BYTES)
    except BudgetExceeded as error:  # without a retry hint: sessions hold their memory for as long as they live
        raise Refused("MEMORY_BUDGET", needed=error.needed, available=max(error.available, 0)) from None
    try:
        vector = shared_memory.allocate(size, others_write=True)
    except OSError as error:
        reservation.release()
        raise Refused("SHARED_MEMORY_UNAVAILABLE", why=error.strerror or str(error)) from None
    # The memory counts as used for as long as anything refers to it: a push may outlive its session.
    shared_memory.when_gone(vector, reservation.release)
    return vector
