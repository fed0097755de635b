"""Requests that are invalid in themselves: names, shapes, numbers, chunks, values."""

from collections.abc import Callable, Iterator
from typing import Any

from error_scene import CASES, Case, Request, Scene, case, opened, put, step, stream, whole
from messages import adadelta, creation, floats, pieces, sync

from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import model_service_pb2 as models
from deltaserve.v1 import worker_service_pb2 as workers

# --- names, shapes, types


def _bad_name(name: str) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        return "CreateModel", list(creation(name))

    prepare.__name__ = f"name_{name[:3]!r}"
    return prepare


def _bad_tensor(*specs: pb.TensorSpec) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        return "CreateModel", [models.CreateModelRequest(config=pb.ModelConfig(name="new", tensors=specs))]

    prepare.__name__ = f"tensor_{[(spec.name[:3], *spec.shape) for spec in specs]}"
    return prepare


def _bad_group(**fields: Any) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        return "CreateModel", list(creation("new", groups=[adadelta(**fields)]))

    prepare.__name__ = f"group_{fields}"
    return prepare


def _bad_push(**fields: object) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        return step(scene.a.header(3, **fields), *[1.0] * 5)

    prepare.__name__ = f"push_{list(fields)}"
    return prepare


def _bad_lease(seconds: float) -> Callable[[Scene], Request]:
    def prepare(scene: Scene) -> Request:
        return opened(scene, lease_seconds=seconds)

    prepare.__name__ = f"lease_{seconds}"
    return prepare


def _many() -> Iterator[Case]:
    """Yields the cases that differ in one value."""
    for name in ("", ".hidden", "../m", "a/b", "a b", "a\n", "a\0b", "ä", "a" * 129, "-m"):
        yield Case("NAME_INVALID", _bad_name(name), {"field": "name"}, False)
    for name in ("", "x" * 257, "a\nb", "\x7f"):
        yield Case("NAME_INVALID", _bad_tensor(pb.TensorSpec(name=name, shape=[1])), {"field": "tensors.name"}, False)
    shapes: tuple[tuple[int, ...], ...] = ((-1,), (2, -3), (1,) * 9, (1 << 62,), (1 << 40, 1 << 40), (1 << 62, 0))
    for shape in shapes:
        spec = pb.TensorSpec(name="t", shape=shape)
        expected = {"tensor": "t", "shape": "x".join(map(str, shape))}
        yield Case("SHAPE_INVALID", _bad_tensor(spec, pb.TensorSpec(name="u")), expected, False)
    half = (1 << 47) + 1
    sizes = [pb.TensorSpec(name=name, shape=[half]) for name in "tu"]
    yield Case("SHAPE_INVALID", _bad_tensor(*sizes), {"tensor": "u", "shape": str(half)}, False)
    yield Case("SHAPE_INVALID", _bad_tensor(pb.TensorSpec(name="t", shape=[0, 3])), {"tensor": "(all)"}, False)
    yield Case("SHAPE_INVALID", _bad_tensor(), {"tensor": "(all)"}, False)
    numbers = {
        "eps": (0.0, -1e-6, float("nan"), float("inf"), 1e-60),
        "rho": (-0.1, 1.001, float("nan")),
        "lr": (-1e-9, float("inf"), float("nan"), 1e39),
        "weight_decay": (-1.0, float("nan"), 1e300),
    }
    for name, values in numbers.items():
        for value in values:
            yield Case("HYPERPARAMETER_INVALID", _bad_group(**{name: value}), {"field": name}, False)
            given: dict[str, Any] = {name: value}
            groups = [adadelta(**given)]
            yield Case("HYPERPARAMETER_INVALID", _bad_push(hyperparameters=groups), {"field": name}, False)
    for seconds in (0.0, -1.0, 0.2, 1e9, float("nan"), float("inf")):
        yield Case("POLICY_INVALID", _bad_lease(seconds), {"field": "lease_seconds", "allowed": "0.25 to 3600"}, False)


CASES += _many()


@case("NAME_INVALID", field="tensors.name", allowed="no name twice")
def two_tensors_of_one_name(scene: Scene) -> Request:
    return _bad_tensor(*[pb.TensorSpec(name="t", shape=[1])] * 2)(scene)


@case("NAME_INVALID", field="worker")
def a_worker_name_with_a_slash(scene: Scene) -> Request:
    return opened(scene, "host/1")


@case("NAME_INVALID", field="tensors.name", allowed="no name twice")
def extending_by_a_tensor_that_is_there(scene: Scene) -> Request:
    header = models.ExtendModelHeader(
        model="m", tensor_count=2, group_count=1, tensors=[pb.TensorSpec(name="w", shape=[1])]
    )
    return "ExtendModel", [models.ExtendModelRequest(header=header)]


