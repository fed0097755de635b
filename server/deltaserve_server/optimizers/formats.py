"""The element types that values arrive in: float32, float16, and bfloat16 as uint16, because numpy lacks it."""

import numpy as np
from numpy.typing import NDArray

HalfPrecision = NDArray[np.float16] | NDArray[np.uint16]
"""Values of 16 bits: float16, or the bits of bfloat16 as uint16."""

Values = NDArray[np.float32] | HalfPrecision
"""Values in any element type. Each converts to float32 exactly."""


def widened(values: Values) -> NDArray[np.float32]:
    """Returns a float32 copy of the same shape."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)
