"""What a journal's records say."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.adadelta.formats import Values
from deltaserve_server.model import Tensor, UpdateSummary
from deltaserve_server.model.state import SessionState, Settings

Piece = tuple[int, Values]
"""Elements from an offset on."""


class Updated(msgspec.Struct, tag="update", frozen=True, kw_only=True):
    """An update. Its vector is the gradient, in pieces.

    Attributes:
        summary: What was made.
        absent: Tensors that it left as they were.
        sources: Session id and fingerprint of each push, in the order of `summary.contributions`.
        divisor: What the gradient is divided by.
    """

    summary: UpdateSummary
    absent: frozenset[int]
    sources: tuple[tuple[bytes, int | None], ...]
    divisor: float


class Opened(msgspec.Struct, tag="session", frozen=True):
    """A session was opened."""

    session: SessionState


class Ended(msgspec.Struct, tag="sessions ended", frozen=True):
    """Sessions were closed, or their leases ran out."""

    ids: tuple[bytes, ...]


class Changed(msgspec.Struct, tag="settings", frozen=True):
    """Hyperparameters and policy were changed, or are to be when the open round closes."""

    settings: Settings
    waits: bool


class VersionBumped(msgspec.Struct, tag="version", frozen=True):
    """The weights as they are were given a new version."""

    version: int


class StatePut(msgspec.Struct, tag="state", frozen=True):
    """The whole state was replaced. Its vector is weights, square_avg and acc_delta, one after the other."""

    update_counts: tuple[int, ...]


class Extended(msgspec.Struct, tag="extension", frozen=True):
    """Tensors and groups were added. Its vector is the new weights."""

    tensors: tuple[Tensor, ...]
    groups: tuple[Hyperparameters, ...]


Event = Updated | Opened | Ended | Changed | VersionBumped | StatePut | Extended


@dataclass(frozen=True, slots=True)
class Record:
    """What happened, and the vector that belongs to it.

    Attributes:
        index: Counts a model's records, from 1.
        event: What happened.
        pieces: The vector, in ascending order of offsets.
    """

    index: int
    event: Event
    pieces: Sequence[Piece] = ()


class Header(msgspec.Struct, frozen=True):
    """The part of a record that is JSON.

    Attributes:
        event: What happened.
        pieces: Of its vector: offset, number of elements and numpy's name of the type.
    """

    event: Event
    pieces: tuple[tuple[int, int, str], ...] = ()


def finite(event: Event) -> Event:
    """Returns an event that JSON can say: what is infinite is as large as a number can be, which rounds to the same."""
    if not isinstance(event, Updated):
        return event
    summary = replace(event.summary, norm=min(event.summary.norm, sys.float_info.max))
    return msgspec.structs.replace(event, summary=summary, divisor=min(event.divisor, sys.float_info.max))


DTYPES = {name: np.dtype(name) for name in ("<f4", "<f2", "<u2")}
"""The types that a piece may have."""
