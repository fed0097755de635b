"""torch tensors as the float32 numpy arrays that the client sends and receives."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from deltaserve._common.element_types import Array


def can_view(tensor: Tensor) -> bool:
    """Whether `view` works on a tensor: it is on the CPU, float32 and contiguous."""
    return tensor.device.type == "cpu" and tensor.dtype is torch.float32 and tensor.is_contiguous()


def view(tensor: Tensor) -> Array:
    """Returns an array that shares the tensor's memory."""
    array: Array = tensor.detach().numpy()
    return array


def to_host(tensor: Tensor) -> Array:
    """Returns a tensor as a contiguous float32 array; it shares the tensor's memory where that is possible."""
    array: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def gradient_of(param: Tensor) -> Array | None:
    """Returns a parameter's gradient as a contiguous float32 array; None if it has none.

    Raises:
        RuntimeError: The gradient is sparse.
    """
    if param.grad is None:
        return None
    if param.grad.is_sparse:
        raise RuntimeError("a RemoteOptimizer does not support sparse gradients; param.grad.to_dense() makes one dense")
    return to_host(param.grad)


class WeightReceiver:
    """Provides the arrays that weights are received into, and moves the weights from there into the parameters.

    Weights go straight into the memory of a parameter where `can_view` allows it; other parameters get a buffer each.
    """

    def __init__(self) -> None:
        self._buffers: dict[Tensor, Array] = {}

    def arrays(self, params: Mapping[str, Tensor]) -> dict[str, Array]:
        """Returns the arrays to receive into, by tensor name."""
        return {name: view(param) if can_view(param) else self._buffer(param) for name, param in params.items()}

    def commit(self, params: Mapping[str, Tensor]) -> None:
        """Copies buffers into their parameters and lets autograd know that the parameters have changed."""
        for param in params.values():
            if can_view(param):
                increment_version(param)  # numpy wrote to the memory, which autograd cannot see
            else:
                param.copy_(torch.from_numpy(self._buffer(param)))

    def _buffer(self, param: Tensor) -> Array:
        if param not in self._buffers:
            self._buffers[param] = np.empty(tuple(param.shape), np.float32)
        return self._buffers[param]
