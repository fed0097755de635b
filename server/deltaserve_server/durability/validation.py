"""Checks that what a file says is possible for a model.

A checksum only proves that nothing changed a file by chance. Somebody may have written it with a correct checksum, so
every value that could index out of range, allocate without bound or break an invariant is checked before it is used.
msgspec has checked the types; its own bounds do not reach beyond 63 bits, and most limits here depend on the model.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.durability.records import (
    Changed,
    Extended,
    Opened,
    Piece,
    Record,
    StatePut,
    Updated,
    VersionBumped,
)
from deltaserve_server.model import Async, Bounded, Machine, Sync, Tensor, UpdateSummary
from deltaserve_server.model.state import MachineState, SessionState, Settings

_UINT64_END = 1 << 64
"""Above every number that a message of the protocol can hold."""

Structure = tuple[object, ...]
"""What all optimizers of a model have in common: see `Optimizer.structure`."""

_GROUPS_REMEMBERED = 4096
_DIMENSIONS_MAX = 64
_ID_BYTES = 16


class InvalidRecord(ValueError):
    """A file contains a value that no server writes. The text says which."""


def check_model(model: MachineState) -> None:
    """Raises InvalidRecord unless a model can be in this state."""
    groups = len(model.settings.groups)
    _require(groups >= 1, "number of groups")
    structure = model.settings.groups[0].structure
    for settings in filter(None, (model.settings, model.initial_settings, model.next_settings)):
        _check_settings(settings, groups, structure)
    _check_tensors(model.tensors, groups)
    _require(0 < sum(tensor.size for tensor in model.tensors) < _UINT64_END, "number of elements")
    _check_update_counts(model.update_counts, len(model.tensors))
    _check_uint64("version", model.version, model.opened, *(epoch for _, epoch in model.epochs))
    _require(all(1 <= t <= len(model.tensors) and 1 <= g <= groups for t, g in model.earlier_sizes), "earlier size")
    updates = {update.version: update for update in model.updates}
    for update in model.updates:
        _check_summary(update, None, structure)
    for session in (*model.sessions, *model.ended):
        _check_session(session, len(model.tensors), groups)
        for push in session.window:
            _check_uint64("push", push.sequence, push.place)
            update_of_push = updates.get(push.version) if push.version is not None else None
            _require(update_of_push is None or push.place < len(update_of_push.contributions), "push of an update")
    _require(len({session.id for session in model.sessions}) == len(model.sessions), "session id, which occurs twice")
    _require(len({session.worker for session in model.sessions}) == len(model.sessions), "worker with two sessions")


def check_record(record: Record, machine: Machine) -> None:
    """Raises InvalidRecord unless the record can follow the model's present state."""
    event, pieces, layout = record.event, record.pieces, machine.layout
    structure, slots = machine.groups[0].structure, machine.slots
    match event:
        case Updated():
            _require(event.summary.version == machine.version + 1, "version")
            _check_summary(event.summary, len(machine.groups), structure)
            _require(len(event.sources) == len(event.summary.contributions) > 0, "number of pushes")
            _require(event.divisor < math.inf, "divisor")
            _require(all(0 <= index < len(layout.tensors) for index in event.absent), "absent tensor")
            _check_coverage(pieces, layout.runs(len(layout.tensors), event.absent), layout.size)
        case Opened(session):
            _check_session(session, len(layout.tensors), len(machine.groups))
        case Changed(settings):
            _check_settings(settings, len(machine.groups), structure)
        case VersionBumped(version):
            _require(version == machine.version + 1, "version")
        case StatePut(counts):
            _check_update_counts(counts, len(layout.tensors))
            _check_vectors(pieces, [layout.size] * (1 + len(slots)))
            for slot, (_, values) in zip(slots, pieces[1:], strict=True):
                _require(values.min(initial=slot.minimum) >= slot.minimum, f"element of {slot.name}")
        case Extended(tensors, groups):
            _check_groups(groups, structure)
            _check_tensors(tensors, len(machine.groups) + len(groups))
            _check_vectors(pieces, [sum(tensor.size for tensor in tensors)])
        case _:
            _require(not pieces, "vector")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvalidRecord(f"impossible value: {what}")


