"""Whether what a file says can have been written: its checksum tells that nothing changed it by chance, and no more."""

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from deltaserve_server.adadelta import Hyperparameters
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
from deltaserve_server.model import Async, Bounded, Machine, Policy, Sync, Tensor, UpdateSummary
from deltaserve_server.model.state import MachineState, SessionState, Settings

_MOST = 1 << 64
"""Larger than any number that a message can hold."""

_ID_BYTES = 16


class InvalidRecord(ValueError):
    """No server writes that; the text says what."""


def check_model(model: MachineState) -> None:
    """Raises Implausible where no model is like that."""
    groups = len(model.settings.groups)
    for settings in filter(None, (model.settings, model.initial_settings, model.next_settings)):
        _check_settings(settings, groups)
    _check_tensors(model.tensors, groups)
    _need(0 < sum(tensor.size for tensor in model.tensors) < _MOST, "its size")
    _check_counts(model.update_counts, len(model.tensors))
    _check_numbers("its version", model.version, model.opened, *(epoch for _, epoch in model.epochs))
    _need(all(1 <= t <= len(model.tensors) and 1 <= g <= groups for t, g in model.earlier_sizes), "an extension of it")
    summary = {update.version: update for update in model.updates}
    for update in model.updates:
        _check_made(update, None)
    for session in (*model.sessions, *model.ended):
        _check_session(session, len(model.tensors), groups)
        for push in session.window:
            _check_numbers("a push", push.sequence, push.place)
            held = summary.get(push.version) if push.version is not None else None
            _need(held is None or push.place < len(held.contributions), "a push of an update")
    _need(len({session.id for session in model.sessions}) == len(model.sessions), "two sessions of one id")
    _need(len({session.worker for session in model.sessions}) == len(model.sessions), "two sessions of one worker")


def check_record(record: Record, machine: Machine) -> None:
    """Raises Implausible where that does not happen to a model as it stands."""
    event, pieces, layout = record.event, record.pieces, machine.layout
    match event:
        case Updated():
            _check_update(event, machine)
            _check_cover(pieces, [(start, stop) for start, stop, _ in layout.groups(event.absent)], layout.size)
        case Opened(session):
            _check_session(session, len(layout.tensors), len(machine.groups))
        case Changed(settings):
            _check_settings(settings, len(machine.groups))
        case VersionBumped(version):
            _need(version == machine.version + 1, "its version")
        case StatePut(counts):
            _check_counts(counts, len(layout.tensors))
            _check_vectors(pieces, [layout.size] * 3)
            _need(all(values.min(initial=0) >= 0 for _, values in pieces[1:]), "a vector of squares")
        case Extended(tensors, groups):
            for group in groups:
                _check_group(group)
            _check_tensors(tensors, len(machine.groups) + len(groups))
            _check_vectors(pieces, [sum(tensor.size for tensor in tensors)])
        case _:
            _need(not pieces, "a vector")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidRecord(f"{what} cannot be")


def _check_numbers(what: str, *numbers: int) -> None:
    _need(all(0 <= number < _MOST for number in numbers), what)


def _check_counts(counts: Sequence[int], tensors: int) -> None:
    _need(len(counts) == tensors, "the number of update counts")
    _check_numbers("an update count", *counts)


def _check_group(group: Hyperparameters) -> None:
    problem = group.problem()
    _need(problem is None, f"hyperparameter {problem and problem[0]}")


def _check_settings(settings: Settings, groups: int) -> None:
    policies = [one for one in (settings.sync, settings.asynchronous, settings.bounded) if one is not None]
    _need(len(policies) == 1, "the number of policies")
    _need(len(settings.groups) == groups >= 1, "the number of groups")
    for group in settings.groups:
        _check_group(group)
    _check_policy(policies[0])


def _check_policy(policy: Policy) -> None:
    match policy:
        case Sync():
            waits = policy.grace_seconds, policy.round_timeout_seconds or 0.0
            _need(policy.min_workers >= 1 and policy.trim >= 0 and (policy.quorum or 1) >= 1, "a number of workers")
            _need(policy.quorum != 0 and all(seconds >= 0 for seconds in waits), "a time to wait")
            _need(policy.clip_norm is None or policy.clip_norm > 0, "clip_norm")
            _check_numbers("a number of workers", policy.min_workers, policy.trim, policy.quorum or 1)
        case Async():
            _check_numbers("max_staleness", policy.max_staleness or 0)
        case Bounded():
            _check_numbers("slack", policy.slack)


def _check_tensors(tensors: Iterable[Tensor], groups: int) -> None:
    for tensor in tensors:
        _need(len(tensor.shape) <= 64 and all(0 <= length < _MOST for length in tensor.shape), "a shape")
        _need(0 <= tensor.group < groups, "the group of a tensor")


def _check_session(session: SessionState, tensors: int, groups: int) -> None:
    _need(len(session.id) == _ID_BYTES, "the id of a session")
    _check_numbers("a session", session.epoch, session.rank, session.first_version, session.last_applied, session.clock)
    _need(1 <= session.tensor_count <= tensors and 1 <= session.group_count <= groups, "what a session knows")
    _need(0 < session.lease_seconds < _MOST, "a lease")
    _need(all(1 <= push.sequence <= session.last_applied for push in session.window), "a push of a session")


def _check_made(summary: UpdateSummary, groups: int | None) -> None:
    _check_numbers("an update", summary.version)
    _need(groups is None or len(summary.hyperparameters) == groups, "the number of groups")
    for group in summary.hyperparameters:
        _check_group(group)
    for contribution in summary.contributions:
        _check_numbers("a push of an update", contribution.epoch, contribution.sequence, contribution.staleness)


def _check_update(event: Updated, machine: Machine) -> None:
    _need(event.summary.version == machine.version + 1, "its version")
    _check_made(event.summary, len(machine.groups))
    _need(len(event.sources) == len(event.summary.contributions) > 0, "the number of its pushes")
    _need(0 < event.divisor < math.inf, "its divisor")
    _need(all(0 <= index < len(machine.layout.tensors) for index in event.absent), "a tensor that is absent")


def _check_cover(pieces: Sequence[Piece], ranges: Collection[tuple[int, int]], size: int) -> None:
    """Checks that pieces are in order, within a vector of so many elements, and that none is missing in a range."""
    end = 0
    for offset, values in pieces:
        _need(end <= offset and offset + values.size <= size, "a piece of its vector")
        end = offset + values.size
    left = iter([*((offset, offset + values.size) for offset, values in pieces if values.size), (size, size)])
    low, high = next(left)
    for start, stop in ranges:
        at = start
        while at < stop:
            while high <= at < size and (low, high) != (size, size):
                low, high = next(left)
            _need(low <= at < high, "a vector without some of its elements")
            at = high


def _check_vectors(pieces: Sequence[Piece], sizes: Sequence[int]) -> None:
    _need([values.size for _, values in pieces] == list(sizes), "the length of a vector")
    _need(all(values.dtype == np.float32 and np.isfinite(values).all() for _, values in pieces), "a value")
