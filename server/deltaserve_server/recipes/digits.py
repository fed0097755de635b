"""The recipe `digits`: handwritten digits and a network with one hidden layer."""

from dataclasses import dataclass

import deltaserve
from deltaserve_server.recipes import network
from deltaserve_server.recipes.batches import Rows
from deltaserve_server.recipes.data import Examples
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import Vector, Weights


@dataclass(frozen=True, kw_only=True)
class Digits(NumpyRecipe):
    """Handwritten digits; `hidden` is the width of the hidden layer."""

    test: Examples
    name: str = "digits"
    epochs: int = 20
    batch_size: int = 8
    hidden: int = 256

    def initial_weights(self) -> dict[str, Vector]:
        """Draws the initial weights from the seed."""
        return network.initial_weights(inputs=64, hidden=self.hidden, classes=10, seed=self.seed)

    def hyperparameters(self) -> deltaserve.Hyperparameters:
        """Returns Adadelta's defaults, except for slower averages: a rare hard example then causes a smaller jump."""
        return deltaserve.Hyperparameters(rho=0.95)

    def gradients(self, weights: Weights, rows: Rows) -> dict[str, Vector]:
        """Returns the gradient of the mean cross-entropy."""
        return network.gradients(weights, self.train.features[rows], self.train.labels[rows])

    def loss(self, weights: Weights) -> float:
        """Returns the mean cross-entropy over the training examples."""
        return network.loss(weights, self.train.features, self.train.labels)

    def accuracy(self, weights: Weights) -> float | None:
        """Returns the fraction of test examples that are classified correctly."""
        return network.accuracy(weights, self.test.features, self.test.labels)
