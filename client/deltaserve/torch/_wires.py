"""Element types on the wire, converted by torch, which takes a quarter of numpy's time for it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaserve._types import Array
from deltaserve._wire import FLOAT32, WIRES, Wire, WireType


def _by_torch(name: WireType, kind: torch.dtype) -> Wire:
    def narrow(source: Array, target: NDArray[Any]) -> None:
        torch.from_numpy(target.view(np.int16)).view(kind).copy_(torch.from_numpy(source))

    def widen(source: NDArray[Any], target: Array) -> None:
        # A copy, still in a near cache: torch warns of memory that cannot be written to.
        torch.from_numpy(target).copy_(torch.from_numpy(source.view(np.int16).copy()).view(kind))

    return WIRES[name]._replace(narrow=narrow, widen=widen)


TORCH_WIRES: dict[WireType, Wire] = {
    "float32": FLOAT32,
    "bfloat16": _by_torch("bfloat16", torch.bfloat16),
    "float16": _by_torch("float16", torch.float16),
}
"""By the name that users give."""
