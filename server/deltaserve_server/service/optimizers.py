"""Converts between the messages of optimizers and their values, and checks that they are those of a model."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, repeat

from deltaserve._common.optimizer_messages import from_message, to_message
from deltaserve._common.optimizers import OPTIMIZERS, Optimizer, Slot
from deltaserve._common.optimizers.definition import described, hyperparameters
from deltaserve.v1 import optimizers_pb2
from deltaserve_server.model import Refused

_GROUPS = 4096
_SHOWN_NAMES = 8
_SHOWN_LENGTH = 24
"""How many names a text shows, and how many characters of each."""


def to_groups(
    messages: Sequence[optimizers_pb2.Optimizer],
    *,
    field: str = "groups",
    unset: Sequence[Optimizer] = (),
    count: int = 0,
) -> tuple[Optimizer, ...]:
    """Returns optimizers by group.

    Args:
        messages: One message for each group.
        field: Name of the field that has them.
        unset: By group, the optimizer whose values unset fields take. Where there is none, or it is of another kind,
            they take the defaults of their kind.
        count: Number of groups that precede these.

    Raises:
        Refused: OPTIMIZER_UNKNOWN or HYPERPARAMETER_INVALID.
    """
    if count + len(messages) > _GROUPS:
        raise Refused("HYPERPARAMETER_INVALID", field=field, allowed=f"at most {_GROUPS} groups")
    groups = []
    for index, (message, model_group) in enumerate(zip(messages, chain(unset, repeat(None)), strict=False)):
        known = optimizers_pb2.Optimizer()
        known.CopyFrom(message)
        known.DiscardUnknownFields()
        same_kind = model_group is not None and model_group.kind == known.WhichOneof("kind")
        group = from_message(known, model_group if same_kind else None)
        if group is None:
            raise Refused("OPTIMIZER_UNKNOWN", field=f"{field}[{index}]", allowed=", ".join(OPTIMIZERS))
        if known.ByteSize() != message.ByteSize():  # a hyperparameter of a newer client, whose training would differ
            allowed = f"no fields but {', '.join(hyperparameters(group))}, which this server knows"
            raise Refused("HYPERPARAMETER_INVALID", field=f"{field}[{index}].{group.kind}", allowed=allowed)
        problem = _problem(group)
        if problem:
            raise Refused("HYPERPARAMETER_INVALID", field=problem[0], allowed=problem[1])
        groups.append(group)
    return tuple(groups)


def from_groups(groups: Iterable[Optimizer]) -> list[optimizers_pb2.Optimizer]:
    """Returns the messages of optimizers by group."""
    return [to_message(group) for group in groups]


def check_alike(groups: Sequence[Optimizer]) -> None:
    """Raises Refused HYPERPARAMETER_INVALID unless the groups of a new model have one optimizer."""
    for index, group in enumerate(groups):
        if _structure(group) != _structure(groups[0]):
            allowed = f"{described(groups[0])}, as groups[0] is"
            raise Refused("HYPERPARAMETER_INVALID", field=f"groups[{index}]", allowed=allowed)


def check_matches(model: str, expected: Optimizer, groups: Iterable[Optimizer]) -> None:
    """Raises Refused OPTIMIZER_MISMATCH unless all groups have a model's optimizer, whose name is `model`."""
    for group in groups:
        if _structure(group) != _structure(expected):
            raise Refused("OPTIMIZER_MISMATCH", model=model, expected=described(expected), got=described(group))


# Pushes may carry optimizers, and most carry the same ones again and again. Each of the two takes tens of microseconds.
@lru_cache(_GROUPS)
def _problem(optimizer: Optimizer) -> tuple[str, str] | None:
    return optimizer.problem()


@lru_cache(_GROUPS)
def _structure(optimizer: Optimizer) -> tuple[object, ...]:
    return optimizer.structure


def check_slots(names: Sequence[str], slots: Sequence[Slot]) -> None:
    """Raises Refused STATE_MISMATCH unless the names are those of the slots, in order."""
    expected = [slot.name for slot in slots]
    if list(names) != expected:
        raise Refused("STATE_MISMATCH", expected=_listed(expected), got=_listed(names))


def _listed(names: Sequence[str]) -> str:
    """Returns a short text. Names may come from a client, and there may be any number of them."""
    shown = [name if len(name) <= _SHOWN_LENGTH else f"{name[:_SHOWN_LENGTH]}..." for name in names[:_SHOWN_NAMES]]
    further = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + further if shown else "none"
