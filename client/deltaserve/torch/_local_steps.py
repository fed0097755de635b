"""Local steps: a worker trains with an optimizer of its own and pushes how far the parameters have moved."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaserve._common.element_types import Array
from deltaserve.torch._tensors import to_host

LocalOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer from groups that have "params" alone; `functools.partial(torch.optim.SGD, lr=0.1)` is one."""


class LocalSteps:
    """The local optimizer of a worker and the distance that its steps have moved the parameters.

    Call `start` before the first step, and again each time new weights are in the parameters.

    Args:
        groups: The parameter groups of the remote optimizer; only their "params" are used.
        make: Makes the local optimizer.
        steps_per_push: How many steps make a push due.

    Attributes:
        optimizer: The local optimizer.
        weight: The summed weights of the steps since the last start.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], make: LocalOptimizer, steps_per_push: int) -> None:
        self.optimizer = make([{"params": list(group["params"])} for group in groups])
        self._steps_per_push = steps_per_push
        self._params: Mapping[str, Tensor] = {}
        self._initial: dict[str, Array] = {}
        self._reset()

    def start(self, params: Mapping[str, Tensor]) -> None:
        """Takes the current weights of `params`, all parameters by tensor name, as the start of the next push."""
        self._params = params
        # A copy, because to_host may return the parameter's own memory.
        self._initial = {name: to_host(param).copy() for name, param in params.items()}
        self._reset()

    def _reset(self) -> None:
        self._with_gradient: set[str] = set()
        self._steps = 0
        self.weight = 0.0
        self._gradient: dict[str, Array | None] | None = None

    @property
    def pending(self) -> bool:
        """Whether any steps have been made since the start."""
        return self._steps > 0

    @property
    def due(self) -> bool:
        """Whether enough steps for a push have been made."""
        return self._steps >= self._steps_per_push

    @property
    def push_unsettled(self) -> bool:
        """Whether a push of these steps was attempted, with an outcome that is not known."""
        return self._gradient is not None

    def step(self, closure: Callable[[], float] | None, weight: float) -> float | None:
        """Makes one step of the local optimizer; returns the closure's loss."""
        loss = self.optimizer.step(closure) if closure else self.optimizer.step()
        self._with_gradient |= {name for name, param in self._params.items() if param.grad is not None}
        self._steps += 1
        self.weight += weight
        return loss

    def gradient(self) -> dict[str, Array | None]:
        """Returns the start weights minus the present ones; None for a parameter that had no gradient in any step.

        Later calls return the same arrays, so that a push whose answer was lost can be repeated unchanged.
        """
        if self._gradient is None:
            self._gradient = {
                name: self._initial[name] - to_host(param) if name in self._with_gradient else None
                for name, param in self._params.items()
            }
        return self._gradient

    def undo(self) -> None:
        """Puts the start weights back into the parameters and forgets the steps."""
        for name, param in self._params.items():
            param.copy_(torch.from_numpy(self._initial[name]))
        self._reset()