def _check_uint64(what: str, *numbers: int) -> None:
    _require(all(0 <= number < _UINT64_END for number in numbers), what)


def _check_update_counts(counts: Sequence[int], tensors: int) -> None:
    _require(len(counts) == tensors, "number of update counts")
    _check_uint64("update count", *counts)


def _check_groups(groups: Iterable[Optimizer], structure: Structure) -> None:
    for group in groups:
        found, problem = _examined(group)
        _require(found == structure, "optimizer of a group")
        _require(problem is None, f"hyperparameter {problem and problem[0]}")


@lru_cache(_GROUPS_REMEMBERED)
def _examined(group: Optimizer) -> tuple[Structure, tuple[str, str] | None]:
    """Returns an optimizer's structure and what is wrong with it; every record of an update repeats all groups."""
    return group.structure, group.problem()


def _check_settings(settings: Settings, groups: int, structure: Structure) -> None:
    policies = [policy for policy in (settings.sync, settings.asynchronous, settings.bounded) if policy is not None]
    _require(len(policies) == 1, "number of policies")
    _require(len(settings.groups) == groups, "number of groups")
    _check_groups(settings.groups, structure)
    match policy := policies[0]:
        case Sync():
            waits = policy.grace_seconds, policy.round_timeout_seconds or 0.0
            _require(policy.min_workers >= 1 and policy.quorum != 0, "number of workers")
            _require(all(seconds >= 0 for seconds in waits), "waiting time")
            _require(policy.clip_norm is None or policy.clip_norm > 0, "clip_norm")
            _check_uint64("number of workers", policy.min_workers, policy.trim, policy.quorum or 1)
        case Async():
            _check_uint64("max_staleness", policy.max_staleness or 0)
        case Bounded():
            _check_uint64("slack", policy.slack)


def _check_tensors(tensors: Iterable[Tensor], groups: int) -> None:
    for tensor in tensors:
        _require(len(tensor.shape) <= _DIMENSIONS_MAX, "number of dimensions")
        _check_uint64("shape", *tensor.shape)
        _require(0 <= tensor.group < groups, "group of a tensor")


def _check_session(session: SessionState, tensors: int, groups: int) -> None:
    _require(len(session.id) == _ID_BYTES, "session id")
    _check_uint64("session", session.epoch, session.rank, session.first_version, session.last_applied, session.clock)
    _require(1 <= session.tensor_count <= tensors and 1 <= session.group_count <= groups, "layout of a session")
    _require(0 < session.lease_seconds < _UINT64_END, "lease")
    _require(all(1 <= push.sequence <= session.last_applied for push in session.window), "push of a session")


def _check_summary(summary: UpdateSummary, groups: int | None, structure: Structure) -> None:
    _check_uint64("version of an update", summary.version)
    _require(groups is None or len(summary.hyperparameters) == groups, "number of groups")
    _check_groups(summary.hyperparameters, structure)
    for contribution in summary.contributions:
        _check_uint64("push of an update", contribution.epoch, contribution.sequence, contribution.staleness)


def _check_coverage(pieces: Sequence[Piece], ranges: Iterable[tuple[int, int]], size: int) -> None:
    """Checks that pieces are in order and within a vector of `size` elements, and cover all of the ranges."""
    end = 0
    for offset, values in pieces:
        _require(end <= offset and offset + values.size <= size, "piece of the vector")
        end = offset + values.size
    end_of_pieces = size, size
    left = iter([*((offset, offset + values.size) for offset, values in pieces if values.size), end_of_pieces])
    low, high = next(left)
    for start, stop in ranges:
        at = start
        while at < stop:
            while high <= at and (low, high) != end_of_pieces:
                low, high = next(left)
            _require(low <= at < high, "vector without some of its elements")
            at = high


def _check_vectors(pieces: Sequence[Piece], sizes: Sequence[int]) -> None:
    _require([values.size for _, values in pieces] == list(sizes), "length of a vector")
    _require(all(values.dtype == np.float32 and np.isfinite(values).all() for _, values in pieces), "element")
