"""The kernels for a GPU: their source, the code that Triton generates for them, their bits, and their checks.

The bits are tested in Triton's interpreter, which needs no GPU, and on a GPU where there is one.
"""

import functools
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support.optimizer_cases import CASES, STRUCTURES, over

from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX, Slot
from deltaserve_server.optimizers import cpu
from deltaserve_server.optimizers.trace import Step, traced

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")

from deltaserve_server.optimizers import cuda, triton_source  # noqa: E402

EXTREMES: tuple[Optimizer, ...] = (
    Adadelta(rho=1e-45, eps=2.0**-126),
    Adadelta(lr=2.0**38, rho=1 - 2**-26, eps=2.0**64, weight_decay=FLOAT32_MAX),
    SGD(lr=1e38, momentum=2.0, nesterov=True),
    Adagrad(lr=1e38, eps=1e-45, initial_accumulator_value=FLOAT32_MAX),
    RMSprop(eps=MAGNITUDE_MAX, momentum=10.0, centered=True, weight_decay=1e-45),
    Adam(lr=1e38, beta1=1 - 2**-50, eps=1e-45),
    Lion(lr=FLOAT32_MAX, beta1=1 - 2**-26, beta2=1e-45),
    AdamW(lr=1e30, weight_decay=1e30),
    AdamW(lr=2.0, weight_decay=0.5, amsgrad=True),
)
"""Hyperparameters at the ends of their ranges; the last two make the factor of decoupled decay huge and 0."""

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")]

EACH = cuda._BLOCK // (4 * 32)
"""Elements of each thread."""


@functools.cache
def compiled(optimizer: Optimizer, architecture: int = 90, gradient: str = "fp32") -> dict[str, str]:
    """Compiles a kernel for an architecture, which needs no GPU, and returns its code by stage."""
    pytest.importorskip("triton.backends.nvidia.compiler", reason="this Triton has no compiler for NVIDIA GPUs")
    kernel = cuda.kernel(optimizer)
    names = kernel.arg_names
    at = names.index("squares")
    types = dict.fromkeys(names[:at], "*fp32") | dict.fromkeys(names[at:], "fp32")
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=types | {"gradient": f"*{gradient}", "squares": "*fp64", "size": "i64", "block": "constexpr"},
        constexprs={"block": cuda._BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(names.index("size") + 1)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    asm: dict[str, str] = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm
    return asm


def count(code: str, *instructions: str) -> int:
    return sum(len(re.findall(rf"\s{re.escape(instruction)}\s", code)) for instruction in instructions)


@over(STRUCTURES)
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.deep), 90])
def test_the_code_rounds_each_operation_of_the_definition_once_and_moves_16_bytes_at_a_time(
    optimizer: Optimizer, architecture: int
) -> None:
    code = compiled(optimizer, architecture)["ptx"]
    operations = Counter(step.operation for step in traced(optimizer).steps)
    decoupled, slots = int(optimizer.decoupled), len(optimizer.slots)
    assert count(code, "sqrt.rn.f32") == operations["sqrt"] * EACH
    assert count(code, "div.rn.f32") == (operations["/"] + 1) * EACH
    assert count(code, "fma.rn.f32") == (operations["fma"] + 1 - decoupled) * EACH
    assert count(code, "mul.rn.f32", "neg.f32") == (operations["*"] + decoupled) * EACH
    assert count(code, "ld.global.v4.b32") == (2 + slots) * EACH // 4
    assert count(code, "st.global.v4.b32") == (1 + slots) * EACH // 4
    assert "ftz" not in code
    assert "approx" not in code


@over(STRUCTURES)
def test_limits_have_exact_bits_in_the_code(optimizer: Optimizer) -> None:
    found = set(re.findall(r"\b0f[0-9A-F]{8}\b", compiled(optimizer)["ptx"]))
    clips = (MAGNITUDE_MAX, FLOAT32_MAX) if optimizer.clips_weight else (MAGNITUDE_MAX,)
    limits = {_hexadecimal(sign * limit) for sign in (-1, 1) for limit in clips}
    others = {_hexadecimal(number) for number in (0.0, 0.5, 1.0, -1.0)}
    assert limits <= found <= limits | others


def _hexadecimal(number: float) -> str:
    return f"0f{np.float32(number).view(np.uint32):08X}"


@pytest.mark.parametrize("gradient", ["fp16", "bf16"])
def test_a_gradient_of_16_bits_is_loaded_in_16_bits(gradient: str) -> None:
    code = compiled(Adadelta(), 90, gradient)["ptx"]
    assert count(code, "ld.global.v4.b32") == 3 * EACH // 4 + EACH // 8  # 16 bytes hold 8 values
    assert count(code, "div.rn.f32") == 2 * EACH
    assert "ftz" not in code


