"""16 bits an element on the wire, as the contract describes them: bytes by hand, none of the client's code."""

from typing import Any

import numpy as np
import pytest
from attach import Sharer
from expected import Twin, gradient, norm
from messages import Vector
from numpy.typing import NDArray
from wire import Wire, pulled, unchanged

from deltaserve.v1 import common_pb2
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve.v1.common_pb2 import DATA_TYPE_BFLOAT16, DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32, DATA_TYPE_UNSPECIFIED

SHAPES = {"a": (300, 1000), "none": (0,), "b": (7, 101)}
SIZE = 300_707
HALVES = (DATA_TYPE_BFLOAT16, DATA_TYPE_FLOAT16)
every_half = pytest.mark.parametrize("kind", HALVES, ids=common_pb2.DataType.Name)


def narrow(kind: int, values: Vector) -> NDArray[Any]:
    """Rounds to nearest, ties to even, by comparing the two neighbours in float64: not the server's way."""
    if kind == DATA_TYPE_FLOAT16:
        with np.errstate(over="ignore"):
            return np.asarray(values, "<f2")
    low = values.view(np.uint32) >> np.uint32(16)
    below, above = (widen(kind, (low + np.uint32(k)).astype("<u2")).astype(np.float64) for k in range(2))
    exact = values.astype(np.float64)
    nearer = np.abs(above - exact) < np.abs(exact - below)
    tie = np.abs(above - exact) == np.abs(exact - below)
    return np.asarray(low + (nearer | (tie & (low % 2 == 1))), "<u2")


def widen(kind: int, values: NDArray[Any]) -> Vector:
    """Returns the same values in float32."""
    if kind == DATA_TYPE_FLOAT16:
        return values.astype(np.float32)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def dtype(kind: int) -> str:
    return "<f2" if kind == DATA_TYPE_FLOAT16 else "<u2"


def scaled(seed: int, size: int = SIZE) -> Vector:
    """Returns values within the range of float16."""
    return gradient(seed, size).clip(-60_000, 60_000)


