"""Judges a run by what the server and the workers wrote down, what others saw, and what the server says afterwards."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import history as lives
from bounds import check_bounds, check_numbers
from history import Claim, History, Update
from losses import Entry, check_losses
from oracle import Held, Oracle
from outcomes import Verdict
from scenarios import GradientName, Push, Scenario

from deltaserve import Contribution, ModelEvent, ModelState, PushStatus


@dataclass(frozen=True)
class Seen:
    """Weights that came to a worker: of which life and version, with which CRC-32; and what was said to be durable."""

    worker: str
    incarnation: str
    version: int
    durable: int | None
    check: int


@dataclass
class Journals:
    """What the workers wrote down.

    Attributes:
        sent: Pushes that a worker began to send, and what they may hold: after an error it may have taken another
            gradient, whose push then got this number.
        told: Which version a worker was told that a gradient is in, or 0 where that was no longer known.
        known: By worker and its life: what it came to know of its pushes, in order.
        seen: Weights that came.
        failures: How often which error came to the workers.
        broken: Tracebacks of errors that no fault here leads to.
    """

    sent: dict[Push, list[GradientName]] = field(default_factory=lambda: defaultdict(list))
    told: dict[GradientName, int] = field(default_factory=dict)
    known: dict[tuple[str, int], list[Entry]] = field(default_factory=lambda: defaultdict(list))
    seen: list[Seen] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Journals":
        journals = cls()
        for path in paths:
            for line in path.read_text().splitlines() if path.exists() else ():
                journals._take(path.stem, *line.split(" "))
        return journals

    def _take(self, worker: str, kind: str, *words: str) -> None:
        match kind, words:
            case "B", (life, session, sequence, number):
                held = self.sent[Push(worker, session, int(sequence))]
                if GradientName(worker, int(life), int(number)) not in held:
                    held.append(GradientName(worker, int(life), int(number)))
            case "A", (life, session, sequence, number, version, incarnation, position, durable, check):
                self.told[GradientName(worker, int(life), int(number))] = int(version)
                self.seen.append(Seen(worker, incarnation, int(position), int(durable), int(check)))
                push = Push(worker, session, int(sequence))
                self.known[worker, int(life)].append(Entry(push, incarnation=incarnation))
            case "K", (life, session, sequence):
                self.known[worker, int(life)].append(Entry(Push(worker, session, int(sequence))))
            case "L", (life, session, _, restored, start, stop, before, incarnation):
                push, lost = Push(worker, session, 0), range(int(start), int(stop))
                entry = Entry(push, incarnation=incarnation, lost=lost, before=before, restored=int(restored))
                self.known[worker, int(life)].append(entry)
            case "F", (life,):
                self.known[worker, int(life)].append(Entry(None))
            case "R", _:
                self.failures[" ".join(words)] += 1
            case _:
                self.broken.append(f"{worker}: {' '.join(words)}")

    def gradient_of(self, scenario: Scenario, push: Push, one: Contribution) -> GradientName | None:
        """Returns which gradient it is that an update has from a push; None where it is none that was sent."""
        names = self.sent.get(push, [])
        if len(names) > 1:
            names = [name for name in names if abs(scenario.gradient_norm(name) / one.gradient_norm - 1) < 1e-9]
        return names[0] if names else None


@dataclass(kw_only=True)
class Evidence:
    """All that a run has left.

    Attributes:
        scenario: What was tried.
        history: What the server wrote down.
        journals: What the workers did.
        events: What the watcher saw.
        claims: What was promised to anybody to survive.
        state: The model in the end.
        ask: GetPush, of a session and a number.
    """

    scenario: Scenario
    history: History
    journals: Journals
    events: Sequence[ModelEvent]
    claims: Sequence[Claim]
    state: ModelState
    ask: Callable[[str, int], PushStatus | None]


def judge(evidence: Evidence) -> Verdict:
    """Compares everything with everything."""
    verdict = Verdict()
    scenario, history, journals = evidence.scenario, evidence.history, evidence.journals
    problems = verdict.problems
    problems += journals.broken
    wrong = list(lives.check(history, scenario, evidence.claims))
    problems += wrong
    left = list(history.surviving())
    made: dict[Push, list[int]] = defaultdict(list)
    for update in left:
        for push in update.pushes:
            made[push].append(update.version)
    problems += [f"{push} is in versions {versions}" for push, versions in made.items() if len(versions) > 1]
    held = _held(evidence)
    unknown = sorted(push for (push, _), name in held.items() if name is None)
    problems += [f"{push} is in an update and was never sent" for push in unknown]
    if not unknown:
        names = {key: name for key, name in held.items() if name}
        _count_gradients(verdict, evidence, left, names)
        _check_bits(verdict, Oracle(scenario, names), evidence)
    problems += check_numbers(made)
    problems += check_bounds(scenario, left, verdict.figures)
    problems += check_losses(scenario, history, journals.known)
    problems += _check_events(history, evidence.events)
    problems += _check_statuses(evidence, made)
    if scenario.mortal:
        verdict.figures["versions lost"] = history.most_lost()
    return verdict


def _held(evidence: Evidence) -> dict[Held, GradientName | None]:
    """Returns which gradient each push of an update held."""
    return {
        (push, one.gradient_norm): evidence.journals.gradient_of(evidence.scenario, push, one)
        for life in evidence.history.lives
        for update in life.updates
        for push, one in update.parts
    }


def _count_gradients(
    verdict: Verdict, evidence: Evidence, left: Sequence[Update], held: Mapping[Held, GradientName]
) -> None:
    """Counts what a user of workers sees: a gradient may be pushed again, also in another session."""
    told, lives = evidence.journals.told, evidence.history.lives
    versions = _versions(left, held)
    ever = _versions((update for life in lives for update in life.updates), held)
    verdict.acknowledged, verdict.applied = len(told), len(versions)
    for name in sorted(told.keys() - versions.keys()):
        if name in ever and not evidence.scenario.journals:
            verdict.rolled_back += 1
            continue
        verdict.lost += 1
        verdict.problems.append(f"{name} was acknowledged and is in no update")
    for name in told.keys() & ever.keys():
        if told[name] not in (0, *ever[name]):
            verdict.problems.append(f"{name} was acknowledged as part of version {told[name]}, and was in {ever[name]}")
    for name, those in versions.items():
        if len(those) > 1:
            verdict.doubled += 1
            verdict.problems.append(f"{name} is in versions {those}")


def _versions(updates: Iterable[Update], held: Mapping[Held, GradientName]) -> dict[GradientName, list[int]]:
    """Returns in which versions each gradient is."""
    found: dict[GradientName, list[int]] = defaultdict(list)
    for update in updates:
        for push, one in update.parts:
            found[held[push, one.gradient_norm]].append(update.version)
    return found


def _check_bits(verdict: Verdict, oracle: Oracle, evidence: Evidence) -> None:
    """Compares the model with the replay, and what workers saw of it."""
    history, state, problems = evidence.history, evidence.state, verdict.problems
    if any(before.top < life.start for before, life in zip(history.lives, history.lives[1:], strict=False)):
        return  # which is said elsewhere
    oracle.replay(history)
    problems += oracle.problems
    verdict.bits = oracle.different_bits(state)
    if state.version != history.lives[-1].top:
        problems.append(f"the state is of version {state.version}, the last that was made is {history.lives[-1].top}")
    if verdict.bits:
        problems.append(f"{verdict.bits} bits differ from the replay")
    if list(state.update_counts.values()) != oracle.update_counts:
        problems.append(f"update counts are {state.update_counts}, not {oracle.update_counts}")
    for seen in evidence.journals.seen:
        if oracle.checks.get((history.index(seen.incarnation), seen.version)) != seen.check:
            problems.append(f"{seen.worker} got weights that are not those of version {seen.version}")


def _check_events(history: History, events: Sequence[ModelEvent]) -> Iterable[str]:
    """What the watcher was told is what the server has made, in some life; of one that does not die it is all."""
    made = {(one.version, one.contributions, one.hyperparameters) for life in history.lives for one in life.updates}
    for event in events:
        if event.contributions and (event.version, event.contributions, event.hyperparameters) not in made:
            yield f"the watcher was told of version {event.version} what is not so: {event}"
    if len(history.lives) == 1 and [event.version for event in events] != list(range(len(made) + 1)):
        yield f"the watcher was told of versions {[event.version for event in events]}"


def _check_statuses(evidence: Evidence, made: Mapping[Push, Sequence[int]]) -> Iterable[str]:
    """What GetPush says agrees with what is left, for every push that was begun."""
    for push in sorted(evidence.journals.sent):
        status = evidence.ask(push.session, push.sequence)
        versions: Sequence[int] = made.get(push, ())
        if status is None:
            if versions or evidence.scenario.durability != "snapshot":
                yield f"GetPush does not know the session of {push}; it is in versions {versions}"
        elif (status.state == "applied") != bool(versions):
            yield f"GetPush says of {push}: {status.state}; it is in versions {versions}"
        elif status.result and status.result.staleness is not None and status.result.version not in versions:
            yield f"GetPush says of {push}: version {status.result.version}; it is in versions {versions}"
        elif status.final != (status.state != "waiting"):
            yield f"GetPush says of {push}, whose session is over: {status.state}, final: {status.final}"
