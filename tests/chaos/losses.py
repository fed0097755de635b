"""Whether workers were told which of their pushes a restart has lost: all that they knew to count, and no others."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from history import History
from scenarios import Push, Scenario


class Entry(NamedTuple):
    """What a worker came to know: that a push counts; that pushes are lost; or that it is over itself.

    Attributes:
        push: That push; or one of the session in which they were, number 0; None for the last.
        incarnation: The life that told so; "" where it is not known.
        lost: Their numbers; None where it is the former.
        before: The life that the worker's weights were of.
        restored: The last version of that which is left.
    """

    push: Push | None
    incarnation: str = ""
    lost: range | None = None
    before: str = ""
    restored: int = 0


def check_losses(
    scenario: Scenario, history: History, known: Mapping[tuple[str, int], Sequence[Entry]]
) -> Iterable[str]:
    """Yields what workers were told wrongly, or not told."""
    places = history.places()
    for (worker, life), entries in sorted(known.items()):
        for problem in _Worker(scenario, history, places).problems(entries):
            yield f"worker {worker} in its life {life}: {problem}"


class _Worker:
    """One process of a worker: what it knows to count as it goes on."""

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
                yield from self._told(entry, entry.push.session, entry.lost, life)
                continue
            if life is not None:
                silent = sorted(push for push in self._known if self._is_lost(push, life))
                if silent:
                    yield f"it was not told that life {life} has lost {silent}"
                    self._known -= set(silent)
            self._known.add(entry.push)

    def _told(self, entry: Entry, session: str, told: range, life: int) -> Iterator[str]:
        """Compares what the worker was told with what it knew and is not there any more."""
        lost = {push for push in self._known if push.session == session and self._is_lost(push, life)}
        numbers = sorted(push.sequence for push in lost)
        if numbers != list(told):
            yield f"it was told that pushes {list(told)} of session {session} are lost; {numbers} are, in life {life}"
        restored = self._history.left(self._history.index(entry.before), life)
        if entry.restored != restored:
            yield f"it was told that version {entry.restored} is left of what it had; it is {restored}, in life {life}"
        if self._scenario.journals:
            yield f"it was told in life {life} that the server went back to version {entry.restored}"
        self._known -= lost

    def _is_lost(self, push: Push, life: int) -> bool:
        places = [(made, version) for made, version in self._places.get(push, ()) if made <= life]
        return not any(version <= self._history.left(made, life) for made, version in places)
