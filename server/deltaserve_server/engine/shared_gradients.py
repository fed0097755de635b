"""Where gradients lie that sessions push through shared memory."""

from collections.abc import Collection

from deltaserve_server.memory import Budget, BudgetExceeded, shared_memory
from deltaserve_server.memory.shared_memory import Handle
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector
from deltaserve_server.model import Refused


class SharedGradients:
    """The shared memory of a model's sessions."""

    def __init__(self) -> None:
        self._vectors: dict[bytes, Vector] = {}

    def get(self, session_id: bytes) -> Vector | None:
        """Returns where a session's gradients lie; None if it shares no memory."""
        return self._vectors.get(session_id)

    def share(self, session_id: bytes, size: int, budget: Budget) -> Handle:
        """Gives a session memory for its gradients, of so many elements; the same again if it has some.

        Raises:
            Refused: SHARED_MEMORY_UNAVAILABLE where the system has none, MEMORY_BUDGET where there is none for it.
        """
        vector = self._vectors.get(session_id)
        if vector is None:
            vector = self._vectors[session_id] = _allocated(size, budget)
        handle = shared_memory.handle(vector)
        assert handle is not None
        return handle

    def keep(self, session_ids: Collection[bytes]) -> None:
        """Lets go of the memory of all other sessions."""
        self._vectors = {
            session_id: vector for session_id, vector in self._vectors.items() if session_id in session_ids
        }

    def clear(self) -> None:
        """Lets go of all of it."""
        self._vectors.clear()


def _allocated(size: int, budget: Budget) -> Vector:
    """Returns memory that counts as held for as long as anything refers to it, be it a push that waits."""
    try:
        reservation = budget.reserve(size * ELEMENT_BYTES)
    except BudgetExceeded as error:  # not to be tried again: it is held for as long as sessions live
        raise Refused("MEMORY_BUDGET", needed=error.needed, available=max(error.available, 0)) from None
    try:
        vector = shared_memory.allocate(size, others_write=True)
    except OSError as error:
        reservation.release()
        raise Refused("SHARED_MEMORY_UNAVAILABLE", why=error.strerror or str(error)) from None
    shared_memory.when_gone(vector, reservation.release)
    return vector