@over(STRUCTURES)
def test_only_the_squares_are_in_double_precision(optimizer: Optimizer) -> None:
    code = compiled(optimizer)["ptx"]
    doubles = {
        instruction for line in code.splitlines() for instruction in re.findall(r"\s([a-z][\w.]*\.f64\S*)\s", line)
    }
    assert "cvt.f64.f32" in doubles
    # Only products and sums: no conversion to float32, and no product and sum with one rounding.
    assert {name.split(".")[0] for name in doubles - {"cvt.f64.f32"}} <= {"mul", "add", "mov", "selp"}
    assert "fma.rn.f64" not in code
    assert len(re.findall(r"st\.global\.b64", code)) == 1


def test_offsets_have_64_bits() -> None:
    additions = [line for line in compiled(Adadelta())["ttir"].splitlines() if "tt.addptr" in line]
    vectors = [line for line in additions if f"tensor<{cuda._BLOCK}xi64>" in line]
    assert (len(vectors), len(additions)) == (5, 6)  # the sixth is the address of the block's sum, with 32 bits


def test_a_structure_has_one_kernel() -> None:
    one, other = Adam(lr=0.5, weight_decay=0.1, maximize=True), Adam(beta1=0.5)
    assert cuda.kernel(one) is cuda.kernel(other)
    assert triton_source.source(one) == triton_source.source(other)
    assert len({cuda.kernel(optimizer) for optimizer in (*STRUCTURES, *CASES, *EXTREMES)}) == len(STRUCTURES)


@pytest.mark.parametrize("number", [-0.0, 1e-45, -(2.0**-127), 1e39, float("nan")])
def test_a_constant_that_triton_would_change_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.0 or a normal float32"):
        list(triton_source._steps((Step("t0", "+", ("w", number)),)))


Vector = NDArray[Any]

SIZE = 2 * cuda._BLOCK + 413
"""Two blocks and a part of one."""


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpu", marks=on_a_gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[tuple[ModuleType, str]]:
    """The module of the kernels, and the device of their tensors."""
    if request.param == "gpu":
        yield cuda, "cuda"
        return
    interpreter = importlib.import_module("triton_interpreter")
    with pytest.MonkeyPatch.context() as patch:
        interpreter.correct(patch)
        yield interpreter.cuda(), "cpu"


def finite(rng: np.random.Generator, size: int, limit: float = FLOAT32_MAX) -> Vector:
    """Values of both signs: half of any magnitude, among them denormals, zeros and the largest; half ordinary."""
    last = int(np.float32(limit).view(np.uint32))
    special = np.array([0, 1, 0x007FFFFF, 0x00800000, last], np.uint32)
    bits = np.where(rng.random(size) < 0.2, rng.choice(special, size), rng.integers(0, last + 1, size, np.uint32))
    ordinary = 10.0 ** rng.uniform(-6, 4, size)
    magnitudes = np.where(rng.random(size) < 0.5, bits.astype(np.uint32).view(np.float32), ordinary)
    return (rng.choice([-1, 1], size) * magnitudes).astype(np.float32)


def slot_of(rng: np.random.Generator, slot: Slot) -> Vector:
    values = finite(rng, SIZE)
    return np.abs(values) if slot.minimum == 0 else values


def gradient_of(rng: np.random.Generator, kind: str) -> Vector:
    """Finite values, infinities and NaN; of 16 bits, any bits."""
    if kind != "float32":
        return rng.integers(0, 1 << 16, SIZE, np.uint16).view(np.float16 if kind == "float16" else np.uint16)
    gradient = finite(rng, SIZE)
    gradient[rng.integers(0, SIZE, 60)] = np.repeat(np.array([np.inf, -np.inf, np.nan], np.float32), 20)
    return gradient


@over((*CASES, *EXTREMES))
def test_bits_of_the_cpu_kernel(kernels: tuple[ModuleType, str], optimizer: Optimizer) -> None:
    compare(kernels, "float32", optimizer)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_bits_of_the_cpu_kernel_from_16_bits(kernels: tuple[ModuleType, str], kind: str) -> None:
    compare(kernels, kind, Adadelta())


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@over(STRUCTURES[1:])
def test_bits_of_the_cpu_kernel_from_16_bits_for_others(
    kernels: tuple[ModuleType, str], kind: str, optimizer: Optimizer
) -> None:
    compare(kernels, kind, optimizer)


