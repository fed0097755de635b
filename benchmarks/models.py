"""The models of the workloads, also for the peers. Uses numpy only."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

Tensors = dict[str, Array]

Shape = tuple[int, ...]


def _resnet50() -> list[Shape]:
    """Returns the 53 convolutions of ResNet-50, padded to 25,000,000 parameters in 60 tensors."""
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
"""Workload B: a linear model of 6 parameters."""

SHAPES_C: tuple[Shape, ...] = ((512, 784), (512,), (512, 512), (512,), (655, 512), (64,))
"""Workload C: 1,000,000 parameters, 4 MB."""


def elements(shapes: Sequence[Shape]) -> int:
    """Returns the number of parameters of a model."""
    return sum(map(math.prod, shapes))


SIZE_A = elements(SHAPES_A)


def shapes_of(workload: str) -> tuple[Shape, ...]:
    """Returns the shapes of workload a, b or c, or of one tensor whose size is given."""
    known = {"a": SHAPES_A, "b": SHAPES_B, "c": SHAPES_C}
    return known[workload] if workload in known else ((int(workload),),)


def weights_of(shapes: Sequence[Shape]) -> list[Array]:
    """Returns the initial weights, always the same."""
    return _normal(shapes, 1, 0.05)


def gradients_of(shapes: Sequence[Shape]) -> list[Array]:
    """Returns the gradient that every worker pushes in every step.

    With a constant gradient the weights depend only on the number of updates, which reveals lost and repeated ones.
    """
    return _normal(shapes, 2, 0.01)


def named(arrays: Sequence[Array]) -> Tensors:
    """Returns the arrays as tensors with generated names, in the same order."""
    return {f"t{index:02}": array for index, array in enumerate(arrays)}


def _normal(shapes: Sequence[Shape], seed: int, scale: float) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape, np.float32) * np.float32(scale) for shape in shapes]
