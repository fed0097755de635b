"""The interface that all transports have in common."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from deltaserve._common.element_types import ElementType
from deltaserve._common.flat_vector import FlatVector
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._weights import LocalWeights
from deltaserve.v1 import common_pb2
from deltaserve.v1 import worker_service_pb2 as rpc

TransportName = Literal["auto", "stream", "shared"]
"""Whether vectors travel through shared memory: where possible, never, or always."""

TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)


def check_transport(name: TransportName) -> None:
    """Raises ValueError if there is no transport of this name."""
    if name not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {name!r}")


@dataclass(slots=True)
class Push:
    """A push to send.

    Attributes:
        header: Names the push and describes it; the transport sets its own fields.
        gradient: All tensors of the layout, absent ones included.
        absent: Indices of the tensors without a gradient.
        resent: Whether the server may have received a push of this number before. Shared memory may then still be read.
        overlapped: A push that began during backward and may turn out to be this one; None if none did.
        timeout_seconds: How long the transport may take; None means the connection's timeout.
    """

    header: rpc.PushHeader
    gradient: FlatVector
    absent: list[int]
    resent: bool = False
    overlapped: OverlappedPush | None = None
    timeout_seconds: float | None = None


class Answer(NamedTuple):
    """The server's answer to a push: the result, and where the model stands."""

    result: rpc.PushResult
    position: common_pb2.ModelPosition


class Transport(Protocol):
    """Carries the vectors of one session.

    Attributes:
        wire: The type of elements in messages, of pulls too.
    """

    @property
    def wire(self) -> ElementType: ...

    def step(self, push: Push, weights: LocalWeights) -> Answer:
        """Sends a push, waits for its update and writes the new weights to `weights.target`.

        Raises:
            Error: The server refused the push, or did not answer in time.
            ServerRestartedError: The answer came from another incarnation of the server.
        """
        ...

    def begin(self, overlapped: OverlappedPush, header: rpc.PushHeader, size: int) -> bool:
        """Starts to send a push before its gradient is whole.

        Args:
            overlapped: The push.
            header: What it is expected to be.
            size: The number of its elements, without absent tensors.

        Returns:
            False if this transport gains nothing by it.
        """
        ...

    def close(self) -> None:
        """Releases memory. A later push still works, through messages."""
        ...
