"""Where vectors live: the memory budget, weight versions, optimizer state, staging; on the host or on a device."""

from deltaserve_server.memory.budget import Allowance, Budget, BudgetExceeded, Reservation
from deltaserve_server.memory.store import Frozen, Gradient, Range, Staging, State, Store, Version

__all__ = [
    "Allowance",
    "Budget",
    "BudgetExceeded",
    "Frozen",
    "Gradient",
    "Range",
    "Reservation",
    "Staging",
    "State",
    "Store",
    "Version",
]
