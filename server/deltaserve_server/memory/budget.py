"""How many bytes the server may hold, and who holds them."""

import threading
from collections import deque
from types import TracebackType
from typing import Self


class BudgetExceeded(Exception):
    """More bytes were asked for than are left."""

    def __init__(self, needed: int, available: int, total: int) -> None:
        super().__init__(needed, available, total)
        self.needed = needed
        self.available = available
        self.total = total

    @property
    def passing(self) -> bool:
        """Whether it may fit once others have given back what they hold."""
        return self.needed <= self.total


class Budget:
    """Counts bytes; thread-safe.

    Args:
        total: Bytes that may be held at a time.
        parent: A larger budget that this one is part of.
    """

    def __init__(self, total: int, parent: "Budget | None" = None) -> None:
        self.total = total
        self._parent = parent
        self._held = 0
        self._given_back: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def available(self) -> int:
        """Bytes that are left."""
        with self._lock:
            return self._left()

    def reserve(self, size: int) -> "Reservation":
        """Takes `size` bytes until the reservation is released.

        Raises:
            BudgetExceeded: They are not there; nothing was taken.
        """
        upper = self._parent.reserve(size) if self._parent else None
        with self._lock:
            available = self._left()
            if size <= available:
                self._held += size
                return Reservation(self, size, upper)
        if upper:
            upper.release()
        raise BudgetExceeded(size, available, self.total)

    def give_back(self, size: int) -> None:
        """Ends a reservation; called by it alone."""
        # Without the lock: garbage may be collected in the thread that has it, and a reservation end with that.
        self._given_back.append(size)

    def _left(self) -> int:
        """Returns `available`; to be called under the lock."""
        while self._given_back:
            self._held -= self._given_back.popleft()
        return self.total - self._held


class Allowance:
    """Bytes that are always there, and beyond them those of a budget.

    Args:
        own: Bytes that somebody has reserved for this already.
        beyond: Where more comes from.
    """

    def __init__(self, own: int, beyond: Budget) -> None:
        self._own = Budget(own)
        self._beyond = beyond

    def reserve(self, size: int) -> "Reservation":
        """Takes `size` bytes until the reservation is released.

        Raises:
            BudgetExceeded: They are not there; nothing was taken.
        """
        try:
            return self._own.reserve(size)
        except BudgetExceeded:
            return self._beyond.reserve(size)


class Reservation:
    """Bytes taken from a budget; a context manager that gives them back."""

    def __init__(self, budget: Budget, size: int, upper: "Reservation | None") -> None:
        self.size = size
        self._budget: Budget | None = budget
        self._upper = upper

    def release(self) -> None:
        """Gives the bytes back; once."""
        budget, self._budget = self._budget, None
        if budget:
            budget.give_back(self.size)
        if self._upper:
            self._upper.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
