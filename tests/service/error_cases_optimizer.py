"""Requests with an optimizer, or with optimizer state, that the server or the model does not have."""

from collections.abc import Callable, Iterator, Sequence

from error_scene import CASES, Case, Request, Scene, case, put, step, stream, whole
from messages import ADADELTA_SLOTS, adadelta, creation, optimizer, replacement, sync

from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2 as models
from deltaserve.v1.optimizers_pb2 import Optimizer

FUTURE = Optimizer.FromString(b"\x7a\x02\x09\x01")
"""An optimizer of a newer server: field 15."""

FIXED = {
    "adam": (optimizer("adam"), optimizer("adam", amsgrad=True), "adam", "adam with amsgrad"),
    "sgd": (optimizer("sgd", momentum=0.9), optimizer("sgd", momentum=0.0), "sgd with momentum", "sgd"),
    "nesterov": (
        optimizer("sgd", momentum=0.9),
        optimizer("sgd", momentum=0.9, nesterov=True),
        "sgd with momentum",
        "sgd with momentum, nesterov",
    ),
    "rmsprop": (
        optimizer("rmsprop", centered=True, momentum=0.5),
        optimizer("rmsprop", centered=False, momentum=0.5),
        "rmsprop with momentum, centered",
        "rmsprop with momentum",
    ),
}
"""The optimizer of a model, one that differs in what is fixed, and the description of both."""


def _requests(sent: Optimizer, model: str = "m") -> dict[str, Callable[[Scene], Request]]:
    """Returns for each RPC that takes an optimizer a request about a model; other tensors than w are absent."""
    extension = models.ExtendModelHeader(
        model=model,
        tensor_count=2,
        group_count=1,
        tensors=[pb.TensorSpec(name="new", shape=[3], group=1)],
        groups=[sent],
    )
    change = models.UpdateModelRequest(model=model, groups=[sent], policy=sync(2))

    def push(scene: Scene, streamed: bool) -> Request:
        session = scene.a if model == "m" else scene.wire.open(model, "a")
        header = session.header(3 if model == "m" else 1, hyperparameters=[sent])
        return stream(header, (0, [1.0] * 5)) if streamed else step(header, *[1.0] * 5)

    return {
        "CreateModel": lambda _: ("CreateModel", [*creation(model, groups=[sent])]),
        "ExtendModel": lambda _: ("ExtendModel", [models.ExtendModelRequest(header=extension)]),
        "UpdateModel": lambda _: ("UpdateModel", [change]),
        "Step": lambda scene: push(scene, False),
        "StreamStep": lambda scene: push(scene, True),
    }


def _named(prepare: Callable[[Scene], Request], name: str) -> Callable[[Scene], Request]:
    prepare.__name__ = name
    return prepare


def _unknown() -> Iterator[Case]:
    for name, sent in (("none", Optimizer()), ("future", FUTURE)):
        for rpc, prepare in _requests(sent).items():
            field = "hyperparameters[0]" if "Step" in rpc else "groups[0]"
            metadata = {"field": field, "allowed": ", ".join(OPTIMIZERS)}
            yield Case("OPTIMIZER_UNKNOWN", _named(prepare, f"{name}_{rpc}"), metadata, False)


def _unknown_hyperparameters() -> Iterator[Case]:
    sent = Optimizer.FromString(b"\x0a\x02\x78\x01")  # field 15 of Adadelta
    for rpc, prepare in _requests(sent).items():
        field = f"{'hyperparameters' if 'Step' in rpc else 'groups'}[0].adadelta"
        metadata = {
            "field": field,
            "allowed": "no fields but lr, rho, eps, weight_decay, maximize, which this server knows",
        }
        yield Case("HYPERPARAMETER_INVALID", _named(prepare, f"future_hyperparameter_{rpc}"), metadata, False)


def _another_kind() -> Iterator[Case]:
    for kind in list(OPTIMIZERS)[1:]:
        for rpc, prepare in _requests(optimizer(kind)).items():
            metadata = {"model": "m", "expected": "adadelta", "got": kind}
            yield Case("OPTIMIZER_MISMATCH", _named(prepare, f"{kind}_{rpc}"), metadata, False)


def _another_structure() -> Iterator[Case]:
    for name, (held, sent, expected, got) in FIXED.items():
        for rpc, prepare in _requests(sent, "other").items():

            def prepared(
                scene: Scene, prepare: Callable[[Scene], Request] = prepare, held: Optimizer = held
            ) -> Request:
                scene.wire.create("other", groups=[held])
                scene.models.append("other")
                return prepare(scene)

            metadata = {"model": "other", "expected": expected, "got": got}
            yield Case("OPTIMIZER_MISMATCH", _named(prepared, f"{name}_fixed_{rpc}"), metadata, False)