def compare(kernels: tuple[ModuleType, str], kind: str, optimizer: Optimizer) -> None:
    """Compares all vectors after a first and a later update."""
    module, device = kernels
    rng = np.random.default_rng(len(kind))
    for number, divisor in ((1, 1.0), (7, 3.0)):
        gradient, weights = gradient_of(rng, kind), finite(rng, SIZE)
        slots = [slot_of(rng, slot) for slot in optimizer.slots]
        arguments = optimizer, optimizer.relevant_count(number)

        sent, *averages, old = (torch.from_numpy(vector.copy()).to(device) for vector in (gradient, *slots, weights))
        sent = sent.view(torch.bfloat16) if kind == "bfloat16" else sent
        new = torch.full_like(old, torch.nan)
        squares = torch.full((module.blocks(SIZE),), torch.nan, dtype=torch.float64, device=device)
        with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns where a kernel clips
            module.update(sent, divisor, averages, old, new, squares, *arguments)

        new_weights = np.full_like(weights, np.nan)
        total = cpu.update(gradient, divisor, slots, weights, new_weights, *arguments)
        names = ["weights", *(slot.name for slot in optimizer.slots)]
        for name, vector, made in zip(names, (new_weights, *slots), (new, *averages), strict=True):
            np.testing.assert_array_equal(made.cpu().numpy().view(np.uint32), vector.view(np.uint32), err_msg=name)
        np.testing.assert_array_equal(old.cpu().numpy(), weights)
        np.testing.assert_allclose(squares.sum().item(), total, rtol=1e-12)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.ones(6), ValueError),
        (torch.ones(5, device="meta"), ValueError),
        (torch.ones(5, dtype=torch.float64), TypeError),
        (torch.ones(5, dtype=torch.int16), TypeError),
        (torch.ones(10)[::2], TypeError),
        (torch.ones(5, 1), TypeError),
    ],
)
def test_wrong_tensors_are_refused(place: int, wrong: torch.Tensor, error: type[Exception]) -> None:
    tensors = [torch.full((5,), 2.0) for _ in range(5)]
    tensors[place] = wrong
    gradient, *slots, weights, new_weights = tensors
    squares = torch.full((1,), 2.0, dtype=torch.float64)
    with pytest.raises(error):
        cuda.update(gradient, 1, slots, weights, new_weights, squares, Adadelta(), 0)
    assert all((tensor == 2).all() for tensor in (*tensors, squares) if tensor is not wrong)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.ones(2, dtype=torch.float64), ValueError),
        (torch.ones(0, dtype=torch.float64), ValueError),
        (torch.ones(1, dtype=torch.float64, device="meta"), ValueError),
        (torch.ones(1), TypeError),
        (torch.ones(1, 1, dtype=torch.float64), TypeError),
    ],
)
def test_wrong_squares_are_refused(wrong: torch.Tensor, error: type[Exception]) -> None:
    gradient, weights, new_weights = (torch.full((5,), 2.0) for _ in range(3))
    with pytest.raises(error):
        cuda.update(gradient, 1, [], weights, new_weights, wrong, SGD(), 2)
    assert all((tensor == 2).all() for tensor in (gradient, weights, new_weights))


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_a_wrong_number_of_slots_is_refused(slots: int) -> None:
    vectors, squares = [torch.ones(5) for _ in range(3 + slots)], torch.ones(1, dtype=torch.float64)
    gradient, weights, new_weights, *averages = vectors
    with pytest.raises(ValueError, match=f"expected 2 slots, got {slots}"):
        cuda.update(gradient, 1, averages, weights, new_weights, squares, Adadelta(), 0)


@pytest.mark.gpu
@pytest.mark.deep
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_more_than_2_to_the_31_elements() -> None:
    size = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 5 * 4 * size + 2**30:
        pytest.skip("the GPU's memory does not hold five such vectors")
    gradient, square_avg, acc_delta, weights = (torch.full((size,), x, device="cuda") for x in (2.0, 0.0, 0.0, 1.0))
    new_weights = torch.full_like(weights, torch.nan)
    squares = torch.full((cuda.blocks(size),), torch.nan, dtype=torch.float64, device="cuda")
    optimizer = Adadelta(rho=0.625, eps=0.0625)
    cuda.update(gradient, 1, [square_avg, acc_delta], weights, new_weights, squares, optimizer, 0)
    for tensor, expected in ((square_avg, 1.5), (acc_delta, 0.06), (new_weights, 0.6)):
        low, high = torch.aminmax(tensor)
        assert low.item() == high.item() == pytest.approx(expected, rel=1e-6)
    assert squares.sum().item() == pytest.approx(size * 0.16, rel=1e-6)
