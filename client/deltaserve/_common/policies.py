"""Policies: when a push becomes an update."""

from dataclasses import dataclass, fields
from typing import Literal

from deltaserve.v1 import common_pb2

_REDUCTIONS = ("mean", "trimmed_mean", "median")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sync:
    """Workers wait for each other: a round closes, and makes one update, when every live worker has pushed.

    Attributes:
        min_workers: Pushes that a round needs, >= 1.
        quorum: Pushes that are enough after `grace_seconds`; None waits for all workers.
        grace_seconds: How long a round with a quorum still waits for the other workers.
        round_timeout_seconds: How long a round lasts from its first push. It then closes with the pushes that it has,
            or fails if they are fewer than `min_workers`. None means no limit.
        reduction: How the pushes become one gradient, element by element: "mean", weighted; "trimmed_mean", which keeps
            the result within the range of honest workers if up to `trim` workers push nonsense; "median".
        trim: Values that "trimmed_mean" drops at either end; `min_workers` is at least 2 * trim + 1.
        clip_norm: A push with a larger L2 norm is scaled down to this norm; None means no clipping.
    """

    min_workers: int = 1
    quorum: int | None = None
    grace_seconds: float = 0.0
    round_timeout_seconds: float | None = None
    reduction: Literal["mean", "trimmed_mean", "median"] = "mean"
    trim: int = 0
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Async:
    """Workers never wait: every push is an update at once.

    Attributes:
        max_staleness: The server refuses a push whose weights are more versions old than this; None means no limit.
        damping: Divide lr by 1 + the push's staleness (Zhang et al., 2016, arXiv:1511.05950).
    """

    max_staleness: int | None = None
    damping: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded:
    """Every push is an update at once, but a worker that is too far ahead waits (Ho et al., 2013).

    Attributes:
        slack: How many steps a worker may be ahead of the slowest live worker, >= 0.
    """

    slack: int = 0


Policy = Sync | Async | Bounded


def to_policy(message: common_pb2.Policy) -> Policy:
    """Returns the policy of a message."""
    which = message.WhichOneof("policy")
    given = {field.name: value for field, value in getattr(message, which).ListFields()} if which else {}
    if which == "sync":
        reduction = common_pb2.Reduction.Name(given["reduction"]).removeprefix("REDUCTION_").lower()
        return Sync(**(given | {"reduction": reduction}))
    return Bounded(**given) if which == "bounded" else Async(**given)


def from_policy(policy: Policy) -> common_pb2.Policy:
    """Returns the message of a policy.

    Raises:
        TypeError: `policy` is not a policy.
        ValueError: A setting does not fit the message.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: expected Sync(...), Async(...) or Bounded(...), got {policy!r}")
    message = common_pb2.Policy()
    part = getattr(message, type(policy).__name__.lower())
    part.SetInParent()  # selects the policy, even if all its fields keep their defaults
    for field in fields(policy):
        value = getattr(policy, field.name)
        if field.name == "reduction":
            if value not in _REDUCTIONS:
                raise ValueError(f"reduction: expected mean, trimmed_mean or median, got {value!r}")
            # Enum values share one namespace in protobuf, hence the prefix.
            part.reduction = common_pb2.Reduction.Value(f"REDUCTION_{value.upper()}")
        elif value is not None and value != field.default:
            try:
                setattr(part, field.name, value)
            except ValueError:
                raise ValueError(f"{field.name}: expected a whole number of at least 0, got {value!r}") from None
    return message
