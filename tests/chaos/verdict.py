"""Judges a run by what the workers wrote down, what the watcher saw, and what the server says afterwards."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from oracle import Oracle
from scenarios import GradientName, Scenario

from deltaserve import Async, Bounded, Contribution, ModelEvent, ModelState, PushStatus, Sync

Push = tuple[str, int, int]
"""Names a push: worker, epoch, sequence number."""


@dataclass
class Journals:
    """What the workers wrote down.

    Attributes:
        sessions: Session ids by worker and epoch.
        sent: Pushes that a worker began to send, and what they may hold: after an error it may have taken another
            gradient, whose push then got this number.
        told: Which version a worker was told that a gradient is in, or 0 where that was no longer known.
        seen: Versions with the CRC-32 of the weights that came with them.
        failures: How often which error came to the workers.
        broken: Tracebacks of errors that no fault here leads to.
    """

    sessions: dict[tuple[str, int], bytes] = field(default_factory=dict)
    sent: dict[Push, list[GradientName]] = field(default_factory=lambda: defaultdict(list))
    told: dict[GradientName, int] = field(default_factory=dict)
    seen: list[tuple[str, int, int]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Journals":
        journals = cls()
        for path in paths:
            for line in path.read_text().splitlines():
                journals._take(path.stem, line.split(" ", 1)[0], line.split(" ")[1:])
        return journals

    def _take(self, worker: str, kind: str, words: Sequence[str]) -> None:
        match kind:
            case "O":
                self.sessions[worker, int(words[0])] = bytes.fromhex(words[1])
            case "B":
                epoch, sequence, life, number = map(int, words)
                held = self.sent[worker, epoch, sequence]
                if GradientName(worker, life, number) not in held:
                    held.append(GradientName(worker, life, number))
            case "A":
                life, number, version, position, check = map(int, words)
                self.told[GradientName(worker, life, number)] = version
                self.seen.append((worker, position, check))
            case "R":
                self.failures[" ".join(words)] += 1
            case _:
                self.broken.append(f"{worker}: {' '.join(words)}")

    def held_by(self, scenario: Scenario, one: Contribution) -> GradientName | None:
        """Returns which gradient it is that an update has from a push; None where it is none that was sent."""
        names = self.sent.get((one.worker, one.epoch, one.sequence), [])
        if len(names) > 1:
            names = [name for name in names if abs(scenario.gradient_norm(name) / one.gradient_norm - 1) < 1e-9]
        return names[0] if names else None


@dataclass
class Verdict:
    """What became of a run.

    Attributes:
        acknowledged: Gradients that some worker was told of.
        applied: Gradients that are in an update.
        lost: Acknowledged gradients that are in no update.
        doubled: Gradients that are in more than one, by whatever pushes.
        bits: Bits in which the model differs from the replay.
        problems: All that is wrong, in words.
        figures: The largest value seen of each bound.
    """

    acknowledged: int = 0
    applied: int = 0
    lost: int = 0
    doubled: int = 0
    bits: int = 0
    problems: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def judge(
    scenario: Scenario,
    events: Sequence[ModelEvent],
    journals: Journals,
    state: ModelState,
    ask: Callable[[bytes, int], PushStatus],
) -> Verdict:
    """Compares everything with everything; `ask` is GetPush."""
    verdict = Verdict()
    made: dict[Push, list[int]] = defaultdict(list)
    for event in events:
        for one in event.contributions:
            made[one.worker, one.epoch, one.sequence].append(event.version)
    problems = verdict.problems
    problems += journals.broken
    problems += [f"{push} is in versions {versions}" for push, versions in made.items() if len(versions) > 1]
    held = _held(scenario, events, journals)
    problems += [f"{push} is in versions {made[push]} and was never sent" for push in made.keys() - held.keys()]
    if made.keys() <= held.keys():
        _count_gradients(verdict, journals.told, made, held)
        _check_bits(verdict, Oracle(scenario, held), events, journals, state)
    problems += _check_numbers(made)
    problems += _check_bounds(scenario, events, verdict.figures)
    problems += _check_statuses(journals, made, ask)
    return verdict


def _held(scenario: Scenario, events: Sequence[ModelEvent], journals: Journals) -> dict[Push, GradientName]:
    """Returns which gradient each push of an update held."""
    found = {
        (one.worker, one.epoch, one.sequence): journals.held_by(scenario, one)
        for event in events
        for one in event.contributions
    }
    return {push: name for push, name in found.items() if name}


def _count_gradients(
    verdict: Verdict,
    told: Mapping[GradientName, int],
    made: Mapping[Push, Sequence[int]],
    held: Mapping[Push, GradientName],
) -> None:
    """Counts what a user of workers sees: a gradient may be pushed again, also in another session."""
    versions: dict[GradientName, list[int]] = defaultdict(list)
    for push, its_versions in made.items():
        versions[held[push]] += its_versions
    verdict.acknowledged, verdict.applied = len(told), len(versions)
    for name in sorted(told.keys() - versions.keys()):
        verdict.lost += 1
        verdict.problems.append(f"{name} was acknowledged and is in no update")
    for name, those in versions.items():
        if told.get(name, 0) not in (0, *those):
            verdict.problems.append(f"{name} was acknowledged as part of version {told[name]}, and is in {those}")
        if len(those) > 1:
            verdict.doubled += 1
            verdict.problems.append(f"{name} is in versions {those}")


def _check_bits(
    verdict: Verdict, oracle: Oracle, events: Sequence[ModelEvent], journals: Journals, state: ModelState
) -> None:
    oracle.replay(events)
    problems = verdict.problems
    problems += oracle.problems
    verdict.bits = oracle.different_bits(state)
    if state.version != events[-1].version:
        problems.append(f"the state is of version {state.version}, the watcher's last is {events[-1].version}")
    if verdict.bits:
        problems.append(f"{verdict.bits} bits differ from the replay")
    if list(state.update_counts.values()) != oracle.update_counts:
        problems.append(f"update counts are {state.update_counts}, not {oracle.update_counts}")
    for worker, version, check in journals.seen:
        if oracle.checks.get(version) != check:
            problems.append(f"{worker} got weights that are not those of version {version}")


def _check_numbers(made: Mapping[Push, Sequence[int]]) -> Iterable[str]:
    """A session's pushes are applied in the order of their numbers, without a gap."""
    sessions: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for (worker, epoch, sequence), versions in made.items():
        sessions[worker, epoch].append((versions[0], sequence))
    for session, applied in sessions.items():
        numbers = [sequence for _, sequence in sorted(applied)]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"session {session} had its pushes applied in the order {numbers}"


