"""The optimizers in Triton, float32, for torch tensors: one fused pass over a range, limited by memory.

The arithmetic is that of `cpu`, operation for operation, and gives the same bits. `cpu` explains the steps that all
optimizers share.
"""

import linecache
from collections.abc import Sequence
from typing import Any

import torch

from deltaserve._common.optimizers import Optimizer
from deltaserve_server.optimizers import triton_source
from deltaserve_server.optimizers.trace import kernel_numbers

_FORMATS = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 1024

_kernels: dict[tuple[object, ...], Any] = {}
"""The kernels that exist, by structure. Triton compiles one when it first runs."""


def blocks(size: int) -> int:
    """Returns the number of sums of squares that the update of a range of `size` elements writes."""
    return -(-size // _BLOCK)


def update(
    gradient: torch.Tensor,
    divisor: float,
    slots: Sequence[torch.Tensor],
    weights: torch.Tensor,
    new_weights: torch.Tensor,
    squares: torch.Tensor,
    optimizer: Optimizer,
    count: int,
) -> None:
    """Queues one update of a range on the tensors' device, in its current stream.

    If the weights are finite, the slots stay finite for any gradient and hyperparameters. Denormal numbers are not
    flushed to zero.

    Args:
        gradient: As for `cpu.update`, float32, float16 or bfloat16 [n]. Like every tensor here, it is contiguous.
        divisor: As for `cpu.update`.
        slots: The optimizer's state, float32 [n] each, in the order of `optimizer.slots`; updated in place.
        weights: The parameters, float32 [n]; read only.
        new_weights: Output, the new parameters, float32 [n].
        squares: Output, the sum of (new_weights - weights)**2 for each block of the range, float64 [blocks(n)], with
            differences in float32 and squares and sums in float64. The order of additions is not that of `cpu`.
        optimizer: An optimizer whose `problem()` is None.
        count: As for `cpu.update`.

    Raises:
        ValueError: The lengths, the devices, or the number of slots differ.
        TypeError: A tensor has another type, or is not a contiguous vector.
    """
    if len(slots) != len(optimizer.slots):
        raise ValueError(f"expected {len(optimizer.slots)} slots, got {len(slots)}")
    tensors = (gradient, *slots, weights, new_weights)
    _check(tensors, squares)
    if gradient.numel() == 0:
        return
    with torch.cuda.device(gradient.get_device()):
        kernel(optimizer)[(blocks(gradient.numel()),)](
            *tensors,
            squares,
            gradient.numel(),
            float(-divisor if optimizer.maximize else divisor),
            *kernel_numbers(optimizer, count),
            block=_BLOCK,
            enable_fp_fusion=False,
        )


def kernel(optimizer: Optimizer) -> Any:
    """Returns the Triton function of an optimizer's structure, which is not compiled yet."""
    made = _kernels.get(optimizer.structure)
    return made or _kernels.setdefault(optimizer.structure, _kernel(optimizer))


def _kernel(optimizer: Optimizer) -> Any:
    text = triton_source.source(optimizer)
    path = f"<{' '.join(map(str, optimizer.structure))}>"
    # Triton compiles a function from its source, which Python looks up here.
    linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
    module: dict[str, Any] = {"__name__": path}
    exec(compile(text, path, "exec"), module)  # noqa: S102, the text is that of a definition of ours
    return module[triton_source.name(optimizer)]


def _check(tensors: tuple[torch.Tensor, ...], squares: torch.Tensor) -> None:
    allowed = [
        *((tensor, (torch.float32,)) for tensor in tensors[1:]),
        (tensors[0], _FORMATS),
        (squares, (torch.float64,)),
    ]
    if any(tensor.dtype not in dtypes or tensor.dim() != 1 or not tensor.is_contiguous() for tensor, dtypes in allowed):
        raise TypeError(
            "expected contiguous vectors: a gradient of float32, float16 or bfloat16, float64 squares, else float32"
        )
    if len({tensor.numel() for tensor in tensors}) != 1:
        raise ValueError(f"expected vectors of one length, got lengths {[tensor.numel() for tensor in tensors]}")
    if squares.numel() != blocks(tensors[0].numel()):
        raise ValueError(f"expected {blocks(tensors[0].numel())} squares, got {squares.numel()}")
    if len({tensor.device for tensor, _ in allowed}) != 1:
        raise ValueError(f"expected one device, got {sorted({str(tensor.device) for tensor, _ in allowed})}")
