"""The simulation can fail: each defect that is planted into the state machine is found, and soon."""

import inspect
import sys
import textwrap
from itertools import count
from typing import Any

import pytest
from histories import SCENARIOS, history
from ledger import Violation
from shrink import violation
from simulator import Simulation

from deltaserve_server.model import machine, sessions
from deltaserve_server.model.round import PendingPush, Round

EVENTS = 100_000
"""Within so many events each is found."""

_LENGTHS = (500, 1500)
_SOONER = {
    "the last 8 forget a push for one that is given up": "sync, round_timeout",
    "grace counts from the first push": "sync, quorum",
    "the later of two times counts": "sync, round_timeout",
    "a round that fails numbers nothing": "sync, round_timeout",
    "max_staleness is one too many": "async",
    "max_staleness is one too few": "async",
    "a later change does not replace one that waits": "sync, any",
    "new groups are lost to a change that waits": "sync, any",
    "the median leaves out one more": "sync, robust",
    "steps count on under another policy": "any",
    "answers stay held when nobody is too far ahead any more": "any",
}
"""Where to look for those that are seldom seen elsewhere; for the others, everywhere."""

_SCENARIOS = ("any", "sync, any", "sync, min_workers", "sync, quorum", "sync, round_timeout", "bounded", "async")

_machine, _round, _session, _sessions = machine.Machine, Round, sessions.Session, sessions.Sessions

_SHORT = """short = 0 < len(self._arrivals) == (policy.quorum or 0) - 1
    times = [self._arrivals[-1] + policy.grace_seconds] if short else []"""

