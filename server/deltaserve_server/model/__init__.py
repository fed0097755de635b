"""The state machine of a model: layout, sessions, policies, rounds.

This room is pure: no I/O, no threads, no clock, no gRPC. Events go in as method calls that carry the time. Decisions
come out as values, and the engine carries them out. Start with `Machine`.
"""

from deltaserve_server.model.decision import Answer, BumpVersion, Combine, Decision, Fold, Refuse, Update
from deltaserve_server.model.difference import first_difference
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.machine import Machine
from deltaserve_server.model.policies import Async, Bounded, Policy, Reduction, Sync
from deltaserve_server.model.push import Contribution, Key, Push, PushResult, PushStatus, UpdateSummary
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.sessions import Session

__all__ = [
    "Answer",
    "Async",
    "Bounded",
    "BumpVersion",
    "Combine",
    "Contribution",
    "Decision",
    "Fold",
    "Key",
    "Layout",
    "Machine",
    "Policy",
    "Push",
    "PushResult",
    "PushStatus",
    "Reduction",
    "Refuse",
    "Refused",
    "Session",
    "Sync",
    "Tensor",
    "Update",
    "UpdateSummary",
    "first_difference",
]
