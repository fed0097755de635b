"""Recipes whose gradients are computed in numpy, and their worker."""

from abc import abstractmethod
from contextlib import ExitStack
from typing import Self

import deltaserve
from deltaserve_server.recipes.batches import Rows, WorkerBatch
from deltaserve_server.recipes.recipe import JoinOptions, Learner, Recipe, Vector, Weights


class NumpyRecipe(Recipe):
    """A recipe whose gradients are computed in numpy."""

    @abstractmethod
    def initial_weights(self) -> dict[str, Vector]:
        """Returns the weights with which the first worker creates the model."""

    @abstractmethod
    def gradients(self, weights: Weights, rows: Rows) -> dict[str, Vector]:
        """Returns the gradient of the mean loss over some examples, by tensor; 0 without examples."""

    def learner(self, join: JoinOptions) -> Learner:
        """Opens a session with the model, which is created if it does not exist."""
        return NumpyLearner(self, join)


class NumpyLearner:
    """A worker in numpy: all it does is `worker.step(gradients)`."""

    def __init__(self, recipe: NumpyRecipe, join: JoinOptions) -> None:
        self._recipe = recipe
        with ExitStack() as opened:  # a failure halfway closes what is open
            client = opened.enter_context(deltaserve.connect(join.target, timeout_seconds=join.timeout_seconds))
            weights = recipe.initial_weights()
            self.model = client.create_model(join.model, weights, optimizer=recipe.optimizer, policy=join.policy)
            self._worker = opened.enter_context(self.model.worker())
            self._worker.pull()  # now, because the trainer counts rounds from the version of these weights
            self._close = opened.pop_all().close

    @property
    def rank(self) -> int:
        """The session's rank."""
        return self._worker.rank

    @property
    def version(self) -> int:
        """The version of the weights."""
        return self._worker.version

    @property
    def weights(self) -> Weights:
        """The latest weights that this worker has."""
        return self._worker.weights

    def step(self, batch: WorkerBatch) -> bool:
        """Computes the gradient of a batch, pushes it and takes the new weights."""
        gradients = self._recipe.gradients(self._worker.weights, batch.rows)
        try:
            self._worker.step(gradients, weight=batch.weight)
        except deltaserve.StaleGradientError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()
