"""The exception with which every room of the server refuses a request."""

_MAX_CHARACTERS = 256


class Refused(Exception):
    """A request that is refused. It has changed nothing.

    Attributes:
        reason: A name of `deltaserve.v1.ErrorReason` without its prefix; the error table has its code and text.
        metadata: Values for the keys that the table lists for this reason.
        retry_seconds: When to send the same request again; None means that a retry does not help.
    """

    def __init__(self, reason: str, retry_seconds: float | None = None, /, **metadata: object) -> None:
        super().__init__(reason, metadata)
        self.reason = reason
        self.metadata = {key: _printable(str(value)) for key, value in metadata.items()}
        self.retry_seconds = retry_seconds


def _printable(text: str) -> str:
    """Returns one short line. Names come from clients, and gRPC limits headers to a few KiB."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[:_MAX_CHARACTERS]}..."
