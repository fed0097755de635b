"""Where vectors live: the memory budget, weight versions, optimizer state, staging; on the host or on a device."""

from deltaserve_server.memory.budget import Allowance, Budget, BudgetExceeded, Reservation
from deltaserve_server.memory.store import Range, Staging, State, Store, Version

__all__ = ["Allowance", "Budget", "BudgetExceeded", "Range", "Reservation", "Staging", "State", "Store", "Version"]
