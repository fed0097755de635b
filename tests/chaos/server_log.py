"""The server's own log of its updates, announcements and snapshots, written as they happen; a kill does not undo it.

Each line is JSON, in one write. {"life": INCARNATION} begins one start of the server, and these follow:

restored   the version that the model came back with
update     an update that is about to begin, with its pushes; a kill may prevent it
bumped     a version that no update makes and that is about to begin; a kill may prevent it
announced  a version that clients may know of from now on
saved      the version of a snapshot that is safe on disk
serving    the time at which the server has started
ended      the server has saved everything and ends in good order
"""

import json
import os
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import msgspec

from deltaserve_server.durability import recovery, snapshot
from deltaserve_server.durability.commits import Commits, Effect, Journaled
from deltaserve_server.durability.records import Event, Piece, VersionBumped
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Update


class ServerLog:
    """Appends entries to the log file."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, **entry: Any) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())

    def install(self) -> None:
        """Makes the server in this process log each event before any client can know of it."""
        self._log_updates()
        for kind in (Commits, Journaled):
            self._log_bumps(kind)
        self._log_snapshots()
        self._log_recovery()

    def _log_updates(self) -> None:
        update = ModelEngine._update

        def logged(engine: ModelEngine, decision: Update) -> None:
            summary = decision.summary
            sessions = [session.hex() for session, _ in decision.sources]
            pushes = [
                [*astuple(contribution), session]
                for contribution, session in zip(summary.contributions, sessions, strict=True)
            ]
            groups = msgspec.to_builtins(summary.hyperparameters)
            self.write(update=summary.version, pushes=pushes, hyperparameters=groups)
            update(engine, decision)
            engine._commits.on_durable(partial(self.write, announced=summary.version))

        ModelEngine._update = logged  # type: ignore[method-assign, assignment]

    def _log_bumps(self, kind: type[Commits]) -> None:
        add = kind.add

        def logged(commits: Commits, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
            if isinstance(event, VersionBumped):
                self.write(bumped=event.version)
            add(commits, event, pieces, done)
            if isinstance(event, VersionBumped):
                commits.on_durable(partial(self.write, announced=event.version))

        kind.add = logged  # type: ignore[method-assign, assignment]

    def _log_snapshots(self) -> None:
        write = snapshot.write

        def logged(*arguments: Any) -> Entry:
            entry = write(*arguments)
            self.write(saved=entry.version)
            return entry

        snapshot.write = logged  # type: ignore[assignment]

    def _log_recovery(self) -> None:
        recover = recovery.recover

        def logged(*arguments: Any, **options: Any) -> recovery.Recovered:
            recovered = recover(*arguments, **options)
            self.write(restored=recovered.machine.version - recovered.version_bumped)
            return recovered

        recovery.recover = logged
