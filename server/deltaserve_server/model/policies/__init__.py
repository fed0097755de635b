"""The three policies: when a push becomes an update."""

from deltaserve_server.model.policies.async_ import Async
from deltaserve_server.model.policies.base import UpdatePolicy
from deltaserve_server.model.policies.bounded import Bounded
from deltaserve_server.model.policies.sync import Reduction, Sync

Policy = Sync | Async | Bounded

__all__ = ["Async", "Bounded", "Policy", "Reduction", "Sync", "UpdatePolicy"]
