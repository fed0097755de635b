"""UpdateModel: immediate changes, and changes that wait until the open round has closed."""

import re
from collections.abc import Sequence

import grpc
import numpy as np
import pytest
from expected import Twin, gradient
from messages import adadelta, asynchronous, bounded, creation, floats, sync
from wire import Session, Watch, Wire, eventually, refusal, streamed, unchanged

from deltaserve._common.optimizers import Adadelta
from deltaserve.v1.common_pb2 import REDUCTION_MEAN, REDUCTION_MEDIAN, REDUCTION_TRIMMED_MEAN, Policy
from deltaserve.v1.model_service_pb2 import WatchModelResponse
from deltaserve.v1.worker_service_pb2 import StepRequest

SIZE = 5
MEDIAN = sync(3, reduction=REDUCTION_MEDIAN)


def _watch(wire: Wire) -> Watch:
    watch = wire.watch("m")
    assert not watch.next().HasField("update")
    return watch


def _begin(wire: Wire, sessions: Sequence[Session], number: int) -> list[object]:
    return [wire.begin(session.header(number), gradient(k, SIZE)) for k, session in enumerate(sessions)]


def _rates(events: Sequence[WatchModelResponse]) -> list[tuple[int, float]]:
    return [(event.position.version, event.update.hyperparameters[0].adadelta.lr) for event in events]


def _put(wire: Wire) -> None:
    """Replaces the state by zeros."""
    wire.put("m", [np.zeros(SIZE)] * 3)


# --- hyperparameters


def test_hyperparameters_apply_from_the_answered_version_on(wire: Wire) -> None:
    wire.create("m", groups=[adadelta(lr=1.0, rho=0.8)])
    session, watch = wire.open("m", "a"), _watch(wire)
    twin = Twin(np.zeros(SIZE, np.float32))
    for number, lr in enumerate((1.0, 1.0, 0.5, 0.5, 0.125), start=1):
        if lr != wire.model("m").config.groups[0].adadelta.lr:
            answer = wire.update("m", [adadelta(lr=lr)])
            assert (answer.first_version, answer.position.version) == (number, number - 1)
            assert (answer.config.groups[0].adadelta.lr, answer.config.groups[0].adadelta.rho) == (lr, 0.8)
            assert answer.config == wire.model("m").config
        wire.step(session.header(number), gradient(number, SIZE))
        twin.update(gradient(number, SIZE), own=Adadelta(lr=lr, rho=0.8))
    assert _rates(watch.until(5)) == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.125)]
    watch.cancel()
    twin.check(wire.snapshot("m"))


def test_fields_and_groups_that_are_not_set_stay(wire: Wire) -> None:
    groups = [adadelta(lr=0.5, eps=1e-3), adadelta(rho=0.8, maximize=True)]
    wire.create("m", groups=groups, group_of=[0, 1], policy=sync(2))
    before = wire.model("m").config
    assert wire.update("m").config == before
    assert wire.update("m", [adadelta(), adadelta()]).config == before
    answer = wire.update("m", [adadelta(), adadelta(maximize=False, weight_decay=0.1)])
    changed = [group.adadelta for group in answer.config.groups]
    assert [(g.lr, g.rho, g.eps, g.weight_decay, g.maximize) for g in changed] == [
        (0.5, 0.9, 1e-3, 0.0, False),
        (1.0, 0.8, 1e-6, 0.1, False),
    ]
    assert answer.config.policy == before.policy
    answer = wire.update("m", policy=bounded(2))
    assert (answer.config.policy.bounded.slack, answer.config.groups[0].adadelta.lr) == (2, 0.5)


