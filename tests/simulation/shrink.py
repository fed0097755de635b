"""Shortens a history that ends in a violation, and tells its story."""

from collections.abc import Iterator, Sequence

from histories import Event, Scenario
from ledger import Violation
from simulator import SNAPSHOT_EVERY, Simulation

_RUNS = 3000
"""Most histories that shortening tries."""


def violation(scenario: Scenario, events: Sequence[Event], snapshot_every: int = SNAPSHOT_EVERY) -> str | None:
    """Returns the violation that a history ends in, or None."""
    try:
        Simulation(scenario).run(events, snapshot_every)
    except Violation as found:
        return str(found)
    return None


def shortest(scenario: Scenario, events: Sequence[Event]) -> list[Event]:
    """Returns a part of a violating history that still violates something, and of which no event can be left out."""
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
    """Yields the event with one field set to its default."""
    plain = Event(event.kind)._asdict()
    for name, value in plain.items():
        if getattr(event, name) != value:
            yield Event(**event._asdict() | {name: value})


def story(scenario: Scenario, events: Sequence[Event]) -> str:
    """Returns the log of a short history that ends in a violation, one line for each event."""
    kept = shortest(scenario, events)
    lines = [f"policy {scenario.policies[0]}"]
    try:
        Simulation(scenario, trace=lines.append).run(kept, 1)
    except Violation as found:
        lines.append(f"VIOLATION: {found}")
    return "\n".join(lines)
