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
from deltaserve_server.durability.records import Event, Piece, Renumbered
from deltaserve_server.durability.snapshot import Entry
from deltaserve_server.model import Update
from deltaserve_server.service.applier import Applier


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
        update = Applier._update

        def noted(applier: Applier, decision: Update) -> None:
            made = decision.made
            sessions = [session.hex() for session, _ in decision.sources]
            pushes = [[*astuple(share), session] for share, session in zip(made.shares, sessions, strict=True)]
            self.write(made=made.version, pushes=pushes, hyperparameters=list(map(astuple, made.hyperparameters)))
            update(applier, decision)
            applier._commits.then(partial(self.write, told=made.version))

        Applier._update = noted  # type: ignore[method-assign, assignment]

    def _note_numbers(self, kind: type[Commits]) -> None:
        add = kind.add

        def noted(commits: Commits, event: Event, pieces: Sequence[Piece] = (), done: Effect | None = None) -> None:
            if isinstance(event, Renumbered):
                self.write(numbered=event.version)
            add(commits, event, pieces, done)
            if isinstance(event, Renumbered):
                commits.then(partial(self.write, told=event.version))

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
            self.write(restored=came.machine.version - came.waited)
            return came

        recovery.recover = noted