DEFECTS: dict[str, tuple[object, str, str, str]] = {
    # exactly once
    "a duplicate is applied again": (_session, "known", "return True", "return push.sequence < self.last_accepted"),
    "a number may be left out": (_session, "known", "> self.last_accepted + 1", "> self.last_accepted + 2"),
    "other values under a used number are a duplicate": (_session, "known", "!= record.fingerprint", "is record"),
    "values are compared beyond the last 8": (_session, "_recent", "self.last_accepted - WINDOW", "0"),
    "results are kept of the last 7": (_session, "_recent", "> self", "> 1 + self"),
    "a push that was given up keeps its number": (_session, "give_up", "sequence - 1", "sequence"),
    "the last 8 forget a push for one that is given up": (
        _session,
        "accept",
        "Record(fingerprint)",
        "Record(fingerprint)\n    self.window.pop(sequence - 8, None)",
    ),
    "a fenced session goes on": (_sessions, "add", "self.remove(older)", "pass"),
    "an epoch is used twice": (
        _sessions,
        "new_epoch",
        "= self._epochs.pop(worker, 0)",
        "= min(1, self._epochs.pop(worker, 0))",
    ),
    "a rank is given twice": (_sessions, "free_rank", "taken = {", "taken = {0 for _ in ()} and {"),
    # time
    "a lease runs out late": (_session, "expired", ">=", ">"),
    "a call does not renew the lease": (
        _session,
        "renew",
        "max(self.expires, now + self.lease_seconds)",
        "self.expires",
    ),
    "the lease does not start anew when a round closes": (_session, "apply", "self.renew(now)", "pass"),
    # rounds
    "a quorum is one too few": (
        _round,
        "due",
        "times = []",
        _SHORT,
    ),
    "a quorum is one too many": (_round, "due", ">= policy.quorum", "> policy.quorum"),
    "grace counts from the first push": (_round, "due", "policy.quorum - 1]", "0]"),
    "a timeout counts from the last push": (_round, "due", "self._arrivals[0]", "self._arrivals[-1]"),
    "the later of two times counts": (_round, "due", "min(times", "max(times"),
    "a round closes a moment late": (_machine, "_advance", "now >= due", "now > due"),
    "min_workers is one too few": (_round, "enough", ">= policy.min_workers", ">= policy.min_workers - 1"),
    "a round is closed below min_workers when time is up": (
        _machine,
        "_advance",
        "return self._fail_round(self.policy, now)",
        "return self._close_round(now)",
    ),
    "a round that fails is kept": (_machine, "_fail_round", "self._open_round(self.round.opened)", "pass"),
    "a round that fails numbers nothing": (_machine, "_fail_round", "if late", "if False"),
    "a push of a closed round counts": (
        _round,
        "check",
        "base_version < self.opened",
        "base_version < self.opened - 1",
    ),
    "hyperparameters need not agree": (_round, "check", "if difference", "if False"),
    "the first group's hyperparameters alone count": (
        _round,
        "add",
        "len(carried) > len(self.hyperparameters or ())",
        "not self.hyperparameters",
    ),
    "who waits for the next round pushes for this one": (_machine, "_check_new", "not session.member or", ""),
    "a session pushes twice for a round": (_machine, "_check_new", "or session.waiting", ""),
    "who comes late joins the round": (_machine, "_joinable", "< least and worker", "< 99 and worker"),
    "nobody joins a round that lacks workers": (_machine, "_joinable", "< least and", "< 0 and"),
    "a successor does not take its predecessor's place": (_machine, "_joinable", "not held or", "not held or 0 and"),
    "nobody is taken into a round that lacks workers": (_machine, "_take_in", "if not late", "if True"),
    "a name is in a round twice": (_machine, "_take_in", "not in self.round.contributions", "is not None"),
    "who comes late is not asked for the next round": (_machine, "_open_round", "session.member = True", "pass"),
    "who has left is waited for": (
        _machine,
        "close_session",
        "return self._advance(now)",
        "return []",
    ),
    # reduction
    "folds are in the order of arrival": (_round, "foldable", "ready = sorted(", "ready = list("),
    "folds do not wait for names before them": (_round, "foldable", "name < first_awaited", "name > ''"),
    "a push is folded twice": (_machine, "_fold", "self.round.folded += len(ready)", "pass"),
    "a round is folded while others may still join": (
        _machine,
        "_advance",
        "return [] if awaited else self._take_in()",
        "return self._fold(self.policy, awaited) if awaited else self._take_in()",
    ),
    "weights do not count": (machine, "factor", "scale * push.weight", "scale"),
    "a push at the bound is clipped too": (machine, "factor", "push.norm > policy.clip_norm", "push.norm > 0"),
    "nothing is clipped": (machine, "factor", "push.norm > policy.clip_norm", "False"),
    "weights count in the median": (machine, "factor", 'if policy.reduction == "mean" else scale', ""),
    "the median leaves out one more": (machine, "trim", "(count - 1) // 2", "count // 2"),
    "shares are in the order of arrival": (_round, "in_order", "sorted(self.contributions)", "self.contributions"),
    "a tensor that some lack is left out": (_round, "absent", "intersection", "union"),
    # versions
    "a version is left out": (_machine, "_bump_version", "self.version += 1", "self.version += 2"),
    "staleness counts the update itself": (PendingPush, "contribution", "version - self", "1 + version - self"),
    # async
    "max_staleness is one too many": (_machine, "_check_new", "base > bound", "base > bound + 1"),
    "max_staleness is one too few": (_machine, "_check_new", "base > bound", "base >= bound"),
    "damping divides by the staleness alone": (
        _machine,
        "_update_alone",
        "1 + self.version - contribution.base_version",
        "max(1, self.version - contribution.base_version)",
    ),
    "damping is always on": (_machine, "_update_alone", "and self.policy.damping", ""),
    # bounded
    "slack is one too much": (_machine, "_too_far", "> policy.slack", "> policy.slack + 1"),
    "slack is one too little": (_machine, "_too_far", "> policy.slack", ">= policy.slack"),
    "a held answer is never given": (_machine, "_release", "for key in free", "for key in free[1:]"),
    "a held answer is given too early": (_machine, "_release", "session.clock <= most", "session.clock <= most + 1"),
    "who has ended is held for ever": (_machine, "_release", "or not self.sessions.find(session.id)", ""),
    "who is too far ahead may push": (_machine, "_check_new", "in self._held", "in ()"),
    "a duplicate is answered before its push": (_machine, "push", "None if push.key in self._held else", ""),
    "who comes counts from zero": (_machine, "open_session", "clock=self._slowest()", "clock=0"),
    # changes
    "a change does not wait for a round that is reduced in part": (
        _machine,
        "change",
        "not reduces_alike(",
        "not True and (",
    ),
    "every change waits": (_machine, "change", "self.round.folded and", "self.round.contributions and"),
    "a change that waits is forgotten": (_machine, "_close_round", "if self.next:", "if False:"),
    "a later change does not replace one that waits": (_machine, "change", "self.next = None", "pass"),
    "steps count on under another policy": (_machine, "_configure", "session.clock = 0", "pass"),
    "who waits is forgotten when rounds end": (
        _machine,
        "_reconfigure",
        "yield from self._disband(waiting, late, now)",
        "pass",
    ),
    "who waits is not judged by max_staleness": (_machine, "_disband", "bound is not None and stale > bound", "False"),
    "answers stay held when nobody is too far ahead any more": (_machine, "_reconfigure", "self._release()", "()"),
    "an old base is taken by the first round": (
        _machine,
        "_configure",
        "isinstance(before, Sync) != isinstance(policy, Sync)",
        "isinstance(before, Sync) and not isinstance(policy, Sync)",
    ),
    "new groups are lost to a change that waits": (_machine, "extend", "if self.next:", "if False:"),
    # what became of a push
    "one that waits has not come": (_session, "status", 'PushStatus("waiting"', 'PushStatus("not accepted"'),
    "one that never came may still come": (_session, "status", "final=not live", "final=False"),
    "a push of who has ended is forgotten": (
        _machine,
        "check",
        "self.sessions.ended_with(push) or self.keep_session",
        "self.keep_session",
    ),
    "who has ended is unknown": (_sessions, "find_any", "or self._ended.get(session_id)", ""),
    # refusals
    "a refused push has its number": (
        _machine,
        "check",
        "self._check_new(session, push)",
        "session.last_accepted += 1; self._check_new(session, push)",
    ),
    "a refused push has left its hyperparameters": (
        _round,
        "check",
        "difference = ",
        "self.hyperparameters = self.hyperparameters or push.hyperparameters\n    difference = ",
    ),
}


def _plant(patch: pytest.MonkeyPatch, owner: Any, name: str, before: str, after: str) -> None:
    """Replaces a piece of a function's source."""
    function = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(before) == 1, f"{name} has {before!r} {source.count(before)} times"
    namespace: dict[str, Any] = {}
    exec(source.replace(before, after), vars(sys.modules[function.__module__]), namespace)
    patch.setattr(owner, name, namespace[name])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, *DEFECTS[defect])
    seen = 0
    for seed in count():
        if seen > EVENTS:
            break
        scenario = SCENARIOS[_SOONER.get(defect, _SCENARIOS[seed % len(_SCENARIOS)])]
        simulation = Simulation(scenario)
        try:
            simulation.run(history(scenario, seed, _LENGTHS[seed % len(_LENGTHS)]), 10)
        except Violation as found:
            print(f"{defect}: {found} after {seen + simulation.totals.events:,} events")
            return
        seen += simulation.totals.events
    pytest.fail(f"{defect}: not found in {seen:,} events")


def test_without_a_defect_the_same_events_are_fine() -> None:
    assert violation(SCENARIOS["any"], history(SCENARIOS["any"], 0, 1000), 10) is None
