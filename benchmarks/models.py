"""The models that are measured."""

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]

SIZE_A = 25_000_000


def model_a(seed: int = 0) -> Tensors:
    """Returns 25,000,000 random elements in 60 tensors of sizes as in a ResNet-50: a few large, many small."""
    sizes = [512 * (1 + 4 * (index % 12)) * (1 + index % 5) * 8 for index in range(59)]
    sizes = [size * (SIZE_A - 1_000_000) // sum(sizes) for size in sizes]
    sizes.append(SIZE_A - sum(sizes))
    return _tensors(sizes, seed)


def model_b(seed: int = 0) -> Tensors:
    """Returns the book's linear model: five weights and a bias."""
    return _tensors([5, 1], seed)


def _tensors(sizes: list[int], seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {f"t{index:02}": rng.standard_normal(size, np.float32) for index, size in enumerate(sizes)}
