"""The state machine of a model: layout, sessions, policies, rounds. Pure: no I/O, no threads, no clock.

Events go in as method calls that carry the time, decisions come out as values; the applier carries them out.
"""

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.decision import Answer, Combine, Decision, Fold, Refuse, Renumber, Update
from deltaserve_server.model.difference import first_difference
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.machine import Machine
from deltaserve_server.model.policy import Async, Bounded, Policy, Reduction, Sync
from deltaserve_server.model.push import Key, Made, Push, PushResult, PushStatus, Share
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.sessions import Session

__all__ = [
    "Answer",
    "Async",
    "Bounded",
    "Combine",
    "Decision",
    "Fold",
    "Hyperparameters",
    "Key",
    "Layout",
    "Machine",
    "Made",
    "Policy",
    "Push",
    "PushResult",
    "PushStatus",
    "Reduction",
    "Refuse",
    "Refused",
    "Renumber",
    "Session",
    "Share",
    "Sync",
    "Tensor",
    "Update",
    "first_difference",
]
