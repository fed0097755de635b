"""The two kinds of workers: one pushes every gradient, the other one takes local steps of torch's SGD in between."""

from functools import partial
from typing import Protocol

import torch

import deltaserve
from deltaserve import StaleGradientError, StepResult
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve.torch import RemoteAdadelta
from deltaserve_server.recipes.batches import Rows
from deltaserve_server.recipes.digits import Digits
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import Policy, Weights

TIMEOUT_SECONDS = 60.0


class Learner(Protocol):
    """One worker and its copy of the weights.

    Attributes:
        version: Version of the latest weights from the server.
        result: Result of the last push; None if the server refused it.
        pushes: Number of pushes.
    """

    version: int
    result: StepResult | None
    pushes: int

    @property
    def weights(self) -> Weights:
        """The worker's weights, which the next step overwrites."""

    def compute(self, rows: Rows) -> None:
        """Computes the gradient of a batch."""

    def step(self, weight: float) -> None:
        """Pushes the gradient and takes the new weights, or takes a local step."""

    def finish(self) -> None:
        """Pushes local steps that are not pushed yet."""

    def close(self) -> None:
        """Ends the session."""


class PlainLearner:
    """Pushes every gradient."""

    def __init__(self, recipe: NumpyRecipe, target: str, model: str, worker: str) -> None:
        self._recipe = recipe
        self._client = deltaserve.connect(target, timeout_seconds=TIMEOUT_SECONDS)
        self._worker = self._client.model(model).worker(worker)
        self._weights: Weights = self._worker.pull()
        self._gradients: Weights = {}
        self.version = self._worker.version
        self.result: StepResult | None = None
        self.pushes = 0

    @property
    def weights(self) -> Weights:
        """The worker's weights."""
        return self._weights

    def compute(self, rows: Rows) -> None:
        """Computes the mean gradient of a batch."""
        self._gradients = self._recipe.gradients(self._weights, rows)

    def step(self, weight: float) -> None:
        """Pushes the gradient, which is lost if the server refuses it."""
        self.pushes += 1
        try:
            self._weights = self._worker.step(self._gradients, weight=weight)
        except StaleGradientError:
            self._weights = self._worker.weights
        self.result = self._worker.last_result
        self.version = self._worker.version

    def finish(self) -> None:
        """Does nothing: every gradient was pushed."""

    def close(self) -> None:
        """Ends the session."""
        self._worker.close()
        self._client.close()


class LocalLearner:
    """Pushes the result of every `local_steps` steps of SGD, with `RemoteAdadelta`; the recipe has Adadelta."""

    def __init__(
        self,
        recipe: NumpyRecipe,
        target: str,
        model: str,
        worker: str,
        policy: Policy,
        local_steps: int,
        local_lr: float,
    ) -> None:
        self._features = torch.from_numpy(recipe.train.features)
        self._labels = torch.from_numpy(recipe.train.labels)
        self._classes = isinstance(recipe, Digits)
        self._params = {
            name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in recipe.initial_weights().items()
        }
        self._optimizer = RemoteAdadelta(
            self._params.items(),
            target,
            model=model,
            policy=policy,
            worker=worker,
            local_steps=local_steps,
            local_optimizer=partial(torch.optim.SGD, lr=local_lr),
            timeout_seconds=TIMEOUT_SECONDS,
            **{name: getattr(recipe.optimizer, name) for name in hyperparameters(recipe.optimizer)},
        )
        self.version = 0
        self.result: StepResult | None = None
        self.pushes = 0

    @property
    def weights(self) -> Weights:
        """The parameters, which equal the model's weights only directly after a push."""
        return {name: param.detach().numpy() for name, param in self._params.items()}

    def compute(self, rows: Rows) -> None:
        """Computes the gradient of the mean loss of a batch."""
        chosen = torch.from_numpy(rows)
        self._optimizer.zero_grad()
        self._loss(self._features[chosen], self._labels[chosen]).backward()

    def step(self, weight: float) -> None:
        """Takes a local step, and pushes if it completes a group of local steps."""
        self._optimizer.step(weight=weight)
        self._count()

    def finish(self) -> None:
        """Pushes the last local steps, an incomplete group."""
        self._optimizer.flush()
        self._count()

    def close(self) -> None:
        """Ends the session."""
        self._optimizer.close()

    def _count(self) -> None:
        latest = self._optimizer.last_result
        if latest is not None and latest is not self.result:
            self.pushes += 1
            self.version = latest.version
            self.result = latest

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the loss of the recipe, computed in torch."""
        params = self._params
        if not self._classes:
            return ((x @ params["w"] + params["b"]).ravel() - y).square().mean() / 2
        hidden = torch.relu(x @ params["hidden.weight"] + params["hidden.bias"])
        scores = hidden @ params["output.weight"] + params["output.bias"]
        return torch.nn.functional.cross_entropy(scores, y)
