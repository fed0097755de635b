"""A worker's copy of a model's weights."""

from collections.abc import Mapping, Sequence

import numpy as np

from deltaserve._common.element_types import Array
from deltaserve._common.flat_vector import FlatVector
from deltaserve._errors import Error
from deltaserve._types import TensorSpec
from deltaserve.v1 import common_pb2


class ServerRestartedError(Exception):
    """An answer came from another incarnation of the server. The worker has used nothing of it."""


class LocalWeights:
    """A worker's copy of the weights: where it lies in memory, which version it is, and whether it is whole.

    Args:
        model: The model's name.
        tensors: The layout.
        position: Where the model stands, from OpenSession.

    Attributes:
        position: Where the model stood in the last answer that the worker used.
        version: The version of the weights; None before the first pull.
        torn: Whether an answer broke off while it was written: the weights are of two versions.
        newest: The newest weights by tensor name, if they lie in the worker's own memory; else None.
        target: The memory that the next answer is written to.
    """

    def __init__(self, model: str, tensors: Sequence[TensorSpec], position: common_pb2.ModelPosition) -> None:
        self._model = model
        self._tensors = tensors
        self.position = position
        self.version: int | None = None
        self.torn = False
        self.newest: dict[str, Array] | None = None
        self.target = FlatVector([])

    def aim(self, out: Mapping[str, Array] | None) -> dict[str, Array]:
        """Chooses the memory that the next answer is written to, and returns it by tensor name.

        Args:
            out: C-contiguous float32 arrays by tensor name; None means the worker's own memory.

        Raises:
            ValueError: A tensor is missing, or its array has another shape, type or order.
        """
        if out is None:
            arrays = dict(self.newest or {spec.name: np.empty(spec.shape, np.float32) for spec in self._tensors})
        else:
            for name, shape in ((spec.name, spec.shape) for spec in self._tensors):
                array = out.get(name)
                if array is None:
                    raise ValueError(f"out: tensor {name} is missing")
                if array.shape != shape or array.dtype != np.dtype("<f4") or not array.flags.carray:
                    raise ValueError(
                        f"out: tensor {name} must be a writable C-contiguous float32 array of shape {shape}"
                    )
            arrays = {spec.name: out[spec.name] for spec in self._tensors}
            self.newest = None
        self.target = FlatVector(list(arrays.values()))
        return arrays

    def check(self, position: common_pb2.ModelPosition) -> None:
        """Compares where the model stands in an answer with what the worker knows.

        Raises:
            ServerRestartedError: The answer is of another incarnation of the server.
            Error: The version went back within one incarnation.
        """
        if position.incarnation != self.position.incarnation:
            raise ServerRestartedError
        if position.version < self.position.version:
            raise Error(f"model {self._model} went back from version {self.position.version} to {position.version}")

    def begin(self, position: common_pb2.ModelPosition) -> None:
        """Checks an answer before its weights are written. Until `finish`, the weights count as torn.

        Raises:
            ServerRestartedError, Error: As `check`.
        """
        self.check(position)
        self.torn = True

    def finish(self, position: common_pb2.ModelPosition) -> None:
        """Records that all weights of an answer are written."""
        self.position = position
        self.version = position.version
        self.torn = False
