"""Judges a run by the server's log, the workers' journals, what observers saw, and the server's final answers."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import history as lives
from bounds import check_bounds, check_numbers
from history import Claim, History, Update
from lost_pushes import Entry, check_losses
from oracle import Oracle, PushContent
from outcomes import Verdict
from scenarios import GradientName, Push, Scenario

from deltaserve import Contribution, ModelEvent, ModelState, PushStatus


@dataclass(frozen=True)
class Seen:
    """Weights that a worker received: their incarnation, version and CRC-32, and the durable version in that answer."""

    worker: str
    incarnation: str
    version: int
    durable: int | None
    check: int


@dataclass
class Journals:
    """The workers' journals.

    Attributes:
        sent: Each push that a worker began to send, with its possible gradients. After an error a worker may send
            another gradient under the same number.
        acknowledged: The version that a worker was told for each gradient; 0 if the server no longer knew it.
        known: What each worker learned about its pushes in each of its lives, in order.
        seen: Weights that workers received.
        failures: How often workers met each error.
        broken: Tracebacks of errors that no fault of the harness explains.
    """

    sent: dict[Push, list[GradientName]] = field(default_factory=lambda: defaultdict(list))
    acknowledged: dict[GradientName, int] = field(default_factory=dict)
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
                names = self.sent[Push(worker, session, int(sequence))]
                if GradientName(worker, int(life), int(number)) not in names:
                    names.append(GradientName(worker, int(life), int(number)))
            case "A", (life, session, sequence, number, version, incarnation, position, durable, check):
                self.acknowledged[GradientName(worker, int(life), int(number))] = int(version)
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
        """Returns the gradient that a push of an update contained, or None if its worker sent no such push."""
        names = self.sent.get(push, [])
        if len(names) > 1:
            names = [name for name in names if abs(scenario.gradient_norm(name) / one.gradient_norm - 1) < 1e-9]
        return names[0] if names else None


@dataclass(kw_only=True)
class Evidence:
    """Everything that the verdict is based on.

    Attributes:
        scenario: The run's scenario.
        history: The history from the server's log.
        journals: The workers' journals.
        events: The events that the watcher received.
        claims: Versions that the server promised to keep.
        state: The model's final state.
        ask: Calls GetPush for a session and a sequence number.
    """

    scenario: Scenario
    history: History
    journals: Journals
    events: Sequence[ModelEvent]
    claims: Sequence[Claim]
    state: ModelState
    ask: Callable[[str, int], PushStatus | None]


def judge(evidence: Evidence) -> Verdict:
    """Compares all evidence and returns the verdict."""
    verdict = Verdict()
    scenario, history, journals = evidence.scenario, evidence.history, evidence.journals
    problems = verdict.problems
    problems += journals.broken
    problems += lives.check(history, scenario, evidence.claims)
    surviving = list(history.surviving())
    applied: dict[Push, list[int]] = defaultdict(list)
    for update in surviving:
        for push in update.pushes:
            applied[push].append(update.version)
    problems += [f"{push} is in versions {versions}" for push, versions in applied.items() if len(versions) > 1]
    contents = _contents(evidence)
    unknown = sorted(push for (push, _), name in contents.items() if name is None)
    problems += [f"{push} is in an update, but no worker sent it" for push in unknown]
    if not unknown:
        names = {key: name for key, name in contents.items() if name}
        _count_gradients(verdict, evidence, surviving, names)
        _check_bits(verdict, Oracle(scenario, names), evidence)
    problems += check_numbers(applied)
    problems += check_bounds(scenario, surviving, verdict.figures)
    problems += check_losses(scenario, history, journals.known)
    problems += _check_events(history, evidence.events)
    problems += _check_statuses(evidence, applied)
    if scenario.mortal:
        verdict.figures["versions lost"] = history.most_lost()
    return verdict


def _contents(evidence: Evidence) -> dict[PushContent, GradientName | None]:
    """Returns the gradient of each push of an update."""
    return {
        (push, one.gradient_norm): evidence.journals.gradient_of(evidence.scenario, push, one)
        for life in evidence.history.lives
        for update in life.updates
        for push, one in update.parts
    }


def _count_gradients(
    verdict: Verdict, evidence: Evidence, surviving: Sequence[Update], contents: Mapping[PushContent, GradientName]
) -> None:
    """Counts gradients rather than pushes, as users see them: a worker may push one again, also in a new session."""
    acknowledged, lives = evidence.journals.acknowledged, evidence.history.lives
    versions = _versions(surviving, contents)
    ever = _versions((update for life in lives for update in life.updates), contents)
    verdict.acknowledged, verdict.applied = len(acknowledged), len(versions)
    for name in sorted(acknowledged.keys() - versions.keys()):
        if name in ever and not evidence.scenario.journals:
            verdict.rolled_back += 1
            continue
        verdict.lost += 1
        verdict.problems.append(f"{name} was acknowledged and is in no update")
    for name in acknowledged.keys() & ever.keys():
        if acknowledged[name] not in (0, *ever[name]):
            verdict.problems.append(f"{name} was acknowledged as part of {acknowledged[name]}, and was in {ever[name]}")
    for name, those in versions.items():
        if len(those) > 1:
            verdict.doubled += 1
            verdict.problems.append(f"{name} is in versions {those}")


def _versions(updates: Iterable[Update], contents: Mapping[PushContent, GradientName]) -> dict[GradientName, list[int]]:
    """Returns the versions that contain each gradient."""
    found: dict[GradientName, list[int]] = defaultdict(list)
    for update in updates:
        for push, one in update.parts:
            found[contents[push, one.gradient_norm]].append(update.version)
    return found


def _check_bits(verdict: Verdict, oracle: Oracle, evidence: Evidence) -> None:
    """Compares the final model, and the weights that workers received, with the replay."""
    history, state, problems = evidence.history, evidence.state, verdict.problems
    if any(before.top < life.start for before, life in zip(history.lives, history.lives[1:], strict=False)):
        return  # history.check has reported it
    oracle.replay(history)
    problems += oracle.problems
    verdict.bits = oracle.different_bits(state)
    if state.version != history.lives[-1].top:
        problems.append(f"the state is of version {state.version}, the last update made {history.lives[-1].top}")
    if verdict.bits:
        problems.append(f"{verdict.bits} bits differ from the replay")
    if list(state.update_counts.values()) != oracle.update_counts:
        problems.append(f"update counts are {state.update_counts}, not {oracle.update_counts}")
    for seen in evidence.journals.seen:
        if oracle.checks.get((history.index(seen.incarnation), seen.version)) != seen.check:
            problems.append(f"{seen.worker} got weights that are not those of version {seen.version}")


def _check_events(history: History, events: Sequence[ModelEvent]) -> Iterable[str]:
    """Checks that the watcher's events match updates of some life, and are complete if the server never died."""
    made = {(one.version, one.contributions, one.hyperparameters) for life in history.lives for one in life.updates}
    for event in events:
        if event.contributions and (event.version, event.contributions, event.hyperparameters) not in made:
            yield f"the watcher received a wrong event of version {event.version}: {event}"
    if len(history.lives) == 1 and [event.version for event in events] != list(range(len(made) + 1)):
        yield f"the watcher received events of versions {[event.version for event in events]}"


def _check_statuses(evidence: Evidence, applied: Mapping[Push, Sequence[int]]) -> Iterable[str]:
    """Checks that GetPush agrees with the surviving updates, for every push that a worker began to send."""
    for push in sorted(evidence.journals.sent):
        status = evidence.ask(push.session, push.sequence)
        versions: Sequence[int] = applied.get(push, ())
        if status is None:
            if versions or evidence.scenario.durability != "snapshot":
                yield f"GetPush does not know the session of {push}; it is in versions {versions}"
        elif (status.state == "applied") != bool(versions):
            yield f"GetPush says of {push}: {status.state}; it is in versions {versions}"
        elif status.result and status.result.staleness is not None and status.result.version not in versions:
            yield f"GetPush says of {push}: version {status.result.version}; it is in versions {versions}"
        elif status.final != (status.state != "waiting"):
            yield f"GetPush says of {push}, whose session is over: {status.state}, final: {status.final}"