def test_a_push_that_carries_its_own_goes_on_using_them(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    wire.update("m", [adadelta(lr=0.25)])
    own = wire.step(session.header(1, hyperparameters=[adadelta(lr=2.0)]), gradient(1, SIZE))
    assert own.result.hyperparameters[0].adadelta.lr == 2.0
    assert wire.step(session.header(2), gradient(2, SIZE)).result.hyperparameters[0].adadelta.lr == 0.25


def test_hyperparameters_change_for_the_open_round_too(wire: Wire) -> None:
    """Also for a partly reduced round, because reduction does not depend on hyperparameters."""
    wire.create("m", policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    watch = _watch(wire)
    (call,) = _begin(wire, [a], 1)
    assert wire.update("m", [adadelta(lr=0.25)]).first_version == 1
    wire.step(b.header(1), gradient(1, SIZE))
    streamed(call)  # type: ignore[arg-type]
    assert _rates(watch.until(1)) == [(1, 0.25)]
    watch.cancel()
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(gradient(0, SIZE) + gradient(1, SIZE), 2.0, Adadelta(lr=0.25))
    twin.check(wire.snapshot("m"))


# --- policies, while pushes wait


@pytest.mark.parametrize("policy", [asynchronous(), bounded(1)], ids=["async", "bounded"])
def test_waiting_pushes_are_answered_under_a_policy_that_does_not_wait(wire: Wire, policy: Policy) -> None:
    wire.create("m", policy=sync(3))
    sessions, watch = [wire.open("m", name) for name in "ab"], _watch(wire)
    calls = _begin(wire, sessions, 1)
    answer = wire.update("m", policy=policy)
    assert (answer.first_version, answer.position.version) == (1, 2)
    answers = [streamed(call) for call in calls]  # type: ignore[arg-type]
    assert [(a.result.version, a.result.contributors, a.result.staleness) for a in answers] == [(1, 1, 0), (2, 1, 1)]
    assert [[c.worker for c in event.update.contributions] for event in watch.until(2)] == [["a"], ["b"]]
    watch.cancel()
    twin = Twin(np.zeros(SIZE, np.float32))
    for k in range(2):
        twin.update(gradient(k, SIZE))
    twin.check(wire.snapshot("m"))


def test_max_staleness_and_damping_apply_to_waiting_pushes(wire: Wire) -> None:
    wire.create("m", policy=sync(4))
    sessions = [wire.open("m", name) for name in "abc"]
    calls = _begin(wire, sessions, 1)
    answer = wire.update("m", policy=asynchronous(max_staleness=1, damping=True))
    assert (answer.first_version, answer.position.version) == (1, 2)
    first, second = (streamed(call).result for call in calls[:2])  # type: ignore[arg-type]
    assert [(r.staleness, r.hyperparameters[0].adadelta.lr) for r in (first, second)] == [(0, 1.0), (1, 0.5)]
    with pytest.raises(grpc.RpcError) as caught:
        streamed(calls[2])  # type: ignore[arg-type]
    refused = refusal(caught.value)
    assert (refused.reason, refused.metadata) == ("STALE_BASE", {"base": "0", "current": "2", "bound": "1"})
    assert wire.keep(sessions[2]).last_accepted_sequence == 0
    assert wire.step(sessions[2].header(1, base_version=2), gradient(9, SIZE)).result.version == 3


def test_a_late_joiner_gets_its_version_though_all_waiting_pushes_are_too_stale(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    a, _b = wire.open("m", "a"), wire.open("m", "b")
    (call,) = _begin(wire, [a], 1)
    _put(wire)
    late = wire.open("m", "c")
    assert late.opened.first_version == 2
    assert wire.update("m", policy=asynchronous(max_staleness=0)).position.version == 2
    with pytest.raises(grpc.RpcError) as caught:
        streamed(call)  # type: ignore[arg-type]
    assert refusal(caught.value).reason == "STALE_BASE"
    assert wire.pull("m", wait_for_version=2)[0].position.version == 2
    assert wire.step(late.header(1, base_version=2), gradient(1, SIZE)).result.version == 3


def test_under_bounded_a_waiting_push_may_have_its_answer_withheld(wire: Wire) -> None:
    wire.create("m", policy=sync(3))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    (call,) = _begin(wire, [a], 1)
    assert wire.update("m", policy=bounded()).position.version == 1
    assert wire.keep(a).last_applied_sequence == 1
    refused = wire.refused("Step", StepRequest(header=a.header(2), gradient=floats(gradient(9, SIZE))))
    assert refused.reason == "SLACK_EXCEEDED"
    wire.step(b.header(1), gradient(1, SIZE))
    assert streamed(call).result.version == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [asynchronous(), bounded(1), sync(), sync(2)], ids=["async", "slack", "1", "2"])
def test_withheld_answers_are_given_under_another_policy(wire: Wire, policy: Policy) -> None:
    wire.create("m", policy=bounded())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    call = wire.begin(a.header(1), gradient(0, SIZE))
    assert wire.update("m", policy=policy).first_version == 2
    assert streamed(call).result.version == 1
    other = wire.begin(b.header(1, base_version=1), gradient(1, SIZE))
    wire.step(a.header(2, base_version=1), gradient(2, SIZE))
    streamed(other)


def test_fewer_min_workers_let_a_round_go(wire: Wire) -> None:
    wire.create("m", policy=sync(5))
    calls = _begin(wire, [wire.open("m", name) for name in "abc"], 1)
    assert wire.update("m", policy=sync(4)).position.version == 0
    assert wire.waiting("m") == {"a", "b", "c"}
    assert wire.update("m", policy=sync(3)).position.version == 1
    assert {streamed(call).result.contributors for call in calls} == {3}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy",
    [sync(quorum=2), sync(2, quorum=2, grace_seconds=0.05), sync(round_timeout_seconds=0.05)],
    ids=["quorum", "grace", "timeout"],
)
def test_a_quorum_or_a_time_lets_the_open_round_go(wire: Wire, policy: Policy) -> None:
    wire.create("m", policy=sync())
    sessions = [wire.open("m", name) for name in "abc"]
    calls = _begin(wire, sessions[1:], 1)
    assert wire.update("m", policy=policy).first_version == 1
    assert {streamed(call).result.contributors for call in calls} == {2}  # type: ignore[arg-type]


def test_a_time_that_is_up_fails_the_open_round(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    (call,) = _begin(wire, [wire.open("m", "a")], 1)
    wire.update("m", policy=sync(2, round_timeout_seconds=0.05))
    with pytest.raises(grpc.RpcError) as caught:
        streamed(call)  # type: ignore[arg-type]
    assert refusal(caught.value).reason == "ROUND_FAILED"


# --- policies that wait for the open round


@pytest.mark.parametrize(
    "policy",
    [asynchronous(), bounded(1), sync(3), sync(reduction=REDUCTION_MEDIAN), sync(clip_norm=0.5)],
    ids=["async", "bounded", "min_workers", "median", "clip"],
)
def test_a_change_waits_for_a_round_that_is_reduced_in_part(wire: Wire, policy: Policy) -> None:
    wire.create("m", policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    watch = _watch(wire)
    (call,) = _begin(wire, [a], 1)
    answer = wire.update("m", [adadelta(lr=0.25)], policy)
    assert (answer.first_version, answer.position.version) == (2, 0)
    assert answer.config.groups[0].adadelta.lr == 0.25
    assert answer.config.policy.WhichOneof("policy") == policy.WhichOneof("policy")
    now = wire.model("m").config
    assert (now.policy.sync.min_workers, now.policy.sync.reduction) == (1, REDUCTION_MEAN), "as it still is"
    assert now.groups[0].adadelta.lr == 1.0
    other = wire.begin(b.header(1), gradient(1, SIZE))
    assert [streamed(c).result.contributors for c in (call, other)] == [2, 2]  # type: ignore[arg-type]
    assert wire.model("m").config == answer.config
    twin = Twin(np.zeros(SIZE, np.float32))
    twin.update(gradient(0, SIZE) + gradient(1, SIZE), 2.0)
    twin.check(wire.snapshot("m"))
    if policy.sync.min_workers:  # more than there are
        wire.update("m", policy=sync())
    calls = [wire.begin(s.header(2, base_version=1), gradient(5 + k, SIZE)) for k, s in enumerate((a, b))]
    for each in calls:
        streamed(each)
    events = watch.until(2)
    assert _rates(events) == [(1, 1.0), (2, 0.25)]
    watch.cancel()


def test_the_last_of_several_deferred_changes_counts(wire: Wire) -> None:
    wire.create("m", policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    _begin(wire, [a], 1)
    assert wire.update("m", policy=MEDIAN).first_version == 2
    assert wire.update("m", [adadelta(lr=0.5)]).first_version == 2, "on top of the one that waits"
    answer = wire.update("m", policy=sync(2, reduction=REDUCTION_MEAN))
    assert answer.config.groups[0].adadelta.lr == 0.5
    wire.step(b.header(1), gradient(1, SIZE))
    assert wire.model("m").config == answer.config


def test_an_immediate_change_replaces_a_deferred_one(wire: Wire) -> None:
    wire.create("m", policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    (call,) = _begin(wire, [a], 1)
    wire.update("m", policy=asynchronous())
    assert wire.update("m", policy=sync(quorum=2)).first_version == 1
    wire.step(b.header(1), gradient(1, SIZE))
    streamed(call)  # type: ignore[arg-type]
    assert wire.model("m").config.policy.sync.quorum == 2


def test_a_state_that_is_put_while_a_change_waits_makes_a_version_of_its_own(wire: Wire) -> None:
    """The change takes effect with the round, one version later than the answer said."""
    wire.create("m", {"w": (SIZE,)}, policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    watch = _watch(wire)
    _begin(wire, [a], 1)
    assert wire.update("m", [adadelta(lr=0.25)], asynchronous()).first_version == 2
    _put(wire)
    wire.step(b.header(1), gradient(1, SIZE))
    wire.step(b.header(2), gradient(2, SIZE))
    put, *events = watch.until(3)
    watch.cancel()
    assert (put.position.version, put.HasField("update")) == (1, False)
    assert _rates(events) == [(2, 1.0), (3, 0.25)]


# --- a model that is asked for again


def test_create_model_accepts_the_initial_and_the_current_settings(wire: Wire) -> None:
    wire.create("m", groups=[adadelta(lr=0.5)], policy=sync(2))
    wire.update("m", [adadelta(lr=0.25)], bounded(3))
    with unchanged(wire, "m"):
        for lr in (0.5, 0.25):
            for policy in (sync(2), bounded(3)):
                assert not wire.create("m", groups=[adadelta(lr=lr)], policy=policy).created
        for lr, policy in ((0.75, sync(2)), (0.5, bounded(4)), (0.25, asynchronous())):
            refused = wire.refused("CreateModel", *creation("m", groups=[adadelta(lr=lr)], policy=policy))
            assert refused.reason == "MODEL_MISMATCH"
    wire.update("m", [adadelta(lr=0.125)], asynchronous())
    assert not wire.create("m", groups=[adadelta(lr=0.5)], policy=sync(2)).created
    assert not wire.create("m", groups=[adadelta(lr=0.125)]).created
    refused = wire.refused("CreateModel", *creation("m", groups=[adadelta(lr=0.25)], policy=sync(2)))
    assert refused.metadata["difference"] == "lr of group 0 is 0.125, not 0.25", "what it was in between is past"


@pytest.mark.parametrize(
    ("setting", "held", "asked"),
    [
        ("clip_norm", sync(2, clip_norm=1.5), sync(2, clip_norm=2.5)),
        ("round_timeout_seconds", sync(2, round_timeout_seconds=10.0), sync(2, round_timeout_seconds=20.0)),
        ("trim", *(sync(5, reduction=REDUCTION_TRIMMED_MEAN, trim=trim) for trim in (1, 2))),
    ],
)
def test_a_mismatch_of_policies_shows_the_setting_that_differs(
    wire: Wire, setting: str, held: Policy, asked: Policy
) -> None:
    wire.create("m", policy=held)
    difference = wire.refused("CreateModel", *creation("m", policy=asked)).metadata["difference"]
    ours, theirs = (getattr(policy.sync, setting) for policy in (held, asked))
    assert re.search(rf"{setting}.{{1,20}}{ours}\b.*\b{theirs}\b", difference), difference


def test_a_push_during_a_change_is_applied_under_either_policy(wire: Wire) -> None:
    """Changes policies back and forth while workers step. Every push is applied once."""
    wire.create("m", policy=sync())
    a, b = wire.open("m", "a"), wire.open("m", "b")
    policies = [asynchronous(), sync(), bounded(1), MEDIAN, sync(2, quorum=2), asynchronous(damping=True)]
    for number, policy in enumerate(policies, start=1):
        calls = [wire.begin(session.header(number), gradient(number, SIZE)) for session in (a, b)]
        wire.update("m", policy=policy)
        if policy is MEDIAN or policy.sync.min_workers > 2:
            wire.update("m", policy=sync(reduction=REDUCTION_MEDIAN))
        for call in calls:
            assert not streamed(call).result.duplicate
    eventually(lambda: not wire.waiting("m"), "a push still waits")
    assert [wire.keep(session).last_applied_sequence for session in (a, b)] == [len(policies)] * 2
