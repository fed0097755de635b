"""Conversion between float32 and 16-bit elements by torch, which takes a quarter of numpy's time."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaserve._common.element_types import ELEMENT_TYPES, FLOAT32, Array, ElementType, WireType

_BLOCK_ELEMENTS = (1 << 15) - 64
"""From 2**15 elements on torch uses its thread pool, whose idle threads spin for a while and slow gRPC's threads."""


def _converted_by_torch(name: WireType, dtype: torch.dtype) -> ElementType:
    def narrow(source: Array, target: NDArray[Any]) -> None:
        _copy(torch.from_numpy(source), torch.from_numpy(target.view(np.int16)).view(dtype))

    def widen(source: NDArray[Any], target: Array) -> None:
        # torch warns about read-only memory such as a received message, so it gets a copy, which is still cached.
        _copy(torch.from_numpy(source.view(np.int16).copy()).view(dtype), torch.from_numpy(target))

    return ELEMENT_TYPES[name]._replace(narrow=narrow, widen=widen)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    for to, values in zip(target.split(_BLOCK_ELEMENTS), source.split(_BLOCK_ELEMENTS), strict=True):
        to.copy_(values)


TORCH_ELEMENT_TYPES: dict[WireType, ElementType] = {
    "float32": FLOAT32,
    "bfloat16": _converted_by_torch("bfloat16", torch.bfloat16),
    "float16": _converted_by_torch("float16", torch.float16),
}
"""The element types by the name that users pass as `wire`."""
