"""The harness itself: a correct run has no problems, and each kind of wrong evidence is reported."""

import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from deck import Deck
from faults import Deaths, all_deaths, all_faults, death_points, server_environment, worker_deck, worker_environment
from history import History, Life, Update
from lost_pushes import Entry
from oracle import Oracle
from outcomes import Outcome, tables
from scenarios import GradientName, Push, Scenario
from schedule import Schedule, missing
from verdict import Evidence, Journals, judge

from deltaserve import Contribution, ModelEvent, ModelState, PushStatus, StepResult
from deltaserve._common import failpoints

SCENARIO = Scenario("async", "unary", "journal", "adam")


def contribution(sequence: int, name: GradientName) -> Contribution:
    weight = SCENARIO.gradient(name).weight
    norm = SCENARIO.gradient_norm(name)
    return Contribution(worker="ada", epoch=1, sequence=sequence, staleness=0, weight=weight, gradient_norm=norm)


def update(version: int, sequence: int) -> Update:
    """Version `version` with push `sequence` of the only worker, which holds the gradient of that number."""
    name = GradientName("ada", 1, sequence)
    return Update(
        version=version,
        contributions=(contribution(sequence, name),),
        pushes=(Push("ada", "aa", sequence),),
        hyperparameters=SCENARIO.gradient(name).hyperparameters or SCENARIO.groups,
    )


def state_after(history: History, sequences: int) -> tuple[ModelState, Oracle]:
    """The state that the updates of a history lead to, and the oracle that computed it."""
    names = [GradientName("ada", 1, number) for number in range(1, sequences + 1)]
    sent = {(Push("ada", "aa", name.number), SCENARIO.gradient_norm(name)): name for name in names}
    oracle = Oracle(SCENARIO, sent)
    oracle.replay(history)
    now = oracle._now.copy()
    weights, slots = SCENARIO.cut(now.weights), {name: SCENARIO.cut(vector) for name, vector in now.slots.items()}
    counts = dict(zip(weights, oracle.update_counts, strict=True))
    state = ModelState(
        version=history.lives[-1].top,
        weights=weights,
        slots=slots,
        update_counts=counts,
    )
    return state, oracle


def a_correct_run() -> Evidence:
    """Four updates of one worker, with a restart that lost nothing after the second."""
    first = Life(incarnation="one", updates=[update(1, 1), update(2, 2)], announced=2, serving=1.0)
    second = Life(incarnation="two", restored=2, updates=[update(3, 3), update(4, 4)], announced=4, serving=2.0)
    history = History([first, second])
    state, oracle = state_after(history, 4)
    journals = Journals()
    for number in range(1, 5):
        incarnation, version = ("one", number) if number < 3 else ("two", number)
        journals._take("ada", "B", "1", "aa", str(number), str(number))
        check = oracle.checks[history.index(incarnation), version]
        words = ("1", "aa", str(number), str(number), str(version), incarnation, str(version), str(version), str(check))
        journals._take("ada", "A", *words)
    return Evidence(
        scenario=SCENARIO,
        history=history,
        journals=journals,
        events=[],
        claims=[("one", 2, "ada was told of")],
        state=state,
        ask=lambda _, sequence: status(history, sequence),
    )


def status(history: History, sequence: int) -> PushStatus:
    for found in history.surviving():
        if found.pushes and found.pushes[0].sequence == sequence:
            result = StepResult(
                version=found.version,
                duplicate=False,
                staleness=0,
                contributors=1,
                gradient_norm=found.contributions[0].gradient_norm,
                update_norm=None,
                hyperparameters=found.hyperparameters,
            )
            return PushStatus(state="applied", result=result, final=True)
    return PushStatus(state="not accepted", result=None, final=True)


def test_a_correct_run_has_no_problems() -> None:
    verdict = judge(a_correct_run())
    assert verdict.problems == []
    assert (verdict.acknowledged, verdict.applied, verdict.lost, verdict.doubled, verdict.bits) == (4, 4, 0, 0, 0)


def lose(evidence: Evidence) -> None:
    evidence.history.lives[1].updates.pop()


def repeat(evidence: Evidence) -> None:
    evidence.history.lives[1].updates.append(update(5, 4))


def go_back(evidence: Evidence) -> None:
    evidence.history = History([evidence.history.lives[0], replace(evidence.history.lives[1], restored=1)])


