"""The recipes `airfoil-scratch` and `airfoil-concise`: one linear regression, in numpy and in torch.

Data and settings are those of the chapter on optimization in "Dive into Deep Learning" (d2l.ai): each optimizer has the
settings of its section. AdamW is not in the book; it has Adam's. The book adds the eps of Adagrad and RMSprop under the
root, the server adds it to the root, as torch does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltaserve import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from deltaserve_server.recipes import linear
from deltaserve_server.recipes.batches import Rows
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import JoinOptions, Learner, Recipe, Vector, Weights

SCRATCH = {
    "adadelta": Adadelta(rho=0.9, eps=1e-5),
    "sgd": SGD(lr=0.05),
    "momentum": SGD(lr=0.005, momentum=0.9),
    "adagrad": Adagrad(lr=0.1, eps=1e-6),
    "rmsprop": RMSprop(lr=0.01, alpha=0.9, eps=1e-6),
    "adam": Adam(lr=0.01, eps=1e-6),
    "adamw": AdamW(lr=0.01, eps=1e-6),
}
CONCISE = {
    "adadelta": Adadelta(rho=0.9),
    "sgd": SGD(lr=0.01),
    "momentum": SGD(lr=0.005, momentum=0.9),
    "adagrad": Adagrad(lr=0.1),
    "rmsprop": RMSprop(lr=0.01, alpha=0.9),
    "adam": Adam(lr=0.01),
    "adamw": AdamW(lr=0.01),
}


@dataclass(frozen=True, kw_only=True)
class AirfoilScratch(NumpyRecipe):
    """The regression from scratch: half the squared error, 2 epochs."""

    optimizers: ClassVar[Mapping[str, Optimizer]] = SCRATCH

    name: str = "airfoil-scratch"
    epochs: int = 2
    batch_size: int = 10
    optimizer: Optimizer = SCRATCH["adadelta"]
    evaluate_every: int | None = 200

    def initial_weights(self) -> dict[str, Vector]:
        """Draws the initial weights from the seed."""
        return linear.initial_weights(inputs=self.train.features.shape[1], seed=self.seed)

    def gradients(self, weights: Weights, rows: Rows) -> dict[str, Vector]:
        """Returns the gradient of half the mean squared error."""
        return linear.gradients(weights["w"], weights["b"], self.train.features[rows], self.train.labels[rows])

    def loss(self, weights: Weights) -> float:
        """Returns half the mean squared error over the training examples."""
        return linear.loss(weights["w"], weights["b"], self.train.features, self.train.labels)


@dataclass(frozen=True, kw_only=True)
class AirfoilConcise(Recipe):
    """The regression with torch's `nn.Linear` and `nn.MSELoss`: 4 epochs."""

    optimizers: ClassVar[Mapping[str, Optimizer]] = CONCISE

    name: str = "airfoil-concise"
    epochs: int = 4
    batch_size: int = 10
    optimizer: Optimizer = CONCISE["adadelta"]
    evaluate_every: int | None = 200

    def learner(self, join: JoinOptions) -> Learner:
        """Opens a session with the model, which is created if it does not exist."""
        from deltaserve_server.recipes.torch_learner import TorchLearner  # torch is an optional dependency

        return TorchLearner(self.train, self.optimizer, self.seed, join)

    def loss(self, weights: Weights) -> float:
        """Returns half the mean squared error: torch's loss lacks the factor 1/2, and the book reports half of it."""
        return linear.loss(weights["weight"].reshape(-1, 1), weights["bias"], self.train.features, self.train.labels)
