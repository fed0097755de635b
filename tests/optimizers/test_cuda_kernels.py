"""The code that Triton generates for the kernel, and its checks. The conformance suite tests its results."""

import functools
import re
from typing import Any

import pytest
import torch

from deltaserve_server.optimizers import Hyperparameters

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")
pytest.importorskip("triton.backends.nvidia.compiler", reason="this Triton has no compiler for NVIDIA GPUs")

from deltaserve_server.optimizers import cuda  # noqa: E402


@functools.cache
def compiled(architecture: int, gradient: str = "fp32") -> dict[str, str]:
    """Compiles the kernel for an architecture, which needs no GPU, and returns its code by stage."""
    names = cuda._update_range.arg_names
    types = dict.fromkeys(names[:5], "*fp32") | {"squares": "*fp64"} | dict.fromkeys(names[6:], "fp32")
    types["gradient"] = f"*{gradient}"
    source = triton.compiler.ASTSource(
        fn=cuda._update_range,
        signature={**types, "size": "i64", "block": "constexpr"},
        constexprs={"block": cuda._BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(7)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    asm: dict[str, str] = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm
    return asm


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_code_rounds_as_in_ieee_754_and_moves_16_bytes_at_a_time(architecture: int) -> None:
    code = compiled(architecture)["ptx"]
    counts = {
        instruction: len(re.findall(rf"\s{re.escape(instruction)}\s", code))
        for instruction in ("sqrt.rn.f32", "div.rn.f32", "fma.rn.f32", "ld.global.v4.b32", "st.global.v4.b32")
    }
    each = cuda._BLOCK // (4 * 32)
    assert counts == {
        "sqrt.rn.f32": 2 * each,
        "div.rn.f32": 2 * each,
        "fma.rn.f32": 4 * each,
        "ld.global.v4.b32": 4 * each // 4,
        "st.global.v4.b32": 3 * each // 4,
    }
    assert "ftz" not in code
    assert "approx" not in code


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("gradient", ["fp16", "bf16"])
def test_a_gradient_of_16_bits_is_loaded_in_16_bits(architecture: int, gradient: str) -> None:
    code = compiled(architecture, gradient)["ptx"]
    loads = len(re.findall(r"\sld\.global\.v4\.b32\s", code))
    each = cuda._BLOCK // (4 * 32)
    assert loads == 3 * each // 4 + each // 8  # 16 bytes hold 8 values
    assert len(re.findall(r"\sdiv\.rn\.f32\s", code)) == 2 * each
    assert "ftz" not in code


@pytest.mark.parametrize("architecture", [80, 90])
def test_only_the_squares_are_in_double_precision(architecture: int) -> None:
    code = compiled(architecture)["ptx"]
    doubles = {
        instruction for line in code.splitlines() for instruction in re.findall(r"\s([a-z][\w.]*\.f64\S*)\s", line)
    }
    assert "cvt.f64.f32" in doubles
    # Only products and sums: no conversion to float32, and no product and sum with one rounding.
    assert {name.split(".")[0] for name in doubles - {"cvt.f64.f32"}} <= {"mul", "add", "mov", "selp"}
    assert "fma.rn.f64" not in code
    assert len(re.findall(r"st\.global\.b64", code)) == 1


def test_offsets_have_64_bits() -> None:
    additions = [line for line in compiled(80)["ttir"].splitlines() if "tt.addptr" in line]
    vectors = [line for line in additions if f"tensor<{cuda._BLOCK}xi64>" in line]
    assert (len(vectors), len(additions)) == (5, 6)  # the sixth is the address of the block's sum, with 32 bits


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
    squares = torch.full((1,), 2.0, dtype=torch.float64)
    arguments: list[Any] = [*(torch.full((5,), 2.0) for _ in range(5)), squares, Hyperparameters()]
    arguments[place] = wrong
    with pytest.raises(error):
        cuda.update(arguments[0], 1, *arguments[1:])
    assert all((tensor == 2).all() for tensor in arguments[:6] if tensor is not wrong)


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
    vectors = [torch.full((5,), 2.0) for _ in range(5)]
    arguments: list[Any] = [*vectors[1:], wrong, Hyperparameters()]
    with pytest.raises(error):
        cuda.update(vectors[0], 1, *arguments)
    assert all((tensor == 2).all() for tensor in vectors)


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
    hyperparameters = Hyperparameters(rho=0.625, eps=0.0625)
    cuda.update(gradient, 1, square_avg, acc_delta, weights, new_weights, squares, hyperparameters)
    for tensor, expected in ((square_avg, 1.5), (acc_delta, 0.06), (new_weights, 0.6)):
        low, high = torch.aminmax(tensor)
        assert low.item() == high.item() == pytest.approx(expected, rel=1e-6)
    assert squares.sum().item() == pytest.approx(size * 0.16, rel=1e-6)