def flip(evidence: Evidence) -> None:
    evidence.state.weights["a"][0, 0] += 1


def skip_number(evidence: Evidence) -> None:
    evidence.history.lives[1].updates[1] = update(5, 4)


def get_wrong_weights(evidence: Evidence) -> None:
    evidence.journals.seen[0] = replace(evidence.journals.seen[0], check=0)


def report_a_loss(evidence: Evidence) -> None:
    entry = Entry(Push("ada", "aa", 0), incarnation="two", lost=range(2, 3), before="one", restored=2)
    evidence.journals.known["ada", 1].insert(2, entry)


def watch_wrongly(evidence: Evidence) -> None:
    wrong = (contribution(2, GradientName("ada", 1, 2)),)
    event = ModelEvent(version=1, contributions=wrong, hyperparameters=SCENARIO.groups, update_norm=None, missed=0)
    evidence.events = [event]


def forget_a_push(evidence: Evidence) -> None:
    evidence.ask = lambda _session, _sequence: None


def apply_an_unknown_push(evidence: Evidence) -> None:
    evidence.journals.sent.clear()


def break_the_worker(evidence: Evidence) -> None:
    evidence.journals._take("ada", "!", "Traceback")


def break_a_promise(evidence: Evidence) -> None:
    evidence.claims = [("one", 3, "ada was told of")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lose, "was acknowledged and is in no update"),
        (repeat, "is in versions [4, 5]"),
        (go_back, "came back at 1"),
        (flip, "bits differ from the replay"),
        (skip_number, "life 1 made the versions [2, 3, 5]"),
        (get_wrong_weights, "ada got weights that are not those of version 1"),
        (report_a_loss, "it was told that pushes [2] of session aa are lost; [] are, in life 1"),
        (watch_wrongly, "the watcher received a wrong event of version 1"),
        (forget_a_push, "GetPush does not know the session"),
        (apply_an_unknown_push, "is in an update, but no worker sent it"),
        (break_the_worker, "ada: Traceback"),
        (break_a_promise, "ada was told of version 3; life 1 came back at 2"),
    ],
)
def test_wrong_evidence_is_a_problem(change: Callable[[Evidence], None], problem: str) -> None:
    evidence = a_correct_run()
    change(evidence)
    problems = judge(evidence).problems
    assert any(problem in found for found in problems), problems


def test_a_deck_deals_all_cards_before_any_a_second_time() -> None:
    deck = Deck(random.Random(1), "abcd")
    for _ in range(5):
        assert sorted(deck.draw() for _ in range(4)) == list("abcd")


def test_all_environments_are_valid_and_reach_every_failpoint(tmp_path: Path) -> None:
    chance, named = random.Random(1), set()
    deaths = Deaths(chance, "journal", ["push.updated@3"])
    workers = worker_deck(chance, "stream")
    for _ in range(200):
        for given in (
            server_environment(chance, deaths.draw(), 1.5, tmp_path / "log"),
            worker_environment(chance, workers, 1.5, tmp_path / "log"),
        ):
            named |= {entry.name for entry in failpoints.parse(given["DELTASERVE_FAILPOINTS"])}
    assert named == set(failpoints.NAMES)
    deadly = {f"{name} kill" for name in death_points("journal")}
    assert deadly < all_deaths("journal") < all_faults("stream", "journal")


def test_the_schedule_goes_on_until_every_fault_has_fired() -> None:
    options = Namespace(
        seed=1, trials=1, every_fault=True, alternate=True, first=[], policies=["sync", "async"], doors=["unary"],
        durabilities=["snapshot"], optimizers=["adadelta", "adam"],
    )  # fmt: skip
    schedule, outcomes = Schedule(options), []
    fired = Counter(all_faults("unary", "snapshot"))
    for turn in range(2):
        assert schedule.goes_on()
        scenario, seed, _ = schedule.next()
        outcome = Outcome(
            policy=scenario.policy_name,
            door="unary",
            durability="snapshot",
            optimizer=scenario.optimizer_name,
            seed=seed,
            folder=Path(),
            again="",
        )
        outcome.fired = Counter() if turn == 0 else fired
        schedule.ended(outcome)
        outcomes.append(outcome)
    assert not missing(outcomes, options)
    assert not schedule.goes_on()
    assert missing(outcomes[:1], options)
    assert "fired, all" in tables(outcomes)
