"""A worker in torch: the book's concise recipe with `RemoteAdadelta` in the place of `torch.optim.Adadelta`."""

import logging
from contextlib import ExitStack
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import deltaserve
from deltaserve.torch import RemoteAdadelta
from deltaserve_server.recipes.batches import Share
from deltaserve_server.recipes.data import Examples
from deltaserve_server.recipes.recipes import Seat, Weights


class TorchLearner:
    """One worker: a linear layer here, its Adadelta on the server."""

    def __init__(self, examples: Examples, seed: int, seat: Seat) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self._features = torch.from_numpy(examples.features)
        self._labels = torch.from_numpy(examples.labels).reshape(-1, 1)
        self._net = nn.Linear(self._features.shape[1], 1)
        nn.init.normal_(self._net.weight, std=0.01)
        # nn.MSELoss() of a share without examples would be NaN.
        self._loss = nn.MSELoss(reduction="sum")
        with ExitStack() as opened:
            self._optimizer = RemoteAdadelta(
                self._net.named_parameters(),
                seat.target,
                model=seat.model,
                rho=0.9,
                policy=seat.policy,
                timeout_seconds=seat.timeout_seconds,
            )
            opened.callback(self._optimizer.close)
            client = opened.enter_context(deltaserve.connect(seat.target, timeout_seconds=seat.timeout_seconds))
            self.model = client.model(seat.model)
            self.version = self._optimizer.version
            self._close = opened.pop_all().close
        # Gradients that come too late are counted, which is enough said of them.
        logging.getLogger("deltaserve").addFilter(_is_not_of_a_stale_gradient)

    @property
    def rank(self) -> int:
        """The session's rank."""
        return self._optimizer.rank

    @property
    def weights(self) -> Weights:
        """Weight and bias."""
        return {name: _array(parameter) for name, parameter in self._net.named_parameters()}

    def step(self, share: Share) -> bool:
        """The loop body that a local optimizer would have."""
        rows = torch.from_numpy(share.rows)
        self._optimizer.zero_grad()
        loss = self._loss(self._net(self._features[rows]), self._labels[rows]) / max(len(rows), 1)
        loss.backward()
        self._optimizer.step(weight=share.weight)
        result = self._optimizer.last_result
        self.version = result.version if result else self._optimizer.version
        return result is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()


def _is_not_of_a_stale_gradient(record: logging.LogRecord) -> bool:
    return not (record.name == "deltaserve" and "gradient is left out" in str(record.msg))


def _array(parameter: nn.Parameter) -> NDArray[np.float32]:
    array: NDArray[np.float32] = parameter.detach().numpy()
    return array
