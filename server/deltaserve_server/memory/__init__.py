"""Memory: the budget of bytes, and the stores of weights, optimizer state and staged gradients, on host or GPU."""

from deltaserve_server.memory.budget import Budget, BudgetExceeded, Reservation
from deltaserve_server.memory.store import (
    Frozen,
    Gradient,
    MakeStore,
    Range,
    Staging,
    State,
    Store,
    Version,
    initial_state,
)

__all__ = [
    "Budget",
    "BudgetExceeded",
    "Frozen",
    "Gradient",
    "MakeStore",
    "Range",
    "Reservation",
    "Staging",
    "State",
    "Store",
    "Version",
    "initial_state",
]
