"""A worker under test: it steps until SIGTERM, and keeps a journal of what it sent and what it was told."""

import os
import signal
import sys
import traceback
from time import sleep
from types import FrameType
from typing import Any, cast
from zlib import crc32

import numpy as np
from scenarios import LEASE_SECONDS, MODEL, GradientName, Scenario

import deltaserve
from deltaserve import Error, RolledBackError, ServerError, SessionError, StaleGradientError, UnavailableError
from deltaserve._common.failpoints import FailpointError
from deltaserve._transport.protocol import Transport, TransportName

_TIMEOUT_SECONDS = 4.0

_NEVER = "went back from version", "too long ago"
"""Texts of errors that no fault explains: the server neither lost versions nor was down that long."""


class Journal:
    """A worker's journal: one line in each write, which a kill does not undo.

    B LIFE SESSION SEQUENCE NUMBER: the worker is about to send this gradient in this push, perhaps again.
    A LIFE SESSION SEQUENCE NUMBER VERSION INCARNATION POSITION DURABLE CHECK: the server acknowledged the gradient as
    part of VERSION, or of an unknown version (0), and answered with weights of version POSITION and this CRC-32;
    version DURABLE was durable.
    K LIFE SESSION SEQUENCE: the worker found out that a push is applied whose answer was lost.
    L LIFE SESSION VERSION RESTORED START STOP BEFORE INCARNATION: server INCARNATION reported pushes [START, STOP) of a
    session as lost, and the versions after RESTORED up to VERSION, that of the worker's weights from server BEFORE.
    F LIFE: the worker's session was fenced, for instance by a duplicated OpenSession.
    R ERROR REASON: an error that a fault of the harness explains.
    ! TRACEBACK: any other error.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


class Program:
    """Pushes one gradient after the other, each until it is acknowledged or given up with an unknown outcome."""

    def __init__(
        self, name: str, life: int, target: str, journal: str, scenario: Scenario, transport: TransportName, pause: str
    ) -> None:
        self._name = name
        self._life = life
        self._target = target
        self._journal = Journal(journal)
        self._scenario = scenario
        self._transport: TransportName = transport
        self._pause_seconds = float(pause)
        self._number = 1
        self._pushed: tuple[str, int] = "", 0
        self._left: tuple[str, str] = "", ""
        self._ending = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._end)
        while not self._ending:
            try:
                with deltaserve.connect(self._target, timeout_seconds=_TIMEOUT_SECONDS) as client:
                    model = client.model(MODEL)
                    with model.worker(self._name, lease_seconds=LEASE_SECONDS, transport=self._transport) as worker:
                        self._log_pushes(worker)
                        self._log_discoveries(worker)
                        self._steps(worker)
            except Exception as error:
                if not _is_expected(error):
                    self._journal.write("!", repr(traceback.format_exc()))
                    return 3
                self._failed(error)
                if isinstance(error, SessionError):
                    self._journal.write("F", self._life)
            self._number += 1  # the outcome of the last one is unknown
        return 0

    def _log_pushes(self, worker: deltaserve.Worker) -> None:
        """Logs each push before it is sent: one step may push twice, after a lost answer or in a new session."""
        membership, transport = worker._membership, worker._membership.transport

        def logged() -> Transport:
            session = membership.session  # the transport is asked for just before a push is sent
            self._pushed = session.id["session_id"].hex(), session.sequence
            self._journal.write("B", self._life, *self._pushed, self._number)
            return transport()

        membership.transport = logged  # type: ignore[method-assign]

    def _log_discoveries(self, worker: deltaserve.Worker) -> None:
        """Logs what only the worker knows: pushes that it found to be applied, and the session that it left."""
        membership = worker._membership
        skip, replace = worker._skip_accepted, membership._replace_session

        def skipped(*rest: Any) -> None:
            session = worker._session
            sequence = session.sequence
            try:
                skip(*rest)
            finally:
                if session.sequence > sequence:
                    self._journal.write("K", self._life, session.id["session_id"].hex(), sequence)

        def replaced(*rest: Any) -> None:
            if membership.owed is None:  # else it leaves a session in which it has pushed nothing
                self._left = worker._session.id["session_id"].hex(), worker._weights.position.incarnation
            replace(*rest)

        worker._skip_accepted = skipped  # type: ignore[method-assign, assignment]
        membership._replace_session = replaced  # type: ignore[method-assign, assignment]

    def _steps(self, worker: deltaserve.Worker) -> None:
        while not self._ending:
            try:
                self._step(worker)
                self._number += 1
            except Exception as error:
                if isinstance(error, SessionError) or not _is_expected(error):
                    raise
                self._failed(error)
                if isinstance(error, RolledBackError):
                    self._lost(error, worker._session.opened.position.incarnation)
                if self._number % 4 == 0 and not isinstance(error, StaleGradientError):
                    self._number += 1  # like a caller that computes a new gradient after an error
            sleep(self._pause_seconds)

    def _step(self, worker: deltaserve.Worker) -> None:
        gradient = self._scenario.gradient(GradientName(self._name, self._life, self._number))
        tensors = enumerate(self._scenario.cut(gradient.values).items())
        weights = worker.step(
            {name: None if index in gradient.absent else part for index, (name, part) in tensors},
            hyperparameters=gradient.hyperparameters,
            weight=gradient.weight,
        )
        result = worker.last_result
        assert result is not None
        version = result.version if result.staleness is not None else 0
        check = crc32(np.concatenate([part.reshape(-1) for part in weights.values()]).tobytes())
        position = worker._weights.position
        fields = self._number, version, position.incarnation, position.version, position.durable_version, check
        self._journal.write("A", self._life, *self._pushed, *fields)

    def _lost(self, error: RolledBackError, incarnation: str) -> None:
        session, before = self._left
        fields = error.version, error.restored_version, error.lost_pushes.start, error.lost_pushes.stop
        self._journal.write("L", self._life, session, *fields, before, incarnation)

    def _failed(self, error: Exception) -> None:
        reason = getattr(error, "reason", None)
        self._journal.write("R", type(error).__name__, reason)
        sleep(0.01)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True


def _is_expected(error: Exception) -> bool:
    """Returns whether a fault of the harness explains an error, so that the worker steps again."""
    if any(text in str(error) for text in _NEVER):
        return False
    if isinstance(error, ServerError | UnavailableError | FailpointError | StaleGradientError | SessionError):
        return True
    # Without a reason the error comes from the transport: a failed request iterator, or the proxy's own end.
    return type(error) is Error and error.reason is None


def main(arguments: list[str]) -> int:
    name, life, target, journal, policy, door, optimizer, transport, pause = arguments
    scenario, way = Scenario(policy, door, optimizer_name=optimizer), cast(TransportName, transport)
    return Program(name, int(life), target, journal, scenario, way, pause).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