@case("DTYPE_UNSUPPORTED", tensor="t", got="7", allowed="DATA_TYPE_FLOAT32")
def an_element_type_of_the_future(scene: Scene) -> Request:
    return _bad_tensor(pb.TensorSpec(name="t", shape=[1], data_type=7))(scene)  # type: ignore[arg-type]


WIRE_TYPES = "DATA_TYPE_FLOAT32 or DATA_TYPE_BFLOAT16 or DATA_TYPE_FLOAT16"


@case("DTYPE_UNSUPPORTED", tensor="t", got="2", allowed="DATA_TYPE_FLOAT32")
def a_tensor_that_is_to_be_held_in_16_bits(scene: Scene) -> Request:
    return _bad_tensor(pb.TensorSpec(name="t", shape=[1], data_type=pb.DATA_TYPE_BFLOAT16))(scene)


@case("DTYPE_UNSUPPORTED", tensor="(all)", got="4", allowed=WIRE_TYPES)
def a_gradient_of_a_type_of_the_future(scene: Scene) -> Request:
    return stream(scene.a.header(3, gradient_type=4), (0, [1.0] * 5))


@case("DTYPE_UNSUPPORTED", tensor="(all)", got="-1", allowed=WIRE_TYPES)
def weights_of_no_type_for_a_push(scene: Scene) -> Request:
    return _bad_push(weights_type=-1)(scene)


@case("DTYPE_UNSUPPORTED", tensor="(all)", got="7", allowed=WIRE_TYPES)
def pulling_weights_of_no_type(scene: Scene) -> Request:
    return "Pull", [workers.PullRequest(model="m", weights_type=7)]  # type: ignore[arg-type]


@case("HYPERPARAMETER_INVALID", field="tensors.group", allowed="an index of 1 groups")
def a_group_that_is_not_there(scene: Scene) -> Request:
    return _bad_tensor(pb.TensorSpec(name="t", shape=[1], group=1))(scene)


@case("HYPERPARAMETER_INVALID", field="hyperparameters", allowed="1 groups")
def a_push_for_more_groups_than_there_are(scene: Scene) -> Request:
    return _bad_push(hyperparameters=[adadelta()] * 2)(scene)


@case("HYPERPARAMETER_INVALID", field="hyperparameters", allowed="2 groups")
def a_push_for_fewer_groups_than_there_are(scene: Scene) -> Request:
    scene.wire.create("two", {"w": (4,)}, groups=[adadelta()] * 2)
    scene.models.append("two")
    return step(scene.wire.open("two", "a").header(1, hyperparameters=[adadelta()]), *[1.0] * 4)


@case("HYPERPARAMETER_INVALID", field="groups")
def more_groups_than_a_model_may_have(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", groups=[adadelta()] * 5000))


@case("POLICY_INVALID", field="policy.sync.min_workers", allowed="1 to 65536")
def a_round_of_nobody(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", policy=sync(0)))


@case("POLICY_INVALID", field="policy.sync.min_workers", allowed="1 to 65536")
def a_round_of_four_billion(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", policy=sync((1 << 32) - 1)))


# --- messages and chunks


@case("MESSAGE_INVALID", message="StepRequest")
def bytes_that_do_not_decode(scene: Scene) -> Request:
    return "Step", [b"\xff\xff\xff"]


@case("MESSAGE_INVALID", message="GetModelRequest")
def a_name_that_is_no_utf8(scene: Scene) -> Request:
    return "GetModel", [b"\x0a\x02\xff\xff"]


@case("MESSAGE_INVALID", message="StreamStepRequest")
def a_stream_message_with_nothing_set(scene: Scene) -> Request:
    method, messages = stream(scene.a.header(3))
    return method, [*messages, b""]


@case("MESSAGE_INVALID")
def a_stream_without_messages(scene: Scene) -> Request:
    return "StreamStep", []


@case("MESSAGE_INVALID")
def a_stream_that_begins_with_a_chunk(scene: Scene) -> Request:
    return "StreamStep", stream(scene.a.header(3), (0, [1.0] * 5))[1][1:]


@case("MESSAGE_INVALID")
def a_second_header(scene: Scene) -> Request:
    method, (header, chunk) = stream(scene.a.header(3), (0, [1.0]))
    return method, [header, chunk, header]


@case("MESSAGE_INVALID")
def a_second_config(scene: Scene) -> Request:
    config, weights = creation("new")
    return "CreateModel", [config, config, weights]


@case("MESSAGE_INVALID")
def a_creation_that_begins_with_weights(scene: Scene) -> Request:
    return "CreateModel", [creation("new")[1]]


@case("MESSAGE_INVALID")
def an_extension_without_messages(scene: Scene) -> Request:
    return "ExtendModel", []


@case("MESSAGE_INVALID")
def a_state_with_a_header_at_its_end(scene: Scene) -> Request:
    method, messages = put(whole(0, *[0.0] * 5), whole(1, *[0.0] * 5), whole(2, *[0.0] * 5))
    return method, [*messages, messages[0]]


@case("CHUNK_SEQUENCE", expected="offset 2", got="offset 1")
def chunks_that_overlap(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, [1.0, 1.0]), (1, [1.0] * 4))


@case("CHUNK_SEQUENCE", expected="offset 2", got="offset 3")
def chunks_with_a_gap(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, [1.0, 1.0]), (3, [1.0] * 2))


@case("CHUNK_SEQUENCE", expected="offset 0", got="offset 4")
def chunks_out_of_order(scene: Scene) -> Request:
    return stream(scene.a.header(3), (4, [1.0]), (0, [1.0] * 4))


@case("CHUNK_SEQUENCE", expected="offset 0", got=f"offset {(1 << 64) - 1}")
def an_offset_beyond_all_bounds(scene: Scene) -> Request:
    return stream(scene.a.header(3), ((1 << 64) - 1, [1.0]))


@case("CHUNK_SEQUENCE", expected="at most 3 elements from offset 2", got="4 elements")
def a_chunk_beyond_the_end(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, [1.0, 1.0]), (2, [1.0] * 4))


