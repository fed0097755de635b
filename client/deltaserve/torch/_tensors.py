"""Tensors as the arrays that travel."""

import torch
from torch import Tensor

from deltaserve._common.element_types import Array


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's own memory is what travels: float32, contiguous, here."""
    return tensor.device.type == "cpu" and tensor.dtype is torch.float32 and tensor.is_contiguous()


def own_memory(tensor: Tensor) -> Array:
    """Returns the memory of a plain tensor."""
    array: Array = tensor.detach().numpy()
    return array


def to_host(tensor: Tensor) -> Array:
    """Returns a tensor as a contiguous float32 array, its own memory where it is one already."""
    array: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def gradient_of(param: Tensor) -> Array | None:
    """Returns a parameter's gradient as `to_host` does; None where it has none.

    Raises:
        RuntimeError: It is sparse.
    """
    if param.grad is None:
        return None
    if param.grad.is_sparse:
        raise RuntimeError("Adadelta does not support sparse gradients")
    return to_host(param.grad)
