"""Element types on the wire, converted by torch, which takes a quarter of numpy's time for it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaserve._common.element_types import ELEMENT_TYPES, FLOAT32, Array, ElementType, WireType

_BLOCK = (1 << 15) - 64
"""Elements in a call: from 2**15 on torch uses threads, which then spin for a while and keep gRPC's waiting."""


def _by_torch(name: WireType, kind: torch.dtype) -> ElementType:
    def narrow(source: Array, target: NDArray[Any]) -> None:
        values, narrowed = torch.from_numpy(source), torch.from_numpy(target.view(np.int16)).view(kind)
        for to, of in zip(narrowed.split(_BLOCK), values.split(_BLOCK), strict=True):
            to.copy_(of)

    def widen(source: NDArray[Any], target: Array) -> None:
        # A copy, still in a near cache: torch warns of memory that cannot be written to.
        values, widened = torch.from_numpy(source.view(np.int16).copy()).view(kind), torch.from_numpy(target)
        for to, of in zip(widened.split(_BLOCK), values.split(_BLOCK), strict=True):
            to.copy_(of)

    return ELEMENT_TYPES[name]._replace(narrow=narrow, widen=widen)


TORCH_ELEMENT_TYPES: dict[WireType, ElementType] = {
    "float32": FLOAT32,
    "bfloat16": _by_torch("bfloat16", torch.bfloat16),
    "float16": _by_torch("float16", torch.float16),
}
"""By the name that users give."""