@every_half
def test_a_streamed_push_is_that_of_its_values_widened(wire: Wire, kind: Any) -> None:
    twin = Twin(scaled(0))
    wire.create("m", SHAPES, weights=twin.weights)
    session = wire.open("m", "w")
    for number in range(1, 4):
        pushed = narrow(kind, scaled(number))
        header = session.header(number, gradient_type=kind, weights_type=kind)
        messages = [rpc.StreamStepRequest(header=header)]
        for at in range(0, SIZE, 99_999):  # chunks of an odd number of elements
            stop = min(at + 99_999, SIZE)
            chunk = common_pb2.Chunk(offset=at, data=pushed[at:stop].tobytes())
            messages.append(rpc.StreamStepRequest(gradient=chunk))
        first, *rest = wire.call("StreamStep", *messages)
        moved = twin.update(widen(kind, pushed))
        assert first.header.result.gradient_norm == pytest.approx(norm(widen(kind, pushed)), rel=1e-12)
        assert first.header.result.update_norm == pytest.approx(moved, rel=1e-6)
        got = np.frombuffer(b"".join(message.weights.data for message in rest), dtype(kind))
        np.testing.assert_array_equal(got, narrow(kind, twin.weights))
        offsets = np.cumsum([0, *(len(message.weights.data) // 2 for message in rest)])
        assert [message.weights.offset for message in rest] == offsets[:-1].tolist()
    twin.check(wire.snapshot("m"))


@pytest.mark.parametrize("types", [(a, b) for a in (0, 1, 2, 3) for b in (0, 1, 2, 3)], ids=str)
def test_gradients_and_weights_have_independent_types(wire: Wire, types: tuple[Any, Any]) -> None:
    out, back = types
    size = 1001
    twin = Twin(scaled(0, size))
    wire.create("m", {"w": (size,)}, weights=twin.weights)
    session = wire.open("m", "w")
    pushed = scaled(1, size)
    sent = narrow(out, pushed) if out in HALVES else pushed
    header = session.header(1, gradient_type=out, weights_type=back)
    answer = wire.one("Step", rpc.StepRequest(header=header, gradient=sent.tobytes()))
    twin.update(widen(out, sent) if out in HALVES else pushed)
    expected = narrow(back, twin.weights) if back in HALVES else twin.weights
    assert answer.weights == expected.tobytes()
    again = wire.one("Step", rpc.StepRequest(header=header, gradient=sent.tobytes()))
    assert again.result.duplicate
    twin.check(wire.snapshot("m"))


@every_half
def test_the_same_bytes_again_are_a_duplicate_in_either_type(wire: Wire, kind: Any) -> None:
    """The contract promises a duplicate for the same bytes, which is what a retry sends."""
    wire.create("m", {"w": (100,)})
    session = wire.open("m", "w")
    pushed = narrow(kind, scaled(1, 100))
    request = rpc.StepRequest(header=session.header(1, gradient_type=kind), gradient=pushed.tobytes())
    assert not wire.one("Step", request).result.duplicate
    assert wire.one("Step", request).result.duplicate
    other = pushed.copy()
    other[50:51] = narrow(kind, np.full(1, 77.0, np.float32))
    changed = rpc.StepRequest(header=session.header(1, gradient_type=kind), gradient=other.tobytes())
    assert wire.refused("Step", changed).reason == "SEQUENCE_REUSED"
    assert wire.snapshot("m").version == 1


@every_half
def test_pulling(wire: Wire, kind: Any) -> None:
    weights = scaled(0)
    wire.create("m", SHAPES, weights=weights)
    call = wire.start("Pull", [rpc.PullRequest(model="m", weights_type=kind)])
    first, *rest = [rpc.PullResponse.FromString(message) for message in call]
    assert first.header.element_count == SIZE
    got = b"".join(message.weights.data for message in rest)
    assert got == narrow(kind, weights).tobytes()
    _, whole = pulled(wire.start("Pull", [rpc.PullRequest(model="m", weights_type=DATA_TYPE_FLOAT32)]))
    np.testing.assert_array_equal(whole, weights)


BAD = {
    DATA_TYPE_BFLOAT16: {
        0x7F80: "VALUE_NOT_FINITE",
        0xFF80: "VALUE_NOT_FINITE",
        0x7F81: "VALUE_NOT_FINITE",
        0xFFFF: "VALUE_NOT_FINITE",
        0x7F7F: "VALUE_TOO_LARGE",
        0xDF80: "VALUE_TOO_LARGE",
        0x5F80: "VALUE_TOO_LARGE",
    },
    DATA_TYPE_FLOAT16: {
        0x7C00: "VALUE_NOT_FINITE",
        0xFC00: "VALUE_NOT_FINITE",
        0x7C01: "VALUE_NOT_FINITE",
        0xFFFF: "VALUE_NOT_FINITE",
    },
}


@every_half
@pytest.mark.parametrize("place", [0, 1, 15, 16, 31, 262_143, 262_144, 299_999, 300_000, SIZE - 1])
def test_a_bad_value_is_found_at_any_position(wire: Wire, kind: Any, place: int) -> None:
    wire.create("m", SHAPES)
    session = wire.open("m", "w")
    expected = {"tensor": "a" if place < 300_000 else "b", "index": str(place if place < 300_000 else place - 300_000)}
    for bits, reason in BAD[kind].items():
        pushed = narrow(kind, np.ones(SIZE, np.float32))
        pushed.view(np.uint16)[place] = bits
        messages = [rpc.StreamStepRequest(header=session.header(1, gradient_type=kind))]
        for at in range(0, SIZE, 1 << 18):
            chunk = common_pb2.Chunk(offset=at, data=pushed[at : at + (1 << 18)].tobytes())
            messages.append(rpc.StreamStepRequest(gradient=chunk))
        refused = wire.refused("StreamStep", *messages)
        assert (refused.reason, refused.metadata) == (reason, expected), hex(bits)
    assert wire.snapshot("m").version == 0


@every_half
def test_the_largest_values_leave_the_state_finite(wire: Wire, kind: Any) -> None:
    largest = 0x7BFF if kind == DATA_TYPE_FLOAT16 else 0x5F7F
    wire.create("m", {"w": (64,)})
    session = wire.open("m", "w")
    for number in range(1, 6):
        bits = np.full(64, largest if number % 2 else largest | 0x8000, "<u2")
        header = session.header(number, gradient_type=kind)
        wire.one("Step", rpc.StepRequest(header=header, gradient=bits.tobytes()))
    state = wire.snapshot("m")
    assert state.version == 5
    for vector in state.arrays:
        assert np.isfinite(vector).all()


@every_half
def test_a_push_of_the_wrong_length(wire: Wire, kind: Any) -> None:
    wire.create("m", {"w": (101,)})
    session = wire.open("m", "w")
    header = session.header(1, gradient_type=kind)
    with unchanged(wire, "m"):
        for length, reason in (
            (200, "PUSH_INCOMPLETE"),
            (201, "CHUNK_SEQUENCE"),
            (203, "CHUNK_SEQUENCE"),
            (404, "CHUNK_SEQUENCE"),
        ):
            assert wire.refused("Step", rpc.StepRequest(header=header, gradient=bytes(length))).reason == reason
        chunk = rpc.StreamStepRequest(gradient=common_pb2.Chunk(offset=0, data=bytes(101)))
        assert wire.refused("StreamStep", rpc.StreamStepRequest(header=header), chunk).reason == "CHUNK_SEQUENCE"
    answer = wire.one("Step", rpc.StepRequest(header=header, gradient=bytes(202)))
    assert len(answer.weights) == 404


@pytest.mark.parametrize("number", [4, 7, -1, (1 << 31) - 1])
@pytest.mark.parametrize("field", ["gradient_type", "weights_type"])
def test_an_unknown_data_type_is_refused(wire: Wire, number: int, field: str) -> None:
    wire.create("m", {"w": (4,)})
    session = wire.open("m", "w")
    fields: dict[str, Any] = {field: number}
    header = session.header(1, **fields)
    allowed = "DATA_TYPE_FLOAT32 or DATA_TYPE_BFLOAT16 or DATA_TYPE_FLOAT16"
    with unchanged(wire, "m"):
        for refused in (
            wire.refused("Step", rpc.StepRequest(header=header, gradient=bytes(16))),
            wire.refused("StreamStep", rpc.StreamStepRequest(header=header)),
            wire.refused("Pull", rpc.PullRequest(model="m", weights_type=number)),  # type: ignore[arg-type]
        ):
            assert refused.reason == "DTYPE_UNSUPPORTED"
            assert refused.metadata == {"tensor": "(all)", "got": str(number), "allowed": allowed}
    assert wire.step(session.header(1), np.ones(4)).result.version == 1


def test_unset_means_float32(wire: Wire) -> None:
    wire.create("m", {"w": (4,)}, weights=np.arange(4))
    session = wire.open("m", "w")
    header = session.header(1, gradient_type=DATA_TYPE_UNSPECIFIED, weights_type=DATA_TYPE_UNSPECIFIED)
    assert len(wire.one("Step", rpc.StepRequest(header=header, gradient=bytes(16))).weights) == 16
    np.testing.assert_array_equal(wire.pull("m")[1], np.arange(4))


@every_half
def test_a_shared_push_is_float32_and_so_are_its_weights(wire: Wire, kind: Any) -> None:
    twin = Twin(np.zeros(5000, np.float32))
    wire.create("m", {"w": (5000,)})
    sharer, pushed = Sharer(wire, "m", "a"), gradient(1, 5000)
    narrow_push = rpc.StreamStepRequest(header=sharer.session.header(1, shared_memory=True, gradient_type=kind))
    with unchanged(wire, "m"):
        refused = wire.refused("StreamStep", narrow_push)
    assert (refused.reason, refused.fields) == ("PUSH_INVALID", ("gradient_type",))
    _, weights = sharer.step(1, pushed, weights_type=kind)
    twin.update(pushed)
    np.testing.assert_array_equal(weights, twin.weights)
    twin.check(wire.snapshot("m"))
