"""The recipes `airfoil-scratch` and `airfoil-concise`: one linear regression, in numpy and in torch.

Data and settings are those of the section on Adadelta in "Dive into Deep Learning" (d2l.ai).
"""

from dataclasses import dataclass

import deltaserve
from deltaserve_server.recipes import linear
from deltaserve_server.recipes.batches import Rows
from deltaserve_server.recipes.numpy_learner import NumpyRecipe
from deltaserve_server.recipes.recipe import JoinOptions, Learner, Recipe, Vector, Weights


@dataclass(frozen=True, kw_only=True)
class AirfoilScratch(NumpyRecipe):
    """The regression from scratch: half the squared error, rho 0.9, eps 1e-5, 2 epochs."""

    name: str = "airfoil-scratch"
    epochs: int = 2
    batch_size: int = 10
    evaluate_every: int | None = 200

    def initial_weights(self) -> dict[str, Vector]:
        """Draws the initial weights from the seed."""
        return linear.initial_weights(inputs=self.train.features.shape[1], seed=self.seed)

    def hyperparameters(self) -> deltaserve.Hyperparameters:
        """Returns the hyperparameters of the book."""
        return deltaserve.Hyperparameters(lr=1.0, rho=0.9, eps=1e-5)

    def gradients(self, weights: Weights, rows: Rows) -> dict[str, Vector]:
        """Returns the gradient of half the mean squared error."""
        return linear.gradients(weights["w"], weights["b"], self.train.features[rows], self.train.labels[rows])

    def loss(self, weights: Weights) -> float:
        """Returns half the mean squared error over the training examples."""
        return linear.loss(weights["w"], weights["b"], self.train.features, self.train.labels)


@dataclass(frozen=True, kw_only=True)
class AirfoilConcise(Recipe):
    """The regression with torch's `nn.Linear` and `nn.MSELoss`: Adadelta's defaults, 4 epochs."""

    name: str = "airfoil-concise"
    epochs: int = 4
    batch_size: int = 10
    evaluate_every: int | None = 200

    def learner(self, join: JoinOptions) -> Learner:
        """Opens a session with the model, which is created if it does not exist."""
        from deltaserve_server.recipes.torch_learner import TorchLearner  # torch is an optional dependency

        return TorchLearner(self.train, self.seed, join)

    def loss(self, weights: Weights) -> float:
        """Returns half the mean squared error: torch's loss lacks the factor 1/2, and the book reports half of it."""
        return linear.loss(weights["weight"].reshape(-1, 1), weights["bias"], self.train.features, self.train.labels)
