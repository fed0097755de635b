"""Invalid policies, pushes that a policy refuses, and refusals of UpdateModel, GetPush and WatchModel."""

from collections.abc import Callable, Iterator
from typing import Any

from error_scene import CASES, Case, Request, Scene, case, step, stream
from messages import adadelta, asynchronous, bounded, creation, sync
from wire import Watch, eventually

from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2 as models
from deltaserve.v1 import worker_service_pb2 as workers

NAN, INFINITY = float("nan"), float("inf")
TRIMMED, MEDIAN = pb.REDUCTION_TRIMMED_MEAN, pb.REDUCTION_MEDIAN

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "min_workers": ({"min_workers": 0}, {"min_workers": 65_537}),
    "quorum": (
        {"quorum": 0},
        {"min_workers": 3, "quorum": 2},
        {"quorum": 65_537},
        {"quorum": (1 << 32) - 1},
    ),
    "grace_seconds": (
        *({"quorum": 1, "grace_seconds": seconds} for seconds in (-0.1, -1e-300, NAN, INFINITY, -INFINITY, 86_400.5)),
        {"grace_seconds": 1.0},
        {"round_timeout_seconds": 5.0, "grace_seconds": 5e-324},
    ),
    "round_timeout_seconds": tuple(
        {"round_timeout_seconds": seconds} for seconds in (0.0, -0.0, -1.0, NAN, INFINITY, -INFINITY, 86_400.5, 1e300)
    ),
    "reduction": ({"reduction": 4}, {"reduction": -1}, {"reduction": (1 << 31) - 1, "trim": 1}),
    "trim": (
        {"min_workers": 3, "trim": 1},
        {"min_workers": 3, "trim": 1, "reduction": MEDIAN},
        {"min_workers": 3, "reduction": TRIMMED},
        {"min_workers": 3, "reduction": TRIMMED, "trim": 0},
        {"min_workers": 2, "reduction": TRIMMED, "trim": 1},
        {"reduction": TRIMMED, "trim": 1},
        {"min_workers": 4, "reduction": TRIMMED, "trim": 2},
        {"min_workers": 3, "reduction": TRIMMED, "trim": (1 << 32) - 1},
    ),
    "clip_norm": tuple({"clip_norm": norm} for norm in (0.0, -0.0, -1.0, NAN, INFINITY, -INFINITY)),
}
"""Invalid settings of a SyncPolicy, by the field that the refusal names."""


def _created(fields: dict[str, Any]) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        return "CreateModel", list(creation("new", policy=sync(**fields)))

    prepare.__name__ = f"created_{fields}"
    return prepare


def _updated(fields: dict[str, Any]) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        groups = [adadelta(lr=0.5)]  # good, and yet not to be taken
        return "UpdateModel", [models.UpdateModelRequest(model="m", groups=groups, policy=sync(**fields))]

    prepare.__name__ = f"updated_{fields}"
    return prepare


def _weighed(weight: float, streamed: bool) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        header = scene.a.header(3, weight=weight)
        return stream(header, (0, [1.0] * 5)) if streamed else step(header, *[1.0] * 5)

    prepare.__name__ = f"weight_{weight}_{'StreamStep' if streamed else 'Step'}"
    return prepare


def _regrouped(**fields: float) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        groups = [adadelta(**fields)]
        return "UpdateModel", [models.UpdateModelRequest(model="m", groups=groups, policy=sync(2))]

    prepare.__name__ = f"regrouped_{fields}"
    return prepare


def _many() -> Iterator[Case]:
    """Yields the cases that differ in one value."""
    for field, settings in SETTINGS.items():
        for fields in settings:
            for make in (_created, _updated):
                yield Case("POLICY_INVALID", make(fields), {"field": f"policy.sync.{field}"}, False)
    for weight in (0.0, -0.0, -1.0, 9e-10, 1.1e9, 1e10, 1e300, NAN, INFINITY, -INFINITY, 5e-324):
        for streamed in (False, True):
            yield Case(
                "PUSH_INVALID", _weighed(weight, streamed), {"field": "weight", "allowed": "1e-09 to 1e+09"}, False
            )
    for name, values in {
        "lr": (-1.0, NAN, 1e39),
        "rho": (1.5, -0.1),
        "eps": (0.0, 1e-60),
        "weight_decay": (INFINITY,),
    }.items():
        for value in values:
            yield Case("HYPERPARAMETER_INVALID", _regrouped(**{name: value}), {"field": name}, False)


CASES += _many()


# --- policies that no server takes, or not this one


