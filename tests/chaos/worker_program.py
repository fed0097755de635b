"""A worker under test: it steps for as long as it may, and writes down what it sent and what it was told."""

import os
import signal
import sys
import traceback
from time import sleep
from types import FrameType
from typing import Any
from zlib import crc32

import numpy as np
from scenarios import LEASE_SECONDS, MODEL, GradientName, Scenario

import deltaserve
from deltaserve import Error, ServerError, SessionError, StaleGradientError, UnavailableError
from deltaserve._failpoints import FailpointError
from deltaserve.v1.worker_service_pb2 import PushHeader

_TIMEOUT_SECONDS = 4.0


class Journal:
    """A worker's own file: one line a write, which its death does not undo.

    O EPOCH SESSION: a session.
    B EPOCH SEQUENCE LIFE NUMBER: a push is about to be sent, again perhaps, with this gradient.
    A LIFE NUMBER VERSION POSITION CHECK: a gradient was acknowledged, in whatever push, as part of VERSION, or of
    one that was not told (0); weights of version POSITION came, with this CRC-32.
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
        self, name: str, life: int, target: str, journal: str, scenario: Scenario, pause_seconds: float
    ) -> None:
        self._name = name
        self._life = life
        self._target = target
        self._journal = Journal(journal)
        self._scenario = scenario
        self._pause_seconds = pause_seconds
        self._number = 1
        self._epoch = 0
        self._ending = False

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._end)
        while not self._ending:
            try:
                with deltaserve.connect(self._target, timeout_seconds=_TIMEOUT_SECONDS) as client:
                    model = client.model(MODEL)
                    with model.worker(self._name, lease_seconds=LEASE_SECONDS) as worker:
                        self._write_down_pushes_of(worker)
                        self._steps(worker)
            except Exception as error:
                if not isinstance(error, SessionError) and not _may_pass(error):
                    self._journal.write("!", repr(traceback.format_exc()))
                    return 3
                self._failed(error)
            self._number += 1  # what became of the last one is not known
        return 0

    def _write_down_pushes_of(self, worker: deltaserve.Worker) -> None:
        """A step may push twice: after a push whose answer was lost, and in a new session."""
        push = worker._push

        def written_down(header: PushHeader, *rest: Any) -> None:
            if header.epoch != self._epoch:
                self._journal.write("O", header.epoch, header.session_id.hex())
                self._epoch = header.epoch
            self._journal.write("B", header.epoch, header.sequence, self._life, self._number)
            push(header, *rest)

        worker._push = written_down  # type: ignore[method-assign, assignment]

    def _steps(self, worker: deltaserve.Worker) -> None:
        while not self._ending:
            try:
                self._step(worker)
                self._number += 1
            except Exception as error:
                if not _may_pass(error):
                    raise
                self._failed(error)
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
        self._journal.write("A", self._life, self._number, version, worker.version, check)

    def _failed(self, error: Exception) -> None:
        reason = getattr(error, "reason", None)
        self._journal.write("R", type(error).__name__, reason)
        sleep(0.01)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True


def _may_pass(error: Exception) -> bool:
    """Whether a worker that meets this error simply steps again: it is one that a fault here may lead to."""
    if isinstance(error, ServerError | UnavailableError | FailpointError | StaleGradientError):
        return True
    # A request whose iterator failed, or a proxy's own end: the transport's word, not the server's.
    return type(error) is Error and error.reason is None


def main(arguments: list[str]) -> int:
    name, life, target, journal, policy, door, pause = arguments
    return Program(name, int(life), target, journal, Scenario(policy, door), float(pause)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
