"""What is Triton's alone; that it computes the same as the others, the conformance suite shows."""

import re
from typing import Any

import pytest
import torch

from deltaserve_server.adadelta import Hyperparameters

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")
pytest.importorskip("triton.backends.nvidia.compiler", reason="this Triton has no compiler for NVIDIA GPUs")

from deltaserve_server.adadelta import cuda  # noqa: E402


def compiled(architecture: int) -> dict[str, str]:
    """Compiles the kernel, which needs no GPU."""
    names = cuda._update_range.arg_names
    types = dict.fromkeys(names[:5], "*fp32") | dict.fromkeys(names[5:], "fp32")
    source = triton.compiler.ASTSource(
        fn=cuda._update_range,
        signature={**types, "size": "i64", "block": "constexpr"},
        constexprs={"block": cuda._BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    asm: dict[str, str] = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm
    return asm


@pytest.mark.parametrize("architecture", [80, 90])
def test_generated_code_rounds_as_ieee_says_and_moves_16_bytes_at_a_time(architecture: int) -> None:
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
    assert ".f64" not in code


def test_offsets_have_64_bits() -> None:
    additions = [line for line in compiled(80)["ttir"].splitlines() if "tt.addptr" in line]
    assert len(additions) == 5
    assert all(f"tensor<{cuda._BLOCK}xi64>" in line for line in additions)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.ones(6), ValueError),
        (torch.ones(5, device="meta"), ValueError),
        (torch.ones(5, dtype=torch.float64), TypeError),
        (torch.ones(10)[::2], TypeError),
        (torch.ones(5, 1), TypeError),
    ],
)
def test_wrong_tensors_are_refused(place: int, wrong: torch.Tensor, error: type[Exception]) -> None:
    arguments: list[Any] = [*(torch.full((5,), 2.0) for _ in range(5)), Hyperparameters()]
    arguments[place] = wrong
    with pytest.raises(error):
        cuda.update(arguments[0], 1, *arguments[1:])
    assert all((tensor == 2).all() for tensor in arguments[:5] if tensor is not wrong)