@case("POLICY_INVALID", field="policy", allowed="one of sync, async, bounded")
def a_policy_without_a_policy(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", policy=pb.Policy()))


@case("POLICY_INVALID", field="policy", allowed="one of sync, async, bounded")
def a_change_to_no_policy(scene: Scene) -> Request:
    return "UpdateModel", [models.UpdateModelRequest(model="m", policy=pb.Policy())]


@case("POLICY_INVALID", field="policy", allowed="one of sync, async, bounded")
def a_policy_of_the_future(scene: Scene) -> Request:
    future = pb.Policy.FromString(b"\x7a\x02\x08\x01")  # field 15
    return "UpdateModel", [models.UpdateModelRequest(model="m", policy=future)]


@case("POLICY_INVALID", field="policy.sync.min_workers", allowed="1 to 6, the server's limit of sessions")
def more_workers_in_a_round_than_there_may_be_sessions(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", policy=sync(7)))


@case("POLICY_INVALID", field="policy.sync.min_workers", allowed="1 to 6, the server's limit of sessions")
def a_change_to_more_workers_than_there_may_be_sessions(scene: Scene) -> Request:
    return "UpdateModel", [models.UpdateModelRequest(model="m", policy=sync(7))]


# --- UpdateModel


@case("MODEL_NOT_FOUND", model="nothing")
def changing_what_is_not_there(scene: Scene) -> Request:
    return "UpdateModel", [models.UpdateModelRequest(model="nothing", policy=bounded(1))]


@case("HYPERPARAMETER_INVALID", field="groups", allowed="1 groups")
def a_change_of_more_groups_than_there_are(scene: Scene) -> Request:
    return "UpdateModel", [models.UpdateModelRequest(model="m", groups=[adadelta(lr=0.5)] * 2)]


@case("HYPERPARAMETER_INVALID", field="groups", allowed="2 groups")
def a_change_of_fewer_groups_than_there_are(scene: Scene) -> Request:
    scene.wire.create("two", {"w": (4,)}, groups=[adadelta()] * 2)
    scene.models.append("two")
    return "UpdateModel", [models.UpdateModelRequest(model="two", groups=[adadelta(lr=0.5)])]


@case("HYPERPARAMETER_INVALID", field="rho")
def a_change_whose_last_group_is_bad(scene: Scene) -> Request:
    scene.wire.create("two", {"w": (4,)}, groups=[adadelta()] * 2)
    scene.models.append("two")
    groups = [adadelta(lr=0.5), adadelta(rho=2.0)]
    return "UpdateModel", [models.UpdateModelRequest(model="two", groups=groups)]


@case("MODEL_MISMATCH", model="m", difference="lr of group 0 is 0.5, not 0.75")
def a_model_as_it_never_was(scene: Scene) -> Request:
    scene.wire.update("m", [adadelta(lr=0.5)])
    return "CreateModel", list(creation("m", groups=[adadelta(lr=0.75)]))


@case("MODEL_MISMATCH", model="m")
def a_policy_that_a_model_never_had(scene: Scene) -> Request:
    scene.wire.update("m", policy=bounded(3))
    return "CreateModel", list(creation("m", policy=bounded(4)))


# --- GetPush


def _asked(session_id: bytes, sequence: int = 1, model: str = "m") -> Request:
    return "GetPush", [workers.GetPushRequest(model=model, session_id=session_id, sequence=sequence)]


@case("SESSION_UNKNOWN")
def a_push_of_a_session_that_never_was(scene: Scene) -> Request:
    return _asked(b"0123456789abcdef")


@case("SESSION_UNKNOWN")
def a_push_of_no_session(scene: Scene) -> Request:
    return _asked(b"")


@case("SESSION_UNKNOWN")
def a_push_of_a_session_of_another_model(scene: Scene) -> Request:
    scene.other("n")
    return _asked(scene.a.opened.session_id, model="n")


@case("MODEL_NOT_FOUND", model="nothing")
def a_push_to_what_is_not_there(scene: Scene) -> Request:
    return _asked(scene.a.opened.session_id, model="nothing")


@case("PUSH_INVALID", field="sequence", allowed=">= 1")
def what_became_of_a_push_without_a_number(scene: Scene) -> Request:
    return _asked(scene.a.opened.session_id, 0)


# --- WatchModel


@case("MODEL_NOT_FOUND", model="nothing")
def watching_what_is_not_there(scene: Scene) -> Request:
    return "WatchModel", [models.WatchModelRequest(model="nothing")]


@case("MESSAGE_INVALID", message="WatchModelRequest")
def watching_a_name_that_is_no_utf8(scene: Scene) -> Request:
    return "WatchModel", [b"\x0a\x02\xff\xff"]


@case("WATCHER_LIMIT", limit="2")
def more_watchers_than_there_may_be(scene: Scene) -> Request:
    scene.other("n")
    for name in ("m", "n"):  # over all models
        watch: Watch = scene.wire.watch(name)
        watch.next()
        scene.calls.append(watch)
    return "WatchModel", [models.WatchModelRequest(model="m")]


# --- what policies refuse


@case("STALE_BASE", base="0", current="2", bound="1")
def a_base_older_than_max_staleness(scene: Scene) -> Request:
    scene.wire.update("m", policy=asynchronous(max_staleness=1))
    return step(scene.a.header(3, base_version=0), *[1.0] * 5)


@case("STALE_BASE", base="1", current="2", bound="0")
def a_base_that_is_not_the_current_version(scene: Scene) -> Request:
    scene.wire.update("m", policy=asynchronous(max_staleness=0, damping=True))
    return stream(scene.a.header(3, base_version=1), (0, [1.0] * 5))


@case("ROUND_FAILED", got="1", need="2")
def a_round_without_enough_workers(scene: Scene) -> Request:
    scene.other("s", policy=sync(2, round_timeout_seconds=0.1))
    return step(scene.wire.open("s", "a").header(1), *[1.0] * 4)


@case("SLACK_EXCEEDED", retry=True, ahead="3", slack="2")
def a_push_of_one_whose_answer_waits(scene: Scene) -> Request:
    scene.other("s", policy=bounded(2))
    quick, _slow = scene.wire.open("s", "a"), scene.wire.open("s", "b")
    for number in (1, 2):
        scene.wire.step(quick.header(number), [1.0] * 4)
    scene.calls.append(scene.wire.start(*step(quick.header(3), *[1.0] * 4)))
    eventually(lambda: scene.wire.keep(quick).last_applied_sequence == 3, "the push is not applied")
    return step(quick.header(4), *[1.0] * 4)
