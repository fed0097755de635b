"""When a push becomes an update."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sync:
    """A round closes when every live session has pushed for it; the update takes the mean.

    Attributes:
        min_workers: A round needs at least this many pushes.
    """

    min_workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Async:
    """Every push is an update at once."""


Policy = Sync | Async
