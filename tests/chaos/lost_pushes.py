"""Checks that workers were told which of their pushes a restart lost: all that they knew of, and no others."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from history import History
from scenarios import Push, Scenario


class Entry(NamedTuple):
    """One thing that a worker learned: that a push is applied, that pushes are lost, or that it was fenced.

    Attributes:
        push: The push that is applied; number 0 of the session with lost pushes; None if the worker was fenced.
        incarnation: The server that said so; "" if unknown.
        lost: Numbers of the lost pushes; None if a push is applied.
        before: The server whose weights the worker had.
        restored: The newest surviving version of that server.
    """

    push: Push | None
    incarnation: str = ""
    lost: range | None = None
    before: str = ""
    restored: int = 0


def check_losses(
    scenario: Scenario, history: History, known: Mapping[tuple[str, int], Sequence[Entry]]
) -> Iterable[str]:
    """Yields wrong and missing reports of losses."""
    places = history.places()
    for (worker, life), entries in sorted(known.items()):
        for problem in _Worker(scenario, history, places).problems(entries):
            yield f"worker {worker} in its life {life}: {problem}"


class _Worker:
    """One life of a worker, and the pushes that it knows to be applied."""

    def __init__(self, scenario: Scenario, history: History, places: Mapping[Push, Sequence[tuple[int, int]]]) -> None:
        self._scenario = scenario
        self._history = history
        self._places = places
        self._known: set[Push] = set()

    def problems(self, entries: Sequence[Entry]) -> Iterator[str]:
        for entry in entries:
            if entry.push is None:
                self._known.clear()
                continue
            life = self._history.index(entry.incarnation) if entry.incarnation else None
            if entry.lost is not None and life is not None:
                yield from self._check_report(entry, entry.push.session, entry.lost, life)
                continue
            if life is not None:
                unreported = sorted(push for push in self._known if self._is_lost(push, life))
                if unreported:
                    yield f"it was not told that life {life} has lost {unreported}"
                    self._known -= set(unreported)
            self._known.add(entry.push)

    def _check_report(self, entry: Entry, session: str, reported: range, life: int) -> Iterator[str]:
        """Compares a report of losses with the pushes that the worker knew and the server lost."""
        lost = {push for push in self._known if push.session == session and self._is_lost(push, life)}
        numbers = sorted(push.sequence for push in lost)
        if numbers != list(reported):
            told = f"it was told that pushes {list(reported)} of session {session} are lost"
            yield f"{told}; {numbers} are, in life {life}"
        restored = self._history.surviving_version(self._history.index(entry.before), life)
        if entry.restored != restored:
            yield f"it was told that version {entry.restored} is left of what it had; it is {restored}, in life {life}"
        if self._scenario.journals:
            yield f"it was told in life {life} that the server went back to version {entry.restored}"
        self._known -= lost

    def _is_lost(self, push: Push, life: int) -> bool:
        places = [(made, version) for made, version in self._places.get(push, ()) if made <= life]
        return not any(version <= self._history.surviving_version(made, life) for made, version in places)
