"""The records of a journal: one for each change of a model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import numpy as np

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.model import Tensor, UpdateSummary
from deltaserve_server.model.state import SessionState, Settings
from deltaserve_server.optimizers.formats import Values

Piece = tuple[int, Values]
"""A slice of the flat vector: the offset of its first element, and its values."""


class Updated(msgspec.Struct, tag="update", frozen=True, kw_only=True):
    """An update was applied. The record's vector is the summed gradient.

    Attributes:
        summary: What the update did.
        absent: Indices of the tensors that it left unchanged.
        sources: Session id and fingerprint of each push, in the order of `summary.contributions`.
        divisor: Number that the summed gradient is divided by.
    """

    summary: UpdateSummary
    absent: frozenset[int]
    sources: tuple[tuple[bytes, int | None], ...]
    divisor: Annotated[float, msgspec.Meta(gt=0)]


class Opened(msgspec.Struct, tag="session", frozen=True):
    """A session was opened."""

    session: SessionState


class Ended(msgspec.Struct, tag="sessions ended", frozen=True):
    """Sessions were closed, or their leases expired."""

    ids: tuple[bytes, ...]


class Changed(msgspec.Struct, tag="settings", frozen=True):
    """Hyperparameters and policy were changed.

    Attributes:
        settings: The new settings.
        waits: Whether they take effect when the open round closes; otherwise at once.
    """

    settings: Settings
    waits: bool


class VersionBumped(msgspec.Struct, tag="version", frozen=True):
    """The version was incremented without a change of the weights."""

    version: int


class StatePut(msgspec.Struct, tag="state", frozen=True):
    """The whole state was replaced. The record's vector is the weights and each slot, one after the other."""

    update_counts: tuple[int, ...]


class Extended(msgspec.Struct, tag="extension", frozen=True):
    """Tensors and groups were appended. The record's vector is the weights of the new tensors.

    Their slots have the initial values of their groups.
    """

    tensors: tuple[Tensor, ...]
    groups: tuple[Optimizer, ...]


Event = Updated | Opened | Ended | Changed | VersionBumped | StatePut | Extended


@dataclass(frozen=True, slots=True)
class Record:
    """A change of a model, with the vector that belongs to it.

    Attributes:
        index: Number of the record; a model's records count from 1.
        event: The change.
        pieces: The vector, in ascending order of offsets.
    """

    index: int
    event: Event
    pieces: Sequence[Piece] = ()


class RecordBody(msgspec.Struct, frozen=True):
    """The JSON part of a record.

    Attributes:
        event: The change.
        pieces: Offset, number of elements and numpy type string of each piece of the vector.
    """

    event: Event
    pieces: tuple[tuple[int, int, str], ...] = ()


def finite(event: Event) -> Event:
    """Returns the event with infinite numbers replaced by the largest double, since JSON has no infinity."""
    if not isinstance(event, Updated):
        return event
    summary = replace(event.summary, norm=min(event.summary.norm, sys.float_info.max))
    return msgspec.structs.replace(event, summary=summary, divisor=min(event.divisor, sys.float_info.max))


DTYPES = {name: np.dtype(name) for name in ("<f4", "<f2", "<u2")}
"""Element types that a piece may have."""
