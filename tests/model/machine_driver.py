"""A driver for the tests of the state machine: a machine, a manual clock, and the decisions so far."""

import itertools

import pytest

from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve_server.model import (
    Answer,
    BumpVersion,
    Combine,
    Contribution,
    Decision,
    Fold,
    Key,
    Layout,
    Machine,
    Policy,
    Push,
    PushResult,
    PushStatus,
    Refuse,
    Refused,
    Session,
    Tensor,
    Update,
)

LEASE = 10.0


class Driver:
    """A machine, a clock that only `tick` advances, and the result of every push."""

    def __init__(self, policy: Policy, *groups: Optimizer) -> None:
        self.machine = Machine("m", Layout((Tensor("w", (2, 3)), Tensor("b", (3,)))), groups or (Adadelta(),), policy)
        self.now = 0.0
        self.decisions: list[Decision] = []
        self.folds: list[Key] = []
        self.factors: dict[Key, float] = {}
        self.combined: list[Combine] = []
        self.updates: list[Update] = []
        self.version_bumped: list[int] = []
        self.answers: dict[Key, PushResult] = {}
        self.given_up: dict[Key, Refused] = {}
        self._ids = itertools.count()

    @property
    def version(self) -> int:
        return self.machine.version

    def open(self, worker: str, lease: float = LEASE) -> Session:
        session_id = next(self._ids).to_bytes(16, "big")
        session, decisions = self.machine.open_session(worker, session_id, lease, self.now)
        self._note(decisions)
        return session

    def close(self, session: Session) -> None:
        self._note(self.machine.close_session(session.id, session.epoch, self.now))

    def tick(self, seconds: float) -> list[str]:
        """Advances the clock. Returns the workers whose lease ran out."""
        self.now += seconds
        gone, decisions = self.machine.tick(self.now)
        self._note(decisions)
        return [session.worker for session in gone]

    def push(
        self,
        session: Session,
        sequence: int | None = None,
        *,
        base: int | None = None,
        fingerprint: int = 0,
        hyperparameters: Optimizer | None = None,
        absent: frozenset[int] = frozenset(),
        weight: float = 1.0,
        norm: float = 0.0,
    ) -> PushResult | None:
        """Pushes. Returns the answer; None if it does not come at once."""
        push = Push(
            session_id=session.id,
            epoch=session.epoch,
            sequence=session.last_accepted + 1 if sequence is None else sequence,
            base_version=base,
            hyperparameters=(hyperparameters,) if hyperparameters else None,
            absent=absent,
            weight=weight,
            fingerprint=fingerprint,
            norm=norm,
        )
        self.answers.pop(push.key, None)
        self._note(self.machine.push(push, self.now))
        return self.answers.get(push.key)

    def change(self, policy: Policy | None = None, *groups: Optimizer) -> int:
        """Changes the settings. Returns the first version that is made with them."""
        before = self.machine.configuration()
        first, decisions = self.machine.change(groups or before[0], policy or before[1], self.now)
        self._note(decisions)
        return first

    def status(self, session: Session, sequence: int = 1) -> PushStatus:
        return self.machine.push_status(session.id, sequence)

    def _note(self, decisions: list[Decision]) -> None:
        self.decisions += decisions
        for decision in decisions:
            match decision:
                case Fold(key, factor):
                    self.folds.append(key)
                    self.factors[key] = factor
                case Combine():
                    self.combined.append(decision)
                case Update():
                    self.updates.append(decision)
                case BumpVersion(version):
                    self.version_bumped.append(version)
                case Answer(key, result):
                    self.answers[key] = result
                case Refuse(key, refusal):
                    self.given_up[key] = refusal


def contributions(result: PushResult | None) -> tuple[Contribution, ...]:
    """Returns all contributions to the update of a result."""
    assert result
    assert result.summary
    return result.summary.contributions


def contribution(result: PushResult | None) -> Contribution:
    """Returns the contribution of the push that has this result."""
    assert result
    assert result.contribution
    return result.contribution


def refused(reason: str, **metadata: object) -> "pytest.RaisesExc[Refused]":
    """Expects a refusal whose metadata include these."""
    expected = {key: str(value) for key, value in metadata.items()}.items()
    return pytest.raises(Refused, check=lambda error: error.reason == reason and expected <= error.metadata.items())
