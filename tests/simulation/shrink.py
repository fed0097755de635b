"""Makes a history that ends in a violation short, and tells it."""

from collections.abc import Iterator, Sequence

from histories import Event, Scenario
from ledger import Violation
from simulator import SNAPSHOT_EVERY, Simulation

_RUNS = 3000
"""So many histories are tried at most."""


def violation(scenario: Scenario, events: Sequence[Event], snapshot_every: int = SNAPSHOT_EVERY) -> str | None:
    """Returns what is violated by a history, or None."""
    try:
        Simulation(scenario).run(events, snapshot_every)
    except Violation as found:
        return str(found)
    return None


def shortest(scenario: Scenario, events: Sequence[Event]) -> list[Event]:
    """Returns a part of a violating history that violates something too, and no event of which can be left out."""
    found = violation(scenario, events)
    assert found
    every = 1 if "has changed" in found else len(events)
    kept, runs = list(events), 0
    size = len(kept)
    while size and runs < _RUNS:
        size = min(size, len(kept))
        for start in range(len(kept) - size, -1, -size):
            without = kept[:start] + kept[start + size :]
            runs += 1
            if violation(scenario, without, every):
                kept = without
        size //= 2
    for index in range(len(kept)):
        for plainer in _plainer(kept[index]):
            changed = [*kept[:index], plainer, *kept[index + 1 :]]
            if violation(scenario, changed, every):
                kept = changed
    return kept


def _plainer(event: Event) -> Iterator[Event]:
    """Yields the event with one thing as it is by default."""
    plain = Event(event.kind)._asdict()
    for name, value in plain.items():
        if getattr(event, name) != value:
            yield Event(**event._asdict() | {name: value})


def story(scenario: Scenario, events: Sequence[Event]) -> str:
    """Returns a short history that violates what the given one does, told line by line."""
    kept = shortest(scenario, events)
    lines = [f"policy {scenario.policies[0]}"]
    try:
        Simulation(scenario, trace=lines.append).run(kept, 1)
    except Violation as found:
        lines.append(f"VIOLATION: {found}")
    return "\n".join(lines)
