"""The models that are measured, here and by the peers: numpy alone."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

Tensors = dict[str, Array]

Shape = tuple[int, ...]


def _resnet50() -> list[Shape]:
    """Returns ResNet-50's 53 convolutions, and a classifier and vectors that make it 25,000,000 in 60 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (width * 4, width, 1, 1)]
            if block == 0:
                shapes.append((width * 4, channels, 1, 1))
            channels = width * 4
    return [*shapes, (754, 2048), (754,), (64,), (64,), (8,), (4,), (2,)]


SHAPES_A = tuple(_resnet50())
"""Workload A: 25,000,000 parameters, 100 MB."""

SHAPES_B: tuple[Shape, ...] = ((1, 5), (1,))
"""Workload B: the book's linear model."""

SHAPES_C: tuple[Shape, ...] = ((512, 784), (512,), (512, 512), (512,), (655, 512), (64,))
"""Workload C: 1,000,000 parameters, 4 MB."""


def elements(shapes: Sequence[Shape]) -> int:
    """Returns how many parameters a model has."""
    return sum(map(math.prod, shapes))


SIZE_A = elements(SHAPES_A)


def shapes_of(workload: str) -> tuple[Shape, ...]:
    """Returns the shapes of workload a, b or c, or of one tensor of so many elements."""
    known = {"a": SHAPES_A, "b": SHAPES_B, "c": SHAPES_C}
    return known[workload] if workload in known else ((int(workload),),)


def weights_of(shapes: Sequence[Shape]) -> list[Array]:
    """Returns initial weights, the same whenever they are asked for."""
    return _normal(shapes, 1, 0.05)


def gradients_of(shapes: Sequence[Shape]) -> list[Array]:
    """Returns the gradient that every worker pushes in every step.

    It is always the same one, so that the weights depend on nothing but the number of updates: a lost or a doubled one
    shows.
    """
    return _normal(shapes, 2, 0.01)


def named(arrays: Sequence[Array]) -> Tensors:
    """Returns tensors by name, in their order."""
    return {f"t{index:02}": array for index, array in enumerate(arrays)}


def _normal(shapes: Sequence[Shape], seed: int, scale: float) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape, np.float32) * np.float32(scale) for shape in shapes]
