"""Adadelta in Triton, float32, for torch tensors: one fused pass of 28 bytes an element, limited by memory.

The arithmetic is that of `cpu`, operation for operation, and gives the same bits. `cpu` explains each step.
"""

import torch
import triton
import triton.language as tl

from deltaserve_server.optimizers.hyperparameters import FLOAT32_MAX, MAGNITUDE_MAX, Hyperparameters, scalars

_FLOAT32_MIN, _FLOAT32_MAX = tl.constexpr(-FLOAT32_MAX), tl.constexpr(FLOAT32_MAX)
_MAGNITUDE_MIN, _MAGNITUDE_MAX = tl.constexpr(-MAGNITUDE_MAX), tl.constexpr(MAGNITUDE_MAX)
_FORMATS = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 1024


def blocks(size: int) -> int:
    """Returns the number of sums of squares that the update of a range of `size` elements writes."""
    return -(-size // _BLOCK)


def update(
    gradient: torch.Tensor,
    divisor: float,
    square_avg: torch.Tensor,
    acc_delta: torch.Tensor,
    weights: torch.Tensor,
    new_weights: torch.Tensor,
    squares: torch.Tensor,
    hyperparameters: Hyperparameters,
) -> None:
    """Queues one update of a range on the tensors' device, in its current stream.

    If the weights are finite, the averages stay finite for any gradient and hyperparameters. The weights stay finite as
    long as their sum with lr times `MAGNITUDE_MAX` is finite. Denormal numbers are not flushed to zero.

    Args:
        gradient: As for `cpu.update`, float32, float16 or bfloat16 [n]. Like every tensor here, it is contiguous.
        divisor: As for `cpu.update`.
        square_avg: As for `cpu.update`, like the vectors that follow.
        acc_delta: Updated in place, as is `square_avg`.
        weights: Read only.
        new_weights: Output, the new parameters.
        squares: Output, the sum of (new_weights - weights)**2 for each block of the range, float64 [blocks(n)], with
            differences in float32 and squares and sums in float64. The order of additions is not that of `cpu`.
        hyperparameters: Hyperparameters in range, whose `problem()` is None.

    Raises:
        ValueError: The lengths or the devices differ.
        TypeError: A tensor has another type, or is not a contiguous vector.
    """
    tensors = (gradient, square_avg, acc_delta, weights, new_weights)
    _check(tensors, squares)
    if gradient.numel() == 0:
        return
    with torch.cuda.device(gradient.get_device()):
        _update_range[(blocks(gradient.numel()),)](
            *tensors,
            squares,
            gradient.numel(),
            float(divisor),
            *scalars(hyperparameters),
            block=_BLOCK,
            enable_fp_fusion=False,
        )


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
        raise ValueError(f"expected five vectors of one length, got lengths {[tensor.numel() for tensor in tensors]}")
    if squares.numel() != blocks(tensors[0].numel()):
        raise ValueError(f"expected {blocks(tensors[0].numel())} squares, got {squares.numel()}")
    if len({tensor.device for tensor, _ in allowed}) != 1:
        raise ValueError(f"expected one device, got {sorted({str(tensor.device) for tensor, _ in allowed})}")


@triton.jit
def _at_most(limit, value):  # type: ignore[no-untyped-def]
    return tl.where(value > limit, limit, value)


@triton.jit
def _bounded(value):  # type: ignore[no-untyped-def]
    # A constant for the lower limit: some releases of Triton compile -x as 0 - x, which loses the sign of a zero.
    return tl.where(value < _MAGNITUDE_MIN, _MAGNITUDE_MIN, _at_most(_MAGNITUDE_MAX, value))


@triton.jit  # type: ignore[untyped-decorator]
def _update_range(  # type: ignore[no-untyped-def]
    gradient, square_avg, acc_delta, weights, new_weights, squares, size, divisor,
    minus_lr, rho, one_minus_rho, eps, weight_decay, sign, block: tl.constexpr,
):  # fmt: skip
    # Offsets need 64 bits: a model may have more than 2**31 elements.
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < size
    w = tl.load(weights + i, inside)
    acc = tl.load(acc_delta + i, inside)
    g = sign * tl.div_rn(tl.load(gradient + i, inside).to(tl.float32), divisor)
    g = tl.where(g == g, g, 0.0)
    if weight_decay != 0:
        g = tl.fma(weight_decay, w, g)
    g = _bounded(g)
    s = tl.fma(one_minus_rho * g, g, tl.load(square_avg + i, inside) * rho)
    rate = _at_most(_FLOAT32_MAX, tl.div_rn(tl.sqrt_rn(acc + eps), tl.sqrt_rn(_at_most(_FLOAT32_MAX, s + eps))))
    step = _bounded(rate * g)
    tl.store(square_avg + i, s, inside)
    tl.store(acc_delta + i, tl.fma(one_minus_rho * step, step, acc * rho), inside)
    new = _at_most(_FLOAT32_MAX, tl.fma(minus_lr, step, w))
    new = tl.where(new < _FLOAT32_MIN, _FLOAT32_MIN, new)
    tl.store(new_weights + i, new, inside)
    change = tl.where(inside, new - w, 0.0).to(tl.float64)
    tl.store(squares + tl.program_id(0), tl.sum(change * change, 0))
