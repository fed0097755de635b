"""The recipes: what is learned, from which examples, and how one worker's step goes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

import deltaserve
from deltaserve_server.recipes import linear, network
from deltaserve_server.recipes.batches import Share
from deltaserve_server.recipes.data import Examples

Vector = NDArray[np.float32]
Weights = Mapping[str, Vector]
Policy = deltaserve.Sync | deltaserve.Async | deltaserve.Bounded


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker works.

    Attributes:
        target: The server, `host:port`.
        model: The model's name.
        policy: The policy that the model has or is created with.
        timeout_seconds: How long a call may take, with all its retries.
    """

    target: str
    model: str
    policy: Policy
    timeout_seconds: float


class Learner(AbstractContextManager["Learner"], Protocol):
    """One worker's session with the model, and its own copy of the weights."""

    model: deltaserve.Model

    @property
    def rank(self) -> int:
        """The session's rank."""

    @property
    def version(self) -> int:
        """The version that the weights are of."""

    @property
    def weights(self) -> Weights:
        """The newest weights this worker has."""

    def step(self, share: Share) -> bool:
        """Computes the gradient on a share of a batch, pushes it and takes the new weights.

        Returns:
            Whether the gradient counts; False where it came too late.

        Raises:
            deltaserve.Error: As `deltaserve.Worker.step` raises it.
        """


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """What is learned. Picklable, so that it can travel to a worker's process with its examples.

    Attributes:
        train: The examples to learn from.
        name: The default name of the model.
        epochs: Passes over the examples.
        batch_size: Examples a worker takes at a step.
        evaluate_every: The loss is measured whenever so many more examples have been seen; None means once an epoch.
        seed: For the initial weights and the order of the examples.
    """

    train: Examples
    name: str
    epochs: int
    batch_size: int
    evaluate_every: int | None = None
    seed: int = 0

    @abstractmethod
    def learner(self, seat: Seat) -> Learner:
        """Opens a session: creates the model or joins it."""

    @abstractmethod
    def loss(self, weights: Weights) -> float:
        """Returns the loss over all training examples."""

    def accuracy(self, weights: Weights) -> float | None:
        """Returns the share of test examples that is right; None where there are no test examples."""
        return None


class NumpyRecipe(Recipe):
    """A recipe whose gradients are computed in numpy."""

    @abstractmethod
    def initial_weights(self) -> dict[str, Vector]:
        """Returns the weights that the first worker creates the model with."""

    @abstractmethod
    def hyperparameters(self) -> deltaserve.Hyperparameters:
        """Returns Adadelta's."""

    @abstractmethod
    def gradients(self, weights: Weights, share: Share) -> dict[str, Vector]:
        """Returns the gradient of the mean loss over a share, by tensor; 0 where the share is empty."""

    def learner(self, seat: Seat) -> Learner:
        """Opens a session."""
        return NumpyLearner(self, seat)


class NumpyLearner:
    """A worker in numpy: `worker.step(gradients)` is all it does."""

    def __init__(self, recipe: NumpyRecipe, seat: Seat) -> None:
        self._recipe = recipe
        with ExitStack() as opened:
            client = opened.enter_context(deltaserve.connect(seat.target, timeout_seconds=seat.timeout_seconds))
            settings = asdict(recipe.hyperparameters())
            self.model = client.create_model(seat.model, recipe.initial_weights(), policy=seat.policy, **settings)
            self._worker = opened.enter_context(self.model.worker())
            self._worker.pull()
            self._close = opened.pop_all().close

    @property
    def rank(self) -> int:
        """The session's rank."""
        return self._worker.rank

    @property
    def version(self) -> int:
        """The version that the weights are of."""
        return self._worker.version

    @property
    def weights(self) -> Weights:
        """The newest weights this worker has."""
        return self._worker.weights

    def step(self, share: Share) -> bool:
        """Computes, pushes, takes the new weights."""
        gradients = self._recipe.gradients(self._worker.weights, share)
        try:
            self._worker.step(gradients, weight=share.weight)
        except deltaserve.StaleGradientError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()


@dataclass(frozen=True, kw_only=True)
class Digits(NumpyRecipe):
    """Handwritten digits and a network with one hidden layer, all in numpy."""

    test: Examples
    name: str = "digits"
    epochs: int = 20
    batch_size: int = 8
    hidden: int = 256

    def initial_weights(self) -> dict[str, Vector]:
        """Draws them from the seed."""
        return network.initial_weights(inputs=64, hidden=self.hidden, classes=10, seed=self.seed)

    def hyperparameters(self) -> deltaserve.Hyperparameters:
        """Returns the defaults but for a longer memory: a rare hard example then makes a smaller jump."""
        return deltaserve.Hyperparameters(rho=0.95)

    def gradients(self, weights: Weights, share: Share) -> dict[str, Vector]:
        """Differentiates the cross-entropy."""
        x, y = self.train.features[share.rows], self.train.labels[share.rows]
        return network.gradients(weights, x, y)

    def loss(self, weights: Weights) -> float:
        """Returns the mean cross-entropy over the training examples."""
        return network.loss(weights, self.train.features, self.train.labels)

    def accuracy(self, weights: Weights) -> float | None:
        """Returns the share of test examples that is right."""
        return network.accuracy(weights, self.test.features, self.test.labels)


@dataclass(frozen=True, kw_only=True)
class AirfoilScratch(NumpyRecipe):
    """Linear regression from scratch, as in the book: half the squared error, rho 0.9, eps 1e-5, 2 epochs."""

    name: str = "airfoil-scratch"
    epochs: int = 2
    batch_size: int = 10
    evaluate_every: int | None = 200

    def initial_weights(self) -> dict[str, Vector]:
        """Draws them from the seed."""
        return linear.initial_weights(inputs=self.train.features.shape[1], seed=self.seed)

    def hyperparameters(self) -> deltaserve.Hyperparameters:
        """Returns the book's."""
        return deltaserve.Hyperparameters(lr=1.0, rho=0.9, eps=1e-5)

    def gradients(self, weights: Weights, share: Share) -> dict[str, Vector]:
        """Differentiates half the squared error."""
        x, y = self.train.features[share.rows], self.train.labels[share.rows]
        return linear.gradients(weights["w"], weights["b"], x, y)

    def loss(self, weights: Weights) -> float:
        """Returns half the mean squared error over the training examples."""
        return linear.loss(weights["w"], weights["b"], self.train.features, self.train.labels)


@dataclass(frozen=True, kw_only=True)
class AirfoilConcise(Recipe):
    """The same regression with torch's own parts: `nn.Linear`, `nn.MSELoss`, Adadelta's defaults, 4 epochs."""

    name: str = "airfoil-concise"
    epochs: int = 4
    batch_size: int = 10
    evaluate_every: int | None = 200

    def learner(self, seat: Seat) -> Learner:
        """Opens a session."""
        from deltaserve_server.recipes.concise import TorchLearner

        return TorchLearner(self.train, self.seed, seat)

    def loss(self, weights: Weights) -> float:
        """Returns half the mean squared error: torch's loss has no 1/2, the book halves what it reports."""
        return linear.loss(weights["weight"].reshape(-1, 1), weights["bias"], self.train.features, self.train.labels)
