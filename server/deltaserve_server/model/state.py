"""A machine's state as plain values, which snapshots and journals write, and back.

Pushes that wait for a round are left out: nobody was told that they count, so their workers send them again.
"""

import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.machine import Machine
from deltaserve_server.model.policies import Async, Bounded, Policy, Sync
from deltaserve_server.model.push import PushResult, UpdateSummary
from deltaserve_server.model.sessions import Record, Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Hyperparameters by group, and exactly one policy."""

    groups: tuple[Optimizer, ...]
    sync: Sync | None = None
    asynchronous: Async | None = None
    bounded: Bounded | None = None

    @classmethod
    def of(cls, groups: tuple[Optimizer, ...], policy: Policy) -> Self:
        """Returns the settings for a policy."""
        match policy:
            case Sync():
                return cls(groups=groups, sync=policy)
            case Async():
                return cls(groups=groups, asynchronous=policy)
            case Bounded():
                return cls(groups=groups, bounded=policy)

    @property
    def policy(self) -> Policy:
        """The policy. Raises ValueError if there is none."""
        policy = self.sync or self.asynchronous or self.bounded
        if policy is None:
            raise ValueError("the settings have no policy")
        return policy


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedPush:
    """A push in the window of a session.

    Attributes:
        sequence: Its number in the session.
        fingerprint: Fingerprint of its values.
        version: Version that its update made; None where that is no longer known.
        place: Its index among the contributions to that update.
    """

    sequence: int
    fingerprint: int | None
    version: int | None = None
    place: int = 0

    @classmethod
    def of(cls, sequence: int, record: Record) -> Self:
        """Returns the state of a record."""
        result = record.result
        if result is None or result.contribution is None or result.summary is None:
            return cls(sequence=sequence, fingerprint=record.fingerprint)
        # By place: equal contributions would otherwise be stored once for the update and once for each session.
        place = result.summary.contributions.index(result.contribution)
        return cls(sequence=sequence, fingerprint=record.fingerprint, version=result.summary.version, place=place)

    def record(self, updates: Mapping[int, UpdateSummary]) -> Record:
        """Returns the record; `updates` are by version."""
        update = updates.get(self.version) if self.version is not None else None
        if update is None:
            return Record(self.fingerprint)
        contribution = update.contributions[self.place]
        return Record(self.fingerprint, PushResult(version=update.version, contribution=contribution, summary=update))


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionState:
    """The state of a session without pushes that wait; see `Session` for the fields."""

    worker: str
    id: bytes
    epoch: int
    rank: int
    tensor_count: int
    group_count: int
    lease_seconds: float
    first_version: int
    member: bool
    last_applied: int
    clock: int
    window: tuple[AppliedPush, ...] = ()

    @classmethod
    def of(cls, session: Session) -> Self:
        """Returns the state of a session."""
        fields = {name: getattr(session, name) for name in cls.__slots__ if name != "window"}
        # A push that waits is dropped: its worker sends it again, and it must not look like a duplicate then.
        applied = (number for number in sorted(session.window) if number <= session.last_applied)
        return cls(**fields, window=tuple(AppliedPush.of(number, session.window[number]) for number in applied))

    def session(self, updates: Mapping[int, UpdateSummary], now: float) -> Session:
        """Returns the session. Its lease begins at `now`; `updates` are those of its window, by version."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "window"}
        session = Session(**fields, last_accepted=self.last_applied, expires=now + self.lease_seconds)
        session.window = {push.sequence: push.record(updates) for push in self.window}
        return session


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineState:
    """The state of a machine without pushes that wait; see `Machine` and `Sessions` for the fields.

    Attributes:
        opened: Version at which the open round began.
        updates: The updates that windows refer to. One update is shared by the windows of all its workers.
    """

    name: str
    tensors: tuple[Tensor, ...]
    settings: Settings
    initial_settings: Settings
    next_settings: Settings | None
    version: int
    update_counts: tuple[int, ...]
    earlier_sizes: tuple[tuple[int, int], ...]
    opened: int
    sessions: tuple[SessionState, ...]
    ended: tuple[SessionState, ...]
    epochs: tuple[tuple[str, int], ...]
    fenced: tuple[tuple[bytes, str], ...]
    updates: tuple[UpdateSummary, ...]

    @classmethod
    def of(cls, machine: Machine) -> Self:
        """Returns the state of a machine."""
        live, ended = machine.sessions.live(), machine.sessions.ended.values()
        records = [record for session in [*live, *ended] for record in session.window.values()]
        summaries = [record.result.summary for record in records if record.result and record.result.summary]
        updates = {summary.version: summary for summary in summaries}
        return cls(
            name=machine.name,
            tensors=machine.layout.tensors,
            settings=Settings.of(machine.groups, machine.policy),
            initial_settings=Settings.of(*machine.initial_settings),
            next_settings=Settings.of(*machine.next_settings) if machine.next_settings else None,
            version=machine.version,
            update_counts=machine.update_counts,
            earlier_sizes=tuple(sorted(machine.earlier_sizes)),
            opened=machine.round.opened,
            sessions=tuple(map(SessionState.of, live)),
            ended=tuple(map(SessionState.of, ended)),
            epochs=tuple(machine.sessions.epochs.items()),
            fenced=tuple(machine.sessions.fenced.items()),
            # JSON has no infinity, which a norm may be: see `optimizers.cpu.update`.
            updates=tuple(replace(update, norm=min(update.norm, sys.float_info.max)) for update in updates.values()),
        )

    def machine(self, now: float) -> Machine:
        """Returns a machine in this state. Leases begin at `now`. Call `Machine.resume` before the first event."""
        machine = Machine(self.name, Layout(self.tensors), self.settings.groups, self.settings.policy)
        machine.initial_settings = self.initial_settings.groups, self.initial_settings.policy
        if self.next_settings:
            machine.next_settings = self.next_settings.groups, self.next_settings.policy
        machine.version = self.version
        machine.update_counts = self.update_counts
        machine.earlier_sizes = set(self.earlier_sizes)
        machine.round.opened = self.opened
        updates = {update.version: update for update in self.updates}
        machine.sessions.epochs = OrderedDict(self.epochs)
        machine.sessions.fenced = OrderedDict(self.fenced)
        machine.sessions.ended = OrderedDict((session.id, session.session(updates, now)) for session in self.ended)
        for session in self.sessions:
            machine.sessions.add(session.session(updates, now))
        return machine
