"""When a push becomes an update."""

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "trimmed_mean", "median"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sync:
    """A round closes when every live session has pushed for it, or enough of them have and time is up.

    Attributes:
        min_workers: A round needs at least this many pushes.
        quorum: So many pushes are enough when `grace_seconds` have passed since there were as many; None means all.
        grace_seconds: How long a round with a quorum waits for the rest.
        round_timeout_seconds: How long a round lasts from its first push; None means without end.
        reduction: How its pushes become one gradient.
        trim: Values that "trimmed_mean" leaves out at either end.
        clip_norm: A push of a larger L2 norm is scaled down to this one; None means that none is.
    """

    min_workers: int = 1
    quorum: int | None = None
    grace_seconds: float = 0.0
    round_timeout_seconds: float | None = None
    reduction: Reduction = "mean"
    trim: int = 0
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Async:
    """Every push is an update at once.

    Attributes:
        max_staleness: A push whose base is more versions old is refused; None means that none is.
        damping: Divide lr by 1 + staleness (Zhang et al., 2016, arXiv:1511.05950).
    """

    max_staleness: int | None = None
    damping: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded:
    """Every push is an update at once; its worker waits while it is too far ahead (Ho et al., 2013).

    Attributes:
        slack: How many steps it may be ahead of the slowest live session.
    """

    slack: int = 0


Policy = Sync | Async | Bounded


def reduces_alike(before: Policy, after: Policy, pushes: int) -> bool:
    """Returns whether a round of so many pushes, reduced in part under one policy, can be closed under another."""
    return (
        isinstance(before, Sync)
        and isinstance(after, Sync)
        and (before.reduction, before.trim, before.clip_norm) == (after.reduction, after.trim, after.clip_norm)
        and after.min_workers <= pushes
    )
