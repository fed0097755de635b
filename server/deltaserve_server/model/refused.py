"""How the rooms of the server say no."""

_LENGTH = 256
"""Characters of a metadata value."""


class Refused(Exception):
    """A request that is refused; it has changed nothing.

    Attributes:
        reason: A name of `deltaserve.v1.ErrorReason` without its prefix; the error table has code and text for it.
        metadata: The table's keys for this reason.
        retry_seconds: When the same request may succeed, or None where a retry does not help.
    """

    def __init__(self, reason: str, retry_seconds: float | None = None, /, **metadata: object) -> None:
        super().__init__(reason, metadata)
        self.reason = reason
        self.metadata = {key: _line(str(value)) for key, value in metadata.items()}
        self.retry_seconds = retry_seconds


def _line(text: str) -> str:
    """Returns one short line: names come from clients, and clients take headers of a few KiB only."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= _LENGTH else f"{shown[:_LENGTH]}..."
