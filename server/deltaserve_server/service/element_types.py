"""The element types that the wire may carry, with the server's own kernel for 16-bit types."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve._common.element_types import ELEMENT_TYPES, FLOAT32, ElementType
from deltaserve.v1 import common_pb2 as pb
from deltaserve_server.model import Refused


def _narrow(values: NDArray[np.float32], out: NDArray[Any]) -> None:
    from deltaserve_server.optimizers.float16 import narrow  # imports numba, which float32 does without

    narrow(values, out)


_BY_NUMBER: "dict[pb.DataType.ValueType, ElementType]" = {
    pb.DATA_TYPE_UNSPECIFIED: FLOAT32,
    pb.DATA_TYPE_FLOAT32: FLOAT32,
    pb.DATA_TYPE_BFLOAT16: ELEMENT_TYPES["bfloat16"]._replace(narrow=_narrow),
    pb.DATA_TYPE_FLOAT16: ELEMENT_TYPES["float16"]._replace(narrow=_narrow),
}
_ALLOWED = " or ".join(pb.DataType.Name(number) for number in _BY_NUMBER if number)


def element_type_of(data_type: "pb.DataType.ValueType") -> ElementType:
    """Returns the element type that a message names; raises Refused DTYPE_UNSUPPORTED."""
    element_type = _BY_NUMBER.get(data_type)
    if element_type is None:
        raise Refused("DTYPE_UNSUPPORTED", tensor="(all)", got=data_type, allowed=_ALLOWED)
    return element_type
