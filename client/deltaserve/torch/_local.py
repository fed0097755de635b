"""Steps of a worker's own optimizer, whose difference is pushed."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from deltaserve._common.element_types import Array
from deltaserve._errors import RequestError
from deltaserve.torch._tensors import to_host

if TYPE_CHECKING:
    from deltaserve.torch._remote import RemoteAdadelta

_log = logging.getLogger("deltaserve")

LocalOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer of parameter groups, each of its "params" alone; as `torch.optim.SGD` with its lr given does."""


class LocalSteps:
    """Steps of a worker's own optimizer, and the difference that they make.

    Args:
        remote: What pushes it.
        make: Makes the optimizer.
        count: How many steps make one push.
    """

    def __init__(self, remote: "RemoteAdadelta", make: LocalOptimizer, count: int) -> None:
        self.optimizer = make([{"params": list(group["params"])} for group in remote.param_groups])
        self._remote = remote
        self._count = count
        self._pushed: dict[str, Array | None] | None = None
        self.begin()

    def begin(self) -> None:
        """Counts from the present weights on."""
        self._base = {name: to_host(param).copy() for name, param in self._remote._named()}
        self._moved: set[str] = set()
        self._done = 0
        self._weight = 0.0
        self._pushed = None

    def step(self, closure: Callable[[], float] | None, weight: float) -> float | None:
        """Makes a local step, and pushes after the last."""
        if self._pushed:  # what became of it is not known: until it is, no further step is made
            self.push()
            if closure is None:
                _log.warning("a gradient is left out: it is of weights from before a push that had to be settled first")
                return None
        loss = self.optimizer.step(closure) if closure else self.optimizer.step()
        self._moved |= {name for name, param in self._remote._named() if param.grad is not None}
        self._done += 1
        self._weight += weight
        if self._done >= self._count:
            self.push()
        return loss

    def push(self) -> None:
        """Pushes the difference; a call that raised is made good by the next, which pushes the same.

        Raises:
            RequestError: The server refuses it for good; the parameters are as they were before the local steps.
            Error: As from `RemoteAdadelta.step`.
        """
        if not self._done:
            return
        if self._pushed is None:
            self._pushed = {
                name: self._base[name] - to_host(param) if name in self._moved else None
                for name, param in self._remote._named()
            }
        try:
            self._remote._exchange(self._pushed, self._weight)
        except RequestError:  # as where the local steps have led to infinity
            for name, param in self._remote._named():
                param.copy_(torch.from_numpy(self._base[name]))
            self.begin()
            raise
