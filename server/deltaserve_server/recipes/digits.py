"""The recipe `digits`: handwritten digits and a network with one hidden layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltaserve import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from deltaserve_server.recipes import network
from deltaserve_server.recipes.batches import Rows
from deltaserve_server.recipes.data import Examples
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import Vector, Weights

OPTIMIZERS = {
    "adadelta": Adadelta(rho=0.95),  # slower averages than the default: a rare hard example causes a smaller jump
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.01, momentum=0.9),
    "adagrad": Adagrad(lr=0.02),
    "rmsprop": RMSprop(lr=1e-3),
    "adam": Adam(lr=2e-3),
    "adamw": AdamW(lr=2e-3),
}


@dataclass(frozen=True, kw_only=True)
class Digits(NumpyRecipe):
    """Handwritten digits; `hidden` is the width of the hidden layer."""

    optimizers: ClassVar[Mapping[str, Optimizer]] = OPTIMIZERS

    test: Examples
    name: str = "digits"
    epochs: int = 20
    batch_size: int = 8
    optimizer: Optimizer = OPTIMIZERS["adadelta"]
    hidden: int = 256

    def initial_weights(self) -> dict[str, Vector]:
        """Draws the initial weights from the seed."""
        return network.initial_weights(inputs=64, hidden=self.hidden, classes=10, seed=self.seed)

    def gradients(self, weights: Weights, rows: Rows) -> dict[str, Vector]:
        """Returns the gradient of the mean cross-entropy."""
        return network.gradients(weights, self.train.features[rows], self.train.labels[rows])

    def loss(self, weights: Weights) -> float:
        """Returns the mean cross-entropy over the training examples."""
        return network.loss(weights, self.train.features, self.train.labels)

    def accuracy(self, weights: Weights) -> float | None:
        """Returns the fraction of test examples that are classified correctly."""
        return network.accuracy(weights, self.test.features, self.test.labels)
