"""Budgets of bytes: what the server may hold at a time, and the reservations taken from it."""

import threading
from collections import deque
from typing import Self


class BudgetExceeded(Exception):
    """A reservation needed more bytes than were available of the budget's total."""

    def __init__(self, needed: int, available: int, total: int) -> None:
        super().__init__(needed, available, total)
        self.needed = needed
        self.available = available
        self.total = total

    @property
    def is_temporary(self) -> bool:
        """Whether the reservation can succeed once others end."""
        return self.needed <= self.total


class Budget:
    """A number of bytes that reservations share; thread-safe.

    Args:
        total: Number of bytes that may be reserved at a time.
        parent: A larger budget that each reservation also counts against.
    """

    def __init__(self, total: int, parent: "Budget | None" = None) -> None:
        self.total = total
        self._parent = parent
        self._reserved = 0
        self._released: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def available(self) -> int:
        """Number of bytes that are left."""
        with self._lock:
            return self._left()

    def reserve(self, size: int) -> "Reservation":
        """Reserves `size` bytes until the reservation is released.

        Raises:
            BudgetExceeded: Fewer bytes are left. Nothing is reserved.
        """
        # Outside the lock, because the parent has its own; a refusal below returns these bytes.
        upper = self._parent.reserve(size) if self._parent else None
        with self._lock:
            available = self._left()
            if size <= available:
                self._reserved += size
                return Reservation(self, size, upper)
        if upper:
            upper.release()
        raise BudgetExceeded(size, available, self.total)

    def give_back(self, size: int) -> None:
        """Returns the bytes of a reservation; only `Reservation.release` calls this."""
        # Without the lock: the garbage collector may release a reservation in the thread that holds the lock.
        self._released.append(size)

    def _left(self) -> int:  # the caller holds the lock
        while self._released:
            self._reserved -= self._released.popleft()
        return self.total - self._reserved


class ReaderBudget:
    """The budget for versions that readers keep: bytes that are reserved already, then those of a shared budget.

    Args:
        reserved: Number of bytes that the model's own reservation includes for this.
        shared: The budget for all further bytes.
    """

    def __init__(self, reserved: int, shared: Budget) -> None:
        self._own = Budget(reserved)
        self._shared = shared

    def reserve(self, size: int) -> "Reservation":
        """Reserves `size` bytes until the reservation is released.

        Raises:
            BudgetExceeded: Fewer bytes are left. Nothing is reserved.
        """
        try:
            return self._own.reserve(size)
        except BudgetExceeded:
            return self._shared.reserve(size)


class Reservation:
    """Bytes taken from a budget; a context manager that returns them."""

    def __init__(self, budget: Budget, size: int, upper: "Reservation | None") -> None:
        self.size = size
        self._budget: Budget | None = budget
        self._upper = upper

    def release(self) -> None:
        """Returns the bytes to the budget. Further calls do nothing."""
        # Cleared first, so that a second call returns nothing twice.
        budget, self._budget = self._budget, None
        if budget:
            budget.give_back(self.size)
        if self._upper:
            self._upper.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
