"""The values of pushes on their way into an update, and the memory that they occupy."""

from collections.abc import Sequence

from deltaserve_server.memory import Reservation, Staging, Store
from deltaserve_server.model import Key


class StagedPushes:
    """The accepted pushes of a model that are not part of an update yet. The caller holds the model's lock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._staged: dict[Key, tuple[Staging, Reservation]] = {}
        self._reduced: list[Reservation] = []

    def __len__(self) -> int:
        return len(self._staged)

    def add(self, key: Key, staging: Staging, reservation: Reservation) -> None:
        """Keeps a push until an update takes it or `discard` drops it."""
        self._staged[key] = staging, reservation

    def fold(self, key: Key, factor: float) -> None:
        """Adds `factor` times a push to the sum of the next update."""
        staging, reservation = self._staged.pop(key)
        self._reduced.append(reservation)
        self._store.fold(staging, factor)
        if len(self._reduced) > 1:  # a single push is kept as it is; from the second on there is a sum instead
            for summed in self._reduced:
                summed.release()

    def combine(self, pushes: Sequence[tuple[Key, float]], trim: int) -> None:
        """Reduces pushes, each times its factor, to the trimmed mean of each element."""
        stagings = []
        for key, factor in pushes:
            staging, reservation = self._staged.pop(key)
            self._reduced.append(reservation)
            stagings.append((staging, factor))
        self._store.combine(stagings, trim)

    def take_reduced(self) -> list[Reservation]:
        """Returns the memory of the pushes that the update has taken; the caller releases it."""
        reduced, self._reduced = self._reduced, []
        return reduced

    def discard(self, key: Key) -> None:
        """Drops a push if it is still here: it is a duplicate, or its round was given up."""
        staged = self._staged.pop(key, None)
        if staged:
            staged[1].release()

    def clear(self) -> None:
        """Drops every push."""
        # Also of pushes that are reduced: the sum that holds them is dropped with the model.
        for reservation in (*(reservation for _, reservation in self._staged.values()), *self._reduced):
            reservation.release()
        self._staged.clear()
