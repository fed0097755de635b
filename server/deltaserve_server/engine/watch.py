"""What happens to a model, told to those who watch it; whoever is slow is left behind."""

from collections import deque
from collections.abc import Iterator
from threading import Condition

from deltaserve.v1 import common_pb2
from deltaserve.v1 import model_service_pb2 as rpc
from deltaserve_server.model import Refused, UpdateSummary
from deltaserve_server.service import conversion

_KEPT = 256
"""Messages that wait for one watcher."""


class Watcher:
    """The messages that one call has still to send; iterating waits for them, until it is closed.

    Args:
        first: The first message.
    """

    def __init__(self, first: rpc.WatchModelResponse) -> None:
        self._messages = deque([first])
        self._missed = 0
        self._closed = False
        self._refusal: Refused | None = None
        self._changed = Condition()

    def put(self, message: rpc.WatchModelResponse) -> None:
        """Adds a message, in place of the oldest where too many wait."""
        with self._changed:
            if len(self._messages) == _KEPT:
                self._messages.popleft()
                self._missed += 1
            self._messages.append(message)
            self._changed.notify()

    def close(self, refusal: Refused | None = None) -> None:
        """Ends the iteration, with `refusal` where there is one, once what waits is taken."""
        with self._changed:
            self._closed = True
            self._refusal = self._refusal or refusal
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages or self._closed)
                if not self._messages:
                    break
                message, missed, self._missed = self._messages.popleft(), self._missed, 0
            if missed:
                counted = rpc.WatchModelResponse(missed=missed)
                counted.MergeFrom(message)  # other watchers have the same one
                message = counted
            yield message.SerializeToString()
        if self._refusal:
            raise self._refusal


def message(position: common_pb2.ModelPosition, summary: UpdateSummary | None) -> rpc.WatchModelResponse:
    """Returns the message for a version, and the update that made it, if one did."""
    if summary is None:
        return rpc.WatchModelResponse(position=position)
    contributions = [
        rpc.Contribution(
            worker=contribution.worker,
            epoch=contribution.epoch,
            sequence=contribution.sequence,
            staleness=contribution.staleness,
            weight=contribution.weight,
            gradient_norm=contribution.norm,
        )
        for contribution in summary.contributions
    ]
    groups = conversion.from_groups(summary.hyperparameters)
    update = rpc.UpdateEvent(contributions=contributions, hyperparameters=groups, update_norm=summary.norm)
    return rpc.WatchModelResponse(position=position, update=update)
