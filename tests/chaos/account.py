"""The server's own account of what it makes, tells and saves, written as it happens, which no death undoes.

A line is JSON, and one write. {"life": ...} begins one start of the server; then there are

restored   the version that the model came back with
made       an update that is about to be made, with its pushes; it may come to nothing
numbered   a version that no update makes, likewise
told       a version that everybody may know of
saved      the version of a snapshot that is safe
serving    the time from which on everything is there
ended      everything is saved, and the server ends in good order
"""

import json
import os
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

from deltaserve_server.durability import recovery, snapshot
from deltaserve_server.durability.commits import Commits, Effect, Journaled
from deltaserve_server.durability.records import Event, Piece, VersionBumped
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Update


class Account:
    """The file."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, **entry: Any) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())

    def keep(self) -> None:
        """Has this process write down from now on what happens in it, each thing before anybody can know of it."""
        self._note_updates()
        for kind in (Commits, Journaled):
            self._note_numbers(kind)
        self._note_snapshots()
        self._note_recovery()

    def _note_updates(self) -> None:
        update = ModelEngine._update

        def noted(engine: ModelEngine, decision: Update) -> None:
            summary = decision.summary
            sessions = [session.hex() for session, _ in decision.sources]
            pushes = [
                [*astuple(contribution), session]
                for contribution, session in zip(summary.contributions, sessions, strict=True)
            ]
            self.write(
                summary=summary.version, pushes=pushes, hyperparameters=list(map(astuple, summary.hyperparameters))
            )
            update(engine, decision)
            engine._commits.on_durable(partial(self.write, told=summary.version))

        ModelEngine._update = noted  # type: ignore[method-assign, assignment]

    def _note_numbers(self, kind: type[Commits]) -> None:
        add = kind.add

        def noted(commits: Commits, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
            if isinstance(event, VersionBumped):
                self.write(numbered=event.version)
            add(commits, event, pieces, done)
            if isinstance(event, VersionBumped):
                commits.on_durable(partial(self.write, told=event.version))

        kind.add = noted  # type: ignore[method-assign, assignment]

    def _note_snapshots(self) -> None:
        write = snapshot.write

        def noted(*arguments: Any) -> Entry:
            entry = write(*arguments)
            self.write(saved=entry.version)
            return entry

        snapshot.write = noted  # type: ignore[assignment]

    def _note_recovery(self) -> None:
        recover = recovery.recover

        def noted(*arguments: Any, **options: Any) -> recovery.Recovered:
            came = recover(*arguments, **options)
            self.write(restored=came.machine.version - came.version_bumped)
            return came

        recovery.recover = noted
