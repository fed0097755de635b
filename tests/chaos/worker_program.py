"""A worker under test: it steps for as long as it may, and writes down what it sent and what it was told."""

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
"""What no error may say: the server kept its word, and was not away for that long."""


class Journal:
    """A worker's own file: one line a write, which its death does not undo.

    B LIFE SESSION SEQUENCE NUMBER: a push is about to be sent, again perhaps, with this gradient.
    A LIFE SESSION SEQUENCE NUMBER VERSION INCARNATION POSITION DURABLE CHECK: a gradient was acknowledged, in this
    push, as part of VERSION, or of one that was not told (0); weights of version POSITION came, with this CRC-32, from
    a server that said that version DURABLE is.
    K LIFE SESSION SEQUENCE: the worker has found out that a push counts, whose answer was lost.
    L LIFE SESSION VERSION RESTORED START STOP BEFORE INCARNATION: pushes [START, STOP) of a session were said to be
    lost, and versions from RESTORED on to that of the worker's weights, which were of server BEFORE, in INCARNATION.
    F LIFE: the worker's session was fenced, as by an OpenSession that came twice; another worker takes its place.
    R ERROR REASON: an error that a worker has to expect.
    ! TRACEBACK: another one.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


class Program:
    """Pushes one gradient after the other: the same one until it is acknowledged, or given up unsure of its fate."""

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
                        self._write_down_pushes_of(worker)
                        self._write_down_finds_of(worker)
                        self._steps(worker)
            except Exception as error:
                if not _may_pass(error):
                    self._journal.write("!", repr(traceback.format_exc()))
                    return 3
                self._failed(error)
                if isinstance(error, SessionError):
                    self._journal.write("F", self._life)
            self._number += 1  # what became of the last one is not known
        return 0

    def _write_down_pushes_of(self, worker: deltaserve.Worker) -> None:
        """A step may push twice: after a push whose answer was lost, and in a new session."""
        membership, transport = worker._membership, worker._membership.transport

        def written_down() -> Transport:
            session = membership.session  # the transport is asked for just before a push is sent
            self._pushed = session.id["session_id"].hex(), session.sequence
            self._journal.write("B", self._life, *self._pushed, self._number)
            return transport()

        membership.transport = written_down  # type: ignore[method-assign]

    def _write_down_finds_of(self, worker: deltaserve.Worker) -> None:
        """Takes note of what only the worker itself sees: pushes that it found to count, and the session it left."""
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
            if membership.owed is None:  # else it leaves one in which it has done nothing
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
                if isinstance(error, SessionError) or not _may_pass(error):
                    raise
                self._failed(error)
                if isinstance(error, RolledBackError):
                    self._lost(error, worker._session.opened.position.incarnation)
                if self._number % 4 == 0 and not isinstance(error, StaleGradientError):
                    self._number += 1  # as one who computes another gradient after an error
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
        told = self._number, version, position.incarnation, position.version, position.durable_version, check
        self._journal.write("A", self._life, *self._pushed, *told)

    def _lost(self, error: RolledBackError, incarnation: str) -> None:
        session, before = self._left
        told = error.version, error.restored_version, error.lost_pushes.start, error.lost_pushes.stop
        self._journal.write("L", self._life, session, *told, before, incarnation)

    def _failed(self, error: Exception) -> None:
        reason = getattr(error, "reason", None)
        self._journal.write("R", type(error).__name__, reason)
        sleep(0.01)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True


def _may_pass(error: Exception) -> bool:
    """Whether a worker that meets this error simply steps again: it is one that a fault here may lead to."""
    if any(text in str(error) for text in _NEVER):
        return False
    if isinstance(error, ServerError | UnavailableError | FailpointError | StaleGradientError | SessionError):
        return True
    # A request whose iterator failed, or a proxy's own end: the transport's word, not the server's.
    return type(error) is Error and error.reason is None


def main(arguments: list[str]) -> int:
    name, life, target, journal, policy, door, transport, pause = arguments
    scenario, way = Scenario(policy, door), cast(TransportName, transport)
    return Program(name, int(life), target, journal, scenario, way, pause).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
