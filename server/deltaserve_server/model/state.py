"""A model's state but its vectors as a value that can be written down; and the machine that goes on from one.

What waits for a round is no part of it: nobody was told that it counts, so its worker sends it again.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.model.layout import Layout, Tensor
from deltaserve_server.model.machine import Machine
from deltaserve_server.model.policy import Async, Bounded, Policy, Sync
from deltaserve_server.model.push import PushResult, UpdateSummary
from deltaserve_server.model.round import Round
from deltaserve_server.model.sessions import Record, Remembered, Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Hyperparameters by group, and a policy, one of the three."""

    groups: tuple[Hyperparameters, ...]
    sync: Sync | None = None
    asynchronous: Async | None = None
    bounded: Bounded | None = None

    @classmethod
    def of(cls, groups: tuple[Hyperparameters, ...], policy: Policy) -> Self:
        """Returns the settings that have this policy."""
        match policy:
            case Sync():
                return cls(groups=groups, sync=policy)
            case Async():
                return cls(groups=groups, asynchronous=policy)
            case Bounded():
                return cls(groups=groups, bounded=policy)

    @property
    def policy(self) -> Policy:
        """The policy; raises ValueError where there is none."""
        policy = self.sync or self.asynchronous or self.bounded
        if policy is None:
            raise ValueError("settings without a policy")
        return policy


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedPush:
    """A push of a session's window.

    Attributes:
        sequence: Its number.
        fingerprint: Of its values.
        version: Of the update that it is part of; None where that is no longer known.
        place: Its place among the pushes of that update.
    """

    sequence: int
    fingerprint: int | None
    version: int | None = None
    place: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionState:
    """A session: see `Session`. No push of it waits."""

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
        """Returns a session's image."""
        given = {name: getattr(session, name) for name in cls.__slots__ if name != "window"}
        applied = (n for n in sorted(session.window) if n <= session.last_applied)
        return cls(**given, window=tuple(_applied(n, session.window[n]) for n in applied))

    def session(self, summary: Mapping[int, UpdateSummary], now: float) -> Session:
        """Returns the session, its lease begun anew."""
        given = {name: getattr(self, name) for name in self.__slots__ if name != "window"}
        session = Session(**given, last_accepted=self.last_applied, expires=now + self.lease_seconds)
        session.window = {image.sequence: _record(image, summary) for image in self.window}
        return session


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineState:
    """A machine without what waits; see `Machine` and `Sessions`.

    Attributes:
        next: Settings that take effect when the open round closes.
        opened: Version at which the open round began.
        summary: The updates that windows refer to.
    """

    name: str
    tensors: tuple[Tensor, ...]
    settings: Settings
    created_as: Settings
    next: Settings | None
    version: int
    update_counts: tuple[int, ...]
    shorter: tuple[tuple[int, int], ...]
    opened: int
    sessions: tuple[SessionState, ...]
    ended: tuple[SessionState, ...]
    epochs: tuple[tuple[str, int], ...]
    fenced: tuple[tuple[bytes, str], ...]
    summary: tuple[UpdateSummary, ...]

    @classmethod
    def of(cls, machine: Machine) -> Self:
        """Returns a machine's image."""
        live, remembered = machine.sessions.live(), machine.sessions.image()
        return cls(
            name=machine.name,
            tensors=machine.layout.tensors,
            settings=Settings.of(machine.groups, machine.policy),
            created_as=Settings.of(*machine.created_as),
            next=Settings.of(*machine.next) if machine.next else None,
            version=machine.version,
            update_counts=tuple(machine.update_counts),
            shorter=tuple(sorted(machine.shorter)),
            opened=machine.round.opened,
            sessions=tuple(map(SessionState.of, live)),
            ended=tuple(map(SessionState.of, remembered.ended)),
            epochs=remembered.epochs,
            fenced=remembered.fenced,
            summary=_made_of([*live, *remembered.ended]),
        )

    def machine(self, now: float) -> Machine:
        """Returns a machine in this state; leases begin at `now`. Call `Machine.resume` before the first event."""
        machine = Machine(self.name, Layout(self.tensors), self.settings.groups, self.settings.policy)
        machine.created_as = self.created_as.groups, self.created_as.policy
        machine.next = (self.next.groups, self.next.policy) if self.next else None
        machine.version = self.version
        machine.update_counts = list(self.update_counts)
        machine.shorter = set(self.shorter)
        machine.round = Round(opened=self.opened)
        summary = {update.version: update for update in self.summary}
        ended = tuple(image.session(summary, now) for image in self.ended)
        machine.sessions.remember(Remembered(epochs=self.epochs, fenced=self.fenced, ended=ended))
        for image in self.sessions:
            machine.sessions.add(image.session(summary, now))
        return machine


def _applied(sequence: int, record: Record) -> AppliedPush:
    result = record.result
    if result is None or result.contribution is None or result.summary is None:
        return AppliedPush(sequence=sequence, fingerprint=record.fingerprint)
    place = result.summary.contributions.index(result.contribution)
    return AppliedPush(sequence=sequence, fingerprint=record.fingerprint, version=result.summary.version, place=place)


def _record(image: AppliedPush, summary: Mapping[int, UpdateSummary]) -> Record:
    update = summary.get(image.version) if image.version is not None else None
    if update is None:
        return Record(image.fingerprint)
    contribution = update.contributions[image.place]
    return Record(image.fingerprint, PushResult(version=update.version, contribution=contribution, summary=update))


def _made_of(sessions: Iterable[Session]) -> tuple[UpdateSummary, ...]:
    """Returns the updates in the windows of sessions, once each."""
    results = [record.result for session in sessions for record in session.window.values()]
    summary = {result.summary.version: result.summary for result in results if result and result.summary}
    # A norm may be infinite, which JSON cannot say: see `adadelta.cpu.update`.
    return tuple(replace(update, norm=min(update.norm, sys.float_info.max)) for update in summary.values())
