"""The exceptions of the public interface."""

from collections.abc import Mapping


class Error(Exception):
    """Base class of all errors of a server or of the connection to it.

    Attributes:
        reason: The server's reason, a name of `ErrorReason` in the proto without its prefix. None if the server did not
            decide: it was not reached, or did not answer in time.
        metadata: Details of the reason, by the keys that the proto lists for it.
    """

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = dict(metadata or {})


class RequestError(Error):
    """The server cannot carry out the request as it is, and has changed nothing. Change the request."""


class ConflictError(Error):
    """The request contradicts the server's state: another layout, another round, other values under the same number."""


class StaleGradientError(ConflictError):
    """The gradient was computed on weights that are too old. Newer ones are in place: compute it again, or skip it."""


class RolledBackError(StaleGradientError):
    """The server restarted from an older state: the weights that the gradient was computed on are lost.

    The current weights are in place, and the worker goes on from them: compute the gradient again, or skip it.

    Attributes:
        version: The version that the worker's weights had.
        restored_version: The last version before it that is not lost.
        lost_pushes: Numbers of this worker's pushes that were applied and are lost, as counted in its old session.
    """

    def __init__(self, message: str, *, version: int, restored_version: int, lost_pushes: range) -> None:
        super().__init__(message)
        self.version = version
        self.restored_version = restored_version
        self.lost_pushes = lost_pushes


class SessionError(Error):
    """The worker's session is over: a newer one of the same name replaced it, it was closed, or its lease ran out."""


class UnavailableError(Error):
    """The server was not reached, did not answer in time or had no capacity, after all retries."""


class StateLostError(Error):
    """The server restarted without the model, or without a part of it; the message says which."""


class ServerError(Error):
    """A fault of the server; `metadata["incident"]` is an id in its log."""
