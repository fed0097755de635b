"""What goes wrong with a server, as exceptions."""

from collections.abc import Mapping


class Error(Exception):
    """Whatever goes wrong with a server.

    Attributes:
        reason: The server's reason, a name of `ErrorReason` in the proto without its prefix; None where the server did
            not decide: it was not reached, or did not answer in time.
        metadata: What the reason says further, by the keys that the proto lists with it.
    """

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = dict(metadata or {})


class RequestError(Error):
    """The request cannot be met as it is: change it. Nothing was changed by it."""


class ConflictError(Error):
    """The request contradicts what is there: another layout, another round, other content under the same number."""


class StaleGradientError(ConflictError):
    """The gradient is of weights that are too old. Newer ones are here now: compute it again, or leave it out."""


class RolledBackError(StaleGradientError):
    """The server was restarted from an older state: the gradient is of weights that are lost, and so are some pushes.

    The weights of now are in place, and the worker goes on from them: compute the gradient again, or leave it out.

    Attributes:
        version: The version that the worker's weights had.
        restored_version: The last version before that which is not lost.
        lost_pushes: Numbers of this worker's pushes that were applied, and are lost; counted in the session that it
            had.
    """

    def __init__(self, message: str, *, version: int, restored_version: int, lost_pushes: range) -> None:
        super().__init__(message)
        self.version = version
        self.restored_version = restored_version
        self.lost_pushes = lost_pushes


class SessionError(Error):
    """The worker's session is over: fenced by a newer one of the same name, closed, or its lease ran out."""


class UnavailableError(Error):
    """The server was not reached, did not answer in time or had no room, after all retries."""


class StateLostError(Error):
    """The server was restarted and does not have the model any more, or lacks a part of it; the message says what."""


class ServerError(Error):
    """A fault of the server; `metadata["incident"]` is an id in its log."""
