"""The state machine of a model: layout, sessions, policies, rounds. Pure: no I/O, no threads, no clock.

Events go in as method calls that carry the time, decisions come out as values; the applier carries them out.
"""

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.machine import Answer, Decision, Fold, Machine, Renumber, Update
from deltaserve_server.model.policy import Async, Policy, Sync
from deltaserve_server.model.push import Push, PushResult
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.sessions import Session

__all__ = [
    "Answer",
    "Async",
    "Decision",
    "Fold",
    "Hyperparameters",
    "Layout",
    "Machine",
    "Policy",
    "Push",
    "PushResult",
    "Refused",
    "Renumber",
    "Session",
    "Sync",
    "Tensor",
    "Update",
]
