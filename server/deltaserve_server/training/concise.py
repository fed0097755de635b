"""A worker in torch: the book's concise recipe with `RemoteAdadelta` in the place of `torch.optim.Adadelta`."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deltaserve.torch import RemoteAdadelta
from deltaserve_server.training.batches import Share
from deltaserve_server.training.data import Examples
from deltaserve_server.training.recipes import Seat, Weights


class TorchLearner:
    """One worker: a linear layer here, its Adadelta on the server."""

    def __init__(self, examples: Examples, seed: int, seat: Seat) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self._features = torch.from_numpy(examples.features)
        self._labels = torch.from_numpy(examples.labels).reshape(-1, 1)
        self._net = nn.Linear(self._features.shape[1], 1)
        nn.init.normal_(self._net.weight, std=0.01)
        # The sum over a share, divided by Share.divisor, is nn.MSELoss() of the batch that all workers make together.
        self._loss = nn.MSELoss(reduction="sum")
        self._optimizer = RemoteAdadelta(
            self._net.parameters(),
            seat.target,
            model=seat.model,
            rho=0.9,
            policy=seat.policy,
            timeout_seconds=seat.timeout_seconds,
        )

    @property
    def rank(self) -> int:
        """The session's rank."""
        return self._optimizer.rank

    @property
    def weights(self) -> Weights:
        """Weight and bias, in the model's order."""
        return {name: _array(parameter) for name, parameter in self._net.named_parameters()}

    def step(self, share: Share) -> None:
        """The loop body that a local optimizer would have."""
        rows = torch.from_numpy(share.rows)
        self._optimizer.zero_grad()
        loss = self._loss(self._net(self._features[rows]), self._labels[rows]) / share.divisor
        loss.backward()
        self._optimizer.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._optimizer.close()


def _array(parameter: nn.Parameter) -> NDArray[np.float32]:
    array: NDArray[np.float32] = parameter.detach().numpy()
    return array