@case("CHUNK_SEQUENCE", expected="no further element", got="offset 5")
def a_chunk_after_the_end(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, [1.0] * 5), (5, [1.0]))


@case("CHUNK_SEQUENCE", expected="one or more whole elements", got="3 bytes")
def a_part_of_an_element(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, b"\0\0\0"))


@case("CHUNK_SEQUENCE", expected="one or more whole elements", got="9 bytes")
def a_part_of_an_element_of_16_bits(scene: Scene) -> Request:
    return stream(scene.a.header(3, gradient_type=pb.DATA_TYPE_FLOAT16), (0, bytes(9)))


@case("CHUNK_SEQUENCE", expected="5 elements", got="20 bytes")
def a_float32_push_under_the_name_of_bfloat16(scene: Scene) -> Request:
    return step(scene.a.header(3, gradient_type=pb.DATA_TYPE_BFLOAT16), *[1.0] * 5)


@case("CHUNK_SEQUENCE", expected="one or more whole elements", got="0 bytes")
def a_chunk_of_nothing(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, b""))


@case("CHUNK_SEQUENCE", expected="at most 4 elements from offset 0", got="5 elements")
def a_chunk_across_an_absent_tensor(scene: Scene) -> Request:
    return stream(scene.a.header(3, absent_tensors=[1]), (0, [1.0] * 5))


@case("CHUNK_SEQUENCE", expected="5 elements", got="24 bytes")
def a_step_with_too_much(scene: Scene) -> Request:
    return step(scene.a.header(3), *[1.0] * 6)


@case("CHUNK_SEQUENCE", expected="5 elements", got="23 bytes")
def a_step_with_a_part_of_an_element(scene: Scene) -> Request:
    return "Step", [workers.StepRequest(header=scene.a.header(3), gradient=b"\0" * 23)]


@case("CHUNK_SEQUENCE", expected="no further element", got="offset 0")
def weights_after_the_end(scene: Scene) -> Request:
    return "CreateModel", [*creation("new"), *creation("new")[1:]]


@case("CHUNK_SEQUENCE", expected="offset 0", got="offset 10")
def the_wrong_vector(scene: Scene) -> Request:
    return put(whole(2, *[0.0] * 5))


@case("CHUNK_SEQUENCE", expected="at most 2 elements from offset 3", got="3 elements")
def a_chunk_across_two_vectors_of_a_state(scene: Scene) -> Request:
    return put(pb.Chunk(data=floats([0.0] * 3)), pb.Chunk(offset=3, data=floats([0.0] * 3)))


@case("CHUNK_SEQUENCE", expected="no further element", got="offset 15")
def a_vector_more_than_the_state_has(scene: Scene) -> Request:
    return put(*(whole(index, *[0.0] * 5) for index in range(4)))


@case("PUSH_INCOMPLETE", expected="5", got="4")
def a_step_with_too_little(scene: Scene) -> Request:
    return step(scene.a.header(3), *[1.0] * 4)


@case("PUSH_INCOMPLETE", expected="5", got="2")
def half_a_stream(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, [1.0, 1.0]))


@case("PUSH_INCOMPLETE", expected="5", got="0")
def a_config_without_weights(scene: Scene) -> Request:
    return "CreateModel", [creation("new")[0]]


@case("PUSH_INCOMPLETE", expected="15", got="5")
def a_state_without_averages(scene: Scene) -> Request:
    return put(whole(0, *[1.0] * 5))


