"""What a recipe is, and what its workers do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

import deltaserve
from deltaserve_server.recipes.batches import WorkerBatch
from deltaserve_server.recipes.data import Examples

Vector = NDArray[np.float32]
Weights = Mapping[str, Vector]
Policy = deltaserve.Sync | deltaserve.Async | deltaserve.Bounded


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """How a worker joins its model; the model must have the policy, or is created with it."""

    target: str
    model: str
    policy: Policy
    timeout_seconds: float


class Learner(AbstractContextManager["Learner"], Protocol):
    """A worker's session with the model, and its copy of the weights."""

    model: deltaserve.Model

    @property
    def rank(self) -> int:
        """The session's rank."""

    @property
    def version(self) -> int:
        """The version of the weights."""

    @property
    def weights(self) -> Weights:
        """The latest weights that this worker has."""

    def step(self, batch: WorkerBatch) -> bool:
        """Computes the gradient of a batch, pushes it and takes the new weights.

        Returns:
            Whether the server applied the gradient; False if it arrived too late.

        Raises:
            deltaserve.Error: As `deltaserve.Worker.step` raises it.
        """


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Data, network and settings of a training run. Picklable, because it is sent to the workers' processes.

    Attributes:
        train: The training examples.
        name: The model's name, unless the user chooses another.
        epochs: Passes over the examples.
        batch_size: Examples of one worker in one step.
        optimizer: The optimizer and its hyperparameters.
        evaluate_every: Number of examples between two measurements of the loss; None means an epoch.
        seed: Decides the initial weights and the order of the examples.
        optimizers: Hyperparameters that suit the recipe, by the optimizer's name on the command line.
    """

    optimizers: ClassVar[Mapping[str, deltaserve.Optimizer]]

    train: Examples
    name: str
    epochs: int
    batch_size: int
    optimizer: deltaserve.Optimizer
    evaluate_every: int | None = None
    seed: int = 0

    @abstractmethod
    def learner(self, join: JoinOptions) -> Learner:
        """Opens a session with the model, which is created if it does not exist."""

    @abstractmethod
    def loss(self, weights: Weights) -> float:
        """Returns the loss over all training examples."""

    def accuracy(self, weights: Weights) -> float | None:
        """Returns the fraction of test examples that are classified correctly; None without test examples."""
        return None
