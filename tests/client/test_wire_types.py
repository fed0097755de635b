"""16-bit elements on the wire: they are rounded as in torch, and a push applies the rounded gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.states import assert_same_state

import deltaserve
from deltaserve import Async, Client, Sync
from deltaserve._common.element_types import ELEMENT_TYPES, FLOAT32, WireType
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import StartProxy

HALVES: tuple[WireType, ...] = ("bfloat16", "float16")
every_half = pytest.mark.parametrize("name", HALVES)

EDGES = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000),  # zeros, smallest, denormal, smallest normal
        *(0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001),  # one, and around ties of bfloat16
        *(0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001),  # around ties of float16
        *(0x477FE000, 0x477FEFFF, 0x477FF000, 0x477FFFFF, 0x47800000),  # around float16's largest
        *(0x33000000, 0x33000001, 0x32FFFFFF, 0x33800000, 0x387FC000, 0x387FE000, 0x387FFFFF),  # its denormals
        *(0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF),  # around bfloat16's largest
        *(0x7F800000, 0xFF800000),  # infinities
        *(0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF, 0xFFFF8000),  # NaN
    ],
    np.uint32,
)


def narrowed(name: WireType, values: NDArray[np.float32]) -> NDArray[Any]:
    wire = ELEMENT_TYPES[name]
    out = np.empty(values.size, wire.dtype)
    wire.narrow(values, out)
    return out


def widened(name: WireType, values: NDArray[Any]) -> NDArray[np.float32]:
    out = np.empty(values.size, np.float32)
    ELEMENT_TYPES[name].widen(values, out)
    return out


def check_narrow(name: WireType, values: NDArray[np.float32]) -> None:
    """Compares the conversion with torch; a NaN must stay a NaN, with any payload."""
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(values.copy()).to(getattr(torch, name)).view(torch.uint16).numpy()
    got = narrowed(name, values).view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    assert np.isnan(widened(name, narrowed(name, values))[nan]).all()


@every_half
def test_edges_are_rounded_as_torch_does(name: WireType) -> None:
    check_narrow(name, EDGES.view(np.float32))


@every_half
@pytest.mark.parametrize("size", [1, 2, 15, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 300_001])
def test_random_bits_are_rounded_as_torch_does(name: WireType, size: int) -> None:
    check_narrow(name, np.random.default_rng(size).integers(0, 1 << 32, size, np.uint32).view(np.float32))


@every_half
@given(bits=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_any_bits_are_rounded_as_torch_does(name: WireType, bits: list[int]) -> None:
    check_narrow(name, np.array(bits, np.uint32).view(np.float32))


@every_half
def test_all_values_are_widened_exactly_and_rounded_back(name: WireType) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.copy()).view(getattr(torch, name)).to(torch.float32).numpy()
    with np.errstate(invalid="ignore"):  # a server sends no NaN
        got = widened(name, bits.view(ELEMENT_TYPES[name].dtype))
    nan = np.isnan(expected)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert np.isnan(got[nan]).all()
    np.testing.assert_array_equal(narrowed(name, got[~nan]).view(np.uint16), bits[~nan])


@every_half
def test_a_push_works_when_numpy_raises_on_every_float_error(name: WireType, client: Client) -> None:
    """Rounding to 16 bits underflows and is inexact, which must not raise an error."""
    model = client.create_model("m", {"w": np.zeros(EDGES.size)})
    values = np.full(EDGES.size, 1e-8, np.float32)
    values[::2] = 1e-42
    with np.errstate(all="raise"), model.worker(wire=name) as worker:
        worker.step({"w": values})
        with pytest.raises(deltaserve.RequestError, match=r"NaN|too large"):
            worker.step({"w": EDGES.view(np.float32)})
    assert model.info().version == 1


def test_parts_of_a_chunk_are_joined() -> None:
    parts = [np.arange(3, dtype=np.float32).data.cast("B"), np.arange(5, dtype=np.float32).data.cast("B")]
    assert [bytes(part) for part in FLOAT32.encoded(parts)] == [bytes(part) for part in parts]
    (joined,) = ELEMENT_TYPES["float16"].encoded(parts)
    np.testing.assert_array_equal(np.frombuffer(joined, np.float16), [0, 1, 2, 0, 1, 2, 3, 4])
    assert b"".join(ELEMENT_TYPES["bfloat16"].encoded([])) == b""


# --- pushes


SHAPES: dict[str, tuple[int, ...]] = {"a": (100, 3), "none": (0,), "b": (17,), "c": ()}
LARGE: dict[str, tuple[int, ...]] = {"a": (263, 1001), "none": (0, 3), "b": (99_991,), "c": ()}
every_size = pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["unary", "stream"])

Gradients = dict[str, Any]


def gradients(seed: int, shapes: dict[str, tuple[int, ...]]) -> Gradients:
    source = np.random.default_rng(seed)
    return {
        name: (source.standard_normal(shape) * 10.0 ** source.integers(-4, 3, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def rounded(name: WireType, values: Gradients) -> Gradients:
    return {
        key: widened(name, narrowed(name, np.atleast_1d(value).reshape(-1))).reshape(np.shape(value))
        for key, value in values.items()
    }


def check_equal(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@every_half
@every_size
def test_a_push_applies_the_rounded_gradient_and_returns_rounded_weights(
    client: Client, name: WireType, shapes: dict[str, tuple[int, ...]]
) -> None:
    models = [client.create_model(key, gradients(0, shapes)) for key in ("narrow", "wide")]
    with models[0].worker(transport="stream", wire=name) as narrow, models[1].worker(transport="stream") as wide:
        check_equal(narrow.pull(), rounded(name, wide.pull()))
        for number in range(1, 5):
            pushed = gradients(number, shapes)
            absent = {"b": None} if number == 3 else {}
            got, expected = narrow.step(pushed | absent), wide.step(rounded(name, pushed) | absent)
            check_equal(got, rounded(name, expected))
            assert narrow.last_result == wide.last_result
        out = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
        narrow.pull(out=out)
        check_equal(out, rounded(name, expected))
    assert_same_state(*(model.pull_state() for model in models))


@every_half
@pytest.mark.parametrize("reduction", ["mean", "median"])
@every_size
def test_a_round_of_mixed_types_applies_the_rounded_gradients(
    client: Client, name: WireType, reduction: Any, shapes: dict[str, tuple[int, ...]]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    policy = Sync(min_workers=3, reduction=reduction, clip_norm=100.0)
    states = []
    for key in ("narrow", "wide"):
        model = client.create_model(key, gradients(0, shapes), policy=policy)
        wires: tuple[WireType, ...] = (name, "float32", name) if key == "narrow" else ("float32",) * 3
        with ThreadPoolExecutor(3) as pool:
            workers = [model.worker(f"w{k}", transport="stream", wire=wire) for k, wire in enumerate(wires)]
            for number in range(2):
                pushed = [gradients(10 * number + k, shapes) for k in range(3)]
                pushed = [values if k == 1 else rounded(name, values) for k, values in enumerate(pushed)]
                list(pool.map(lambda worker, values: worker.step(values), workers, pushed))
            for worker in workers:
                worker.close()
        states.append(model.pull_state())
    assert_same_state(*states)


@every_size
@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_what_float16_cannot_hold_is_refused(client: Client, shapes: dict[str, tuple[int, ...]], value: float) -> None:
    model = client.create_model("m", gradients(0, shapes))
    with model.worker(transport="stream", wire="float16") as worker:
        pushed = gradients(1, shapes)
        pushed["b"][-1] = value
        with pytest.raises(deltaserve.RequestError) as caught:
            worker.step(pushed)
        assert caught.value.reason == "VALUE_NOT_FINITE"
        assert caught.value.metadata == {"tensor": "b", "index": str(shapes["b"][0] - 1)}
        assert model.info().version == 0
        pushed["b"][-1] = 65504.0
        worker.step(pushed)
        assert model.info().version == 1


@pytest.mark.parametrize("wire", ["", "FLOAT32", "int8", None])
def test_an_unknown_wire_type_is_refused(client: Client, wire: Any) -> None:
    model = client.create_model("m", gradients(0, SHAPES))
    with pytest.raises(ValueError, match="wire: expected one of float32, bfloat16, float16, got"):
        model.worker(wire=wire)
    assert model.info().sessions == ()


@every_half
def test_shared_memory_always_holds_float32(client: Client, name: WireType) -> None:
    models = [client.create_model(key, gradients(0, LARGE), policy=Async()) for key in ("a", "b")]
    with models[0].worker(transport="shared", wire=name) as left, models[1].worker(transport="stream") as right:
        for number in range(1, 3):
            left.step(gradients(number, LARGE))
            right.step(gradients(number, LARGE))
        check_equal(left.weights, right.weights)


Count = Callable[[], int]


@pytest.fixture
def counted(server: LocalServer, start_proxy: "StartProxy", monkeypatch: pytest.MonkeyPatch) -> tuple[str, Count]:
    """A proxy to the server, and the number of bytes that passed it in both directions."""
    import socket

    passed = [0]
    honest = socket.socket.sendall

    def sendall(self: socket.socket, data: Any) -> None:
        passed[0] += len(data)
        honest(self, data)

    monkeypatch.setattr(socket.socket, "sendall", sendall)
    return start_proxy(server.target).target, lambda: passed[0]


@every_size
def test_bytes_on_the_wire_halve(
    client: Client, counted: tuple[str, Count], shapes: dict[str, tuple[int, ...]]
) -> None:
    target, count = counted
    client.create_model("m", gradients(0, shapes))
    taken: dict[str, int] = {}
    with deltaserve.connect(target, timeout_seconds=20) as far:
        for wire in ELEMENT_TYPES:
            with far.model("m").worker(transport="stream", wire=wire) as worker:
                worker.step(gradients(1, shapes))
                before = count()
                for number in range(3):
                    worker.step(gradients(number, shapes))
                taken[wire] = count() - before
    tensors = 3 * 2 * 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    more = 3 * 1500 + tensors // 500
    assert tensors < taken["float32"] < tensors + more
    for name in HALVES:
        assert tensors // 2 < taken[name] < tensors // 2 + more
