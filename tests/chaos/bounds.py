"""Checks of the surviving updates: sequence numbers, rounds, staleness and slack."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from history import Update
from scenarios import Push, Scenario

from deltaserve import Async, Bounded, Sync


def check_numbers(made: Mapping[Push, Sequence[int]]) -> Iterable[str]:
    """Checks that each session's pushes were applied in the order of their numbers, without a gap."""
    sessions: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for push, versions in made.items():
        sessions[push.worker, push.session].append((versions[0], push.sequence))
    for session, applied in sessions.items():
        numbers = [sequence for _, sequence in sorted(applied)]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"session {session} had its pushes applied in the order {numbers}"


def check_bounds(scenario: Scenario, updates: Sequence[Update], figures: dict[str, float]) -> Iterable[str]:
    policy = scenario.policy
    stale = max((one.staleness for update in updates for one in update.contributions), default=0)
    figures["staleness"] = stale
    most = policy.max_staleness if isinstance(policy, Async) else None
    if isinstance(policy, Sync):
        yield from _check_rounds(updates)
    if most is not None and stale > most:
        yield f"a push was {stale} versions old; {most} are allowed"
    if isinstance(policy, Bounded):
        apart = _farthest_apart(updates)
        figures["steps apart"] = apart
        # Each of two live sessions is at most slack + 1 steps ahead of the other, counting the push that waits.
        if apart > 2 * (policy.slack + 1):
            yield f"two workers moved {apart} steps apart; slack {policy.slack} allows {2 * (policy.slack + 1)}"


def _check_rounds(updates: Sequence[Update]) -> Iterable[str]:
    """Checks that every push of a round is based on the weights of the last update; version bumps may lie between."""
    last = 0
    for update in updates:
        for one in update.contributions:
            if update.version - 1 - one.staleness < last:
                yield f"version {update.version} has a push of a closed round: {one}"
        last = update.version if update.contributions else last


def _farthest_apart(updates: Sequence[Update]) -> int:
    """Returns the largest change of the distance of two sessions while both lived."""
    times: dict[tuple[str, int], list[int]] = defaultdict(list)
    for update in updates:
        for one in update.contributions:
            times[one.worker, one.epoch].append(update.version)
    most = 0
    for mine, theirs in combinations(times.values(), 2):
        first, last = max(mine[0], theirs[0]), min(mine[-1], theirs[-1])
        moves = sorted([(at, 1) for at in mine] + [(at, -1) for at in theirs])
        distance = lowest = highest = 0
        for at, move in moves:
            if first <= at <= last:
                distance += move
                lowest, highest = min(lowest, distance), max(highest, distance)
        most = max(most, highest - lowest)
    return most
