"""The formats that values travel in: float32, float16, and bfloat16, which numpy lacks, as uint16 of its bits."""

import numpy as np
from numpy.typing import NDArray

Halves = NDArray[np.float16] | NDArray[np.uint16]
"""Values of 16 bits: float16, or the bits of bfloat16."""

Values = NDArray[np.float32] | Halves
"""Values as they came. Every format widens to float32 exactly."""


def widened(values: Values) -> NDArray[np.float32]:
    """Returns a copy as float32, of the same shape."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)