def _another_state() -> Iterator[Case]:
    shown = ", ".join(ADADELTA_SLOTS)
    huge = "x" * 50_000
    lists: dict[str, tuple[Sequence[str], str]] = {
        "none": ((), "none"),
        "one": (("square_avg",), "square_avg"),
        "swapped": (("acc_delta", "square_avg"), "acc_delta, square_avg"),
        "twice": (("square_avg", "square_avg"), "square_avg, square_avg"),
        "adam": (("exp_avg", "exp_avg_sq"), "exp_avg, exp_avg_sq"),
        "further": ((*ADADELTA_SLOTS, "sum"), f"{shown}, sum"),
        "weights": (("weights", *ADADELTA_SLOTS), f"weights, {shown}"),
        "space": (("square_avg ", "acc_delta"), "square_avg , acc_delta"),
        "empty": (("", ""), ", "),
        "lines": (("square_avg\n", "acc_delta\0"), "square_avg?, acc_delta?"),
        "many": (("s",) * 10_000, ", ".join("s" * 8) + " and 9992 more"),
        "huge": ((huge, huge), f"{'x' * 24}..., {'x' * 24}..."),
    }
    for name, (slots, got) in lists.items():

        def prepared(_: Scene, slots: Sequence[str] = slots) -> Request:
            return put(*(whole(index, *[0.0] * 5) for index in range(3)), slots=slots)

        metadata = {"expected": shown, "got": got}
        yield Case("STATE_MISMATCH", _named(prepared, f"slots_{name}"), metadata, False)


CASES += [*_unknown(), *_unknown_hyperparameters(), *_another_kind(), *_another_structure(), *_another_state()]


@case("OPTIMIZER_UNKNOWN", field="groups[2]")
def a_last_group_without_optimizer(scene: Scene) -> Request:
    return "CreateModel", [*creation("new", groups=[adadelta(), adadelta(), Optimizer()])]


@case("HYPERPARAMETER_INVALID", field="groups[1]", allowed="adam, as groups[0] is")
def groups_of_two_kinds(scene: Scene) -> Request:
    return "CreateModel", [*creation("new", groups=[optimizer("adam"), optimizer("adamw")])]


@case("HYPERPARAMETER_INVALID", field="groups[4095]", allowed="sgd with momentum, as groups[0] is")
def one_group_of_thousands_without_momentum(scene: Scene) -> Request:
    groups = [optimizer("sgd", momentum=0.5) for _ in range(4095)]
    return "CreateModel", [*creation("new", groups=[*groups, optimizer("sgd")])]


@case("HYPERPARAMETER_INVALID", field="groups", allowed="at most 4096 groups")
def an_extension_to_more_groups_than_a_model_may_have(scene: Scene) -> Request:
    header = models.ExtendModelHeader(model="m", tensor_count=2, group_count=1, groups=[adadelta()] * 4096)
    return "ExtendModel", [models.ExtendModelRequest(header=header)]


@case("HYPERPARAMETER_INVALID", field="nesterov", allowed="false, unless momentum > 0 and dampening = 0")
def nesterov_without_momentum(scene: Scene) -> Request:
    return "CreateModel", [*creation("new", groups=[optimizer("sgd", nesterov=True)])]


@case("HYPERPARAMETER_INVALID", field="momentum")
def a_momentum_that_is_no_number(scene: Scene) -> Request:
    return "CreateModel", [*creation("new", groups=[optimizer("sgd", momentum=float("nan"))])]


@case("HYPERPARAMETER_INVALID", field="beta1", allowed="in [0, 1)")
def a_beta_of_one(scene: Scene) -> Request:
    return "CreateModel", [*creation("new", groups=[optimizer("adam", beta1=1.0)])]


@case("HYPERPARAMETER_INVALID", field="momentum")
def a_change_to_a_negative_momentum(scene: Scene) -> Request:
    scene.wire.create("other", groups=[optimizer("rmsprop", momentum=0.9)])
    scene.models.append("other")
    request = models.UpdateModelRequest(model="other", groups=[optimizer("rmsprop", momentum=-0.9)])
    return "UpdateModel", [request]


@case("MODEL_MISMATCH", model="other", difference="beta2 of group 0 is 0.999, not 0.99")
def another_number_of_the_same_optimizer(scene: Scene) -> Request:
    scene.wire.create("other", groups=[optimizer("adamw")])
    scene.models.append("other")
    return "CreateModel", [*creation("other", groups=[optimizer("adamw", beta2=0.99)])]


@case("STATE_MISMATCH", expected="none", got="momentum_buffer")
def a_state_for_an_optimizer_without_state(scene: Scene) -> Request:
    scene.wire.create("other", groups=[optimizer("sgd")])
    scene.models.append("other")
    return "PutState", [*replacement("other", [[0.0] * 5] * 2, slots=["momentum_buffer"])]
