"""What a server that restarted still has of what a worker knows.

A model's lineage names one unbroken course of its versions. A server that starts may begin a new one, and says at which
version it left each earlier lineage. A worker's history and the server's are thus two chains that agree up to some
version. Where that is older than the worker's weights, the weights are lost, and so are the pushes after it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltaserve._errors import RolledBackError
from deltaserve.v1 import worker_service_pb2 as rpc

History = Mapping[bytes, int]
"""By lineage, oldest first: the last version in it. In the newest lineage that is the present version."""


@dataclass(frozen=True, slots=True)
class NothingLost:
    """The server has everything that the worker knows."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The worker's weights or pushes are lost.

    Attributes:
        version: The last version that the worker and the server have in common.
        lost_pushes: Numbers of the worker's pushes that were acknowledged and are lost.
    """

    version: int
    lost_pushes: range


def history(ancestors: Iterable[rpc.Ancestor], lineage: bytes, version: int) -> dict[bytes, int]:
    """Returns a history: the lineages before the present one, and `version` of the present one."""
    return {**{ancestor.lineage: ancestor.version for ancestor in ancestors}, lineage: version}


def compare(
    worker: History, server: History, *, acknowledged: int, last_applied: int | None
) -> NothingLost | RolledBack | None:
    """Decides what of a worker's knowledge a server has lost.

    Returns None if no lineage is in common: the model is another one of the same name.

    Args:
        worker: The worker's history, up to the version of its weights.
        server: The model's history.
        acknowledged: The number of the session's last push whose answer the worker has; 0 for none.
        last_applied: The number of the session's last push that the server knows as applied; 0 for none. None if the
            server does not know the session.
    """
    # The newest lineage in common: in it the two histories part.
    lineage = next((lineage for lineage in reversed(list(worker)) if lineage in server), None)
    if lineage is None:
        return None
    common = min(worker[lineage], server[lineage])
    version = list(worker.values())[-1]
    # Acknowledged pushes are part of the worker's weights: weights that are not lost mean that no push is.
    if version > common or (last_applied is not None and last_applied < acknowledged):
        return RolledBack(common, range((last_applied or 0) + 1, acknowledged + 1))
    return NothingLost()


def rolled_back_error(worker: str, model: str, version: int, verdict: RolledBack) -> RolledBackError:
    """Returns the error for a worker whose weights, of `version`, or pushes are lost."""
    lost = verdict.lost_pushes
    pushes = f"pushes {lost[0]} to {lost[-1]} of this worker" if lost else "no push of this worker"
    return RolledBackError(
        f"worker {worker}: the server was restarted and has gone back to version {verdict.version} of model {model}: "
        f"what came after is lost, {pushes} among it. The gradient was computed on version {version} and is left out; "
        "a new session is open, and the current weights are in place",
        version=version,
        restored_version=verdict.version,
        lost_pushes=lost,
    )
