"""Conversion between optimizers and their messages, by the names of kinds and hyperparameters."""

from functools import lru_cache

from deltaserve._common.optimizers import OPTIMIZERS, Optimizer
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve.v1 import optimizers_pb2

_CACHE_SIZE = 1024
"""Every push and its answer have the optimizers of all groups, most often those of the push before."""


def to_message(optimizer: Optimizer) -> optimizers_pb2.Optimizer:
    """Returns the message of an optimizer, with all fields set; callers share it and must not change it.

    Raises:
        TypeError: `optimizer` is not an optimizer, or a hyperparameter is not a number.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected an optimizer, such as Adadelta(...) or AdamW(...), got {optimizer!r}")
    return _message(optimizer)


@lru_cache(_CACHE_SIZE)
def _message(optimizer: Optimizer) -> optimizers_pb2.Optimizer:
    message = optimizers_pb2.Optimizer()
    fields = getattr(message, optimizer.kind)
    for name in hyperparameters(optimizer):
        setattr(fields, name, getattr(optimizer, name))
    return message


def from_message(message: optimizers_pb2.Optimizer, unset: Optimizer | None = None) -> Optimizer | None:
    """Returns the optimizer of a message, or None if the message has none. Hyperparameters are not checked.

    Args:
        message: The message. It is kept for a while, so that one from elsewhere must not have unknown fields, which may
            be large.
        unset: An optimizer of the same kind, whose values unset fields take; None means the defaults of the kind.
    """
    return _parsed(message.SerializeToString(), unset)


@lru_cache(_CACHE_SIZE)
def _parsed(data: bytes, unset: Optimizer | None) -> Optimizer | None:
    message = optimizers_pb2.Optimizer.FromString(data)
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    given = {field.name: value for field, value in getattr(message, kind).ListFields()}
    if unset is None:
        return OPTIMIZERS[kind](**given)
    return type(unset)(**{name: getattr(unset, name) for name in hyperparameters(unset)} | given)
