"""Corrects the interpreter of Triton so that its results have the bits of compiled code.

Up to release 3.8 the interpreter rounds a fused multiply-add twice, treats a denormal Python float as a float64, and
converts denormal bfloat16 wrongly. It also interprets functions of Triton's own library, such as `tl.sum`, only if the
environment asked for it before Triton was imported.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

from deltaserve._common.optimizers import Optimizer


@functools.cache
def cuda() -> ModuleType:
    """Returns a second copy of the module `cuda` whose kernels the interpreter runs, on CPU tensors."""
    spec = importlib.util.find_spec("deltaserve_server.optimizers.cuda")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = module._kernel

    def make_interpreted(optimizer: Optimizer) -> Any:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            return make(optimizer)

    module._kernel = make_interpreted  # type: ignore[attr-defined]
    return module


def correct(patch: pytest.MonkeyPatch) -> None:
    """Replaces operations of the interpreter by exact ones, until `patch` is undone."""
    converted = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return converted(argument)

    def create_fma(_builder: Any, x: Any, y: Any, z: Any) -> Any:
        return interpreter.TensorHandle(_fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    extended = interpreter.InterpreterBuilder.create_fp_ext

    def create_fp_ext(builder: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.bfloat16:
            return extended(builder, source, kind)
        return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), kind.scalar)

    def total(values: Any, axis: int) -> Any:
        made = np.atleast_1d(np.sum(values.handle.data, axis))
        return tl.tensor(interpreter.TensorHandle(made, values.dtype), values.dtype)

    patch.setattr(tl, "sum", total)
    patch.setattr(interpreter, "_implicit_cvt", convert)
    patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    patch.setattr(interpreter.InterpreterBuilder, "create_fp_ext", create_fp_ext)


def _fused(x: NDArray[np.float32], y: NDArray[np.float32], z: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns x * y + z, rounded once: the sum in float64 is rounded to odd, so that the final rounding is correct."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    with np.errstate(all="ignore"):
        total = product + addend
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        even = (total.view(np.int64) & 1) == 0
        toward = np.nextafter(total, np.copysign(np.inf, error))
        return np.where(np.isfinite(total) & (error != 0) & even, toward, total).astype(np.float32)
