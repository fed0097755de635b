"""A worker in torch: `RemoteAdadelta` takes the place of `torch.optim.Adadelta`, and so on."""

import logging
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import nn

import deltaserve
import deltaserve.torch
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve_server.recipes.batches import WorkerBatch
from deltaserve_server.recipes.data import Examples
from deltaserve_server.recipes.recipe import JoinOptions, Weights


class TorchLearner:
    """A worker with a linear layer in this process and its optimizer on the server."""

    def __init__(self, examples: Examples, optimizer: deltaserve.Optimizer, seed: int, join: JoinOptions) -> None:
        torch.set_num_threads(1)  # the workers of a run share the machine's cores
        torch.manual_seed(seed)  # whichever worker comes first creates the model, so all draw the same weights
        self._features = torch.from_numpy(examples.features)
        self._labels = torch.from_numpy(examples.labels).reshape(-1, 1)
        self._net = nn.Linear(self._features.shape[1], 1)
        nn.init.normal_(self._net.weight, std=0.01)
        self._loss = nn.MSELoss(reduction="sum")  # the mean over an empty batch would be NaN
        with ExitStack() as opened:  # a failure halfway closes what is open
            kind = getattr(deltaserve.torch, f"Remote{type(optimizer).__name__}")
            self._optimizer: deltaserve.torch.RemoteOptimizer = kind(
                self._net.named_parameters(),
                join.target,
                model=join.model,
                **_arguments(optimizer),
                policy=join.policy,
                timeout_seconds=join.timeout_seconds,
            )
            opened.callback(self._optimizer.close)
            client = opened.enter_context(deltaserve.connect(join.target, timeout_seconds=join.timeout_seconds))
            self.model = client.model(join.model)
            self.version = self._optimizer.version
            logger = logging.getLogger("deltaserve")
            logger.addFilter(_is_worth_a_line)
            opened.callback(logger.removeFilter, _is_worth_a_line)  # the process may have other optimizers later
            self._close = opened.pop_all().close

    @property
    def rank(self) -> int:
        """The session's rank."""
        return self._optimizer.rank

    @property
    def weights(self) -> Weights:
        """Weight and bias."""
        return {name: parameter.detach().numpy() for name, parameter in self._net.named_parameters()}

    def step(self, batch: WorkerBatch) -> bool:
        """Runs the loop body that a local optimizer would have."""
        rows = torch.from_numpy(batch.rows)
        self._optimizer.zero_grad()
        loss = self._loss(self._net(self._features[rows]), self._labels[rows]) / max(len(rows), 1)
        loss.backward()
        self._optimizer.step(weight=batch.weight)
        result = self._optimizer.last_result
        self.version = result.version if result else self._optimizer.version
        return result is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()


def _arguments(optimizer: deltaserve.Optimizer) -> dict[str, Any]:
    """Returns the arguments of the torch class that has this optimizer's name."""
    arguments = {name: getattr(optimizer, name) for name in hyperparameters(optimizer)}
    if "beta1" in arguments:
        arguments["betas"] = arguments.pop("beta1"), arguments.pop("beta2")
    return arguments


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Drops the optimizer's warnings about stale gradients: the run counts them and reports the number."""
    return not (record.module == "_remote" and "gradient" in str(record.msg))