def _check_bounds(scenario: Scenario, events: Sequence[ModelEvent], figures: dict[str, float]) -> Iterable[str]:
    policy = scenario.policy
    stale = max((one.staleness for event in events for one in event.contributions), default=0)
    figures["staleness"] = stale
    most = policy.max_staleness if isinstance(policy, Async) else None
    if isinstance(policy, Sync):
        yield from _check_rounds(events)
    if most is not None and stale > most:
        yield f"a push was {stale} versions old; {most} are allowed"
    if isinstance(policy, Bounded):
        apart = _farthest_apart(events)
        figures["steps apart"] = apart
        # Of two live sessions each is at most slack + 1 steps ahead of the other, with the push whose answer waits.
        if apart > 2 * (policy.slack + 1):
            yield f"two workers moved {apart} steps apart; slack {policy.slack} allows {2 * (policy.slack + 1)}"


def _check_rounds(events: Sequence[ModelEvent]) -> Iterable[str]:
    """Every push of a round is of the weights that the last update made; a version may lie between, of the same."""
    last = 0
    for event in events:
        for one in event.contributions:
            if event.version - 1 - one.staleness < last:
                yield f"version {event.version} has a push of a closed round: {one}"
        last = event.version if event.contributions else last


def _farthest_apart(events: Sequence[ModelEvent]) -> int:
    """Returns how far the distance of two sessions changed, at most, while both lived."""
    times: dict[tuple[str, int], list[int]] = defaultdict(list)
    for event in events:
        for one in event.contributions:
            times[one.worker, one.epoch].append(event.version)
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


def _check_statuses(
    journals: Journals, made: Mapping[Push, Sequence[int]], ask: Callable[[bytes, int], PushStatus]
) -> Iterable[str]:
    """What GetPush says agrees with what the watcher saw, for every push that was begun."""
    for push in sorted(journals.sent):
        worker, epoch, sequence = push
        status = ask(journals.sessions[worker, epoch], sequence)
        versions: Sequence[int] = made.get(push, ())
        if (status.state == "applied") != bool(versions):
            yield f"GetPush says of {push}: {status.state}; it is in versions {versions}"
        elif status.result and status.result.staleness is not None and status.result.version not in versions:
            yield f"GetPush says of {push}: version {status.result.version}; it is in versions {versions}"
        elif status.final != (status.state != "waiting"):
            yield f"GetPush says of {push}, whose session is over: {status.state}, final: {status.final}"