@case("PUSH_INCOMPLETE", expected="3", got="1")
def half_an_extension(scene: Scene) -> Request:
    tensors = [pb.TensorSpec(name="new", shape=[3])]
    header = models.ExtendModelHeader(model="m", tensor_count=2, group_count=1, tensors=tensors)
    kind = models.ExtendModelRequest
    return "ExtendModel", [kind(header=header), *(kind(weights=piece) for piece in pieces([1.0], 5))]


# --- values


@case("VALUE_NOT_FINITE", tensor="w", index="3")
def a_nan_in_a_push(scene: Scene) -> Request:
    return step(scene.a.header(3), 1, 1, 1, float("nan"), 1)


@case("VALUE_NOT_FINITE", tensor="b", index="0")
def an_infinity_in_the_last_chunk(scene: Scene) -> Request:
    return stream(scene.a.header(3), (0, [1.0] * 4), (4, [float("-inf")]))


@case("VALUE_NOT_FINITE", tensor="w", index="1")
def an_infinity_of_16_bits(scene: Scene) -> Request:
    return stream(scene.a.header(3, gradient_type=pb.DATA_TYPE_FLOAT16), (0, b"\0\0\0\x7c" + bytes(6)))


@case("VALUE_TOO_LARGE", tensor="b", index="0")
def a_value_of_16_bits_whose_square_overflows(scene: Scene) -> Request:
    return stream(scene.a.header(3, gradient_type=pb.DATA_TYPE_BFLOAT16), (0, bytes(8) + b"\x80\x5f"))


@case("VALUE_NOT_FINITE", tensor="w", index="0")
def a_nan_in_new_weights(scene: Scene) -> Request:
    return "CreateModel", list(creation("new", weights=[float("nan"), 0, 0, 0, 0]))


@case("VALUE_NOT_FINITE", tensor="w", index="1")
def an_infinity_in_an_average(scene: Scene) -> Request:
    return put(whole(0, *[0.0] * 5), whole(1, 0, float("inf"), 0, 0, 0))


@case("VALUE_TOO_LARGE", tensor="w", index="2")
def a_value_whose_square_overflows(scene: Scene) -> Request:
    return step(scene.a.header(3), 1, 1, 1e20, 1, 1)


@case("VALUE_TOO_LARGE", tensor="b", index="0")
def a_weight_whose_square_overflows(scene: Scene) -> Request:
    return put(whole(0, 0, 0, 0, 0, -3e38))


# --- what does not fit the model


@case("PUSH_INVALID", field="base_version")
def a_base_of_the_future(scene: Scene) -> Request:
    return _bad_push(base_version=3)(scene)


@case("PUSH_INVALID", field="sequence", allowed=">= 1")
def a_push_without_a_number(scene: Scene) -> Request:
    return step(scene.a.header(0), *[1.0] * 5)


@case("PUSH_INVALID", field="gradient_type", allowed="DATA_TYPE_FLOAT32 in shared memory")
def shared_memory_of_16_bits(scene: Scene) -> Request:
    return stream(scene.a.header(3, shared_memory=True, gradient_type=pb.DATA_TYPE_BFLOAT16))


@case("PUSH_INVALID", field="shared_memory", allowed="false: use StreamStep")
def shared_memory_in_a_step(scene: Scene) -> Request:
    return _bad_push(shared_memory=True)(scene)


@case("PUSH_INVALID", field="absent_tensors", allowed="ascending indices of 2 tensors")
def absent_tensors_not_in_order(scene: Scene) -> Request:
    return _bad_push(absent_tensors=[1, 0])(scene)


@case("PUSH_INVALID", field="absent_tensors", allowed="ascending indices of 2 tensors")
def an_absent_tensor_named_twice(scene: Scene) -> Request:
    return _bad_push(absent_tensors=[1, 1])(scene)


@case("PUSH_INVALID", field="absent_tensors", allowed="ascending indices of 2 tensors")
def an_absent_tensor_that_is_not_there(scene: Scene) -> Request:
    return _bad_push(absent_tensors=[2])(scene)


@case("PUSH_INVALID", field="absent_tensors", allowed="ascending indices of 2 tensors")
def a_flood_of_absent_tensors(scene: Scene) -> Request:
    return _bad_push(absent_tensors=range(40_000))(scene)


@case("PUSH_INVALID", field="update_counts")
def a_state_with_too_few_counts(scene: Scene) -> Request:
    return put(counts=(1,))


@case("PUSH_INVALID", field="update_counts")
def a_state_with_a_count_that_the_next_update_overflows(scene: Scene) -> Request:
    return put(counts=(1, (1 << 64) - 1))


@case("PUSH_INVALID", field="square_avg of tensor b at element 0", allowed=">= 0")
def a_negative_average(scene: Scene) -> Request:
    return put(whole(0, *[0.0] * 5), whole(1, 0, 0, 0, 0, -1))
