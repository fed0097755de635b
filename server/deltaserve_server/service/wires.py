"""Element types on the wire, as the server converts them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve._wire import FLOAT32, WIRES, Wire
from deltaserve.v1 import common_pb2 as pb
from deltaserve_server.model import Refused


def _narrow(values: NDArray[np.float32], out: NDArray[Any]) -> None:
    from deltaserve_server.adadelta.halves import narrow  # numba: not before it is asked for

    narrow(values, out)


_BY_NUMBER: "dict[pb.DataType.ValueType, Wire]" = {
    pb.DATA_TYPE_UNSPECIFIED: FLOAT32,
    pb.DATA_TYPE_FLOAT32: FLOAT32,
    pb.DATA_TYPE_BFLOAT16: WIRES["bfloat16"]._replace(narrow=_narrow),
    pb.DATA_TYPE_FLOAT16: WIRES["float16"]._replace(narrow=_narrow),
}
_ALLOWED = " or ".join(pb.DataType.Name(number) for number in _BY_NUMBER if number)


def wire_of(data_type: "pb.DataType.ValueType") -> Wire:
    """Returns the type of elements that a message names.

    Raises:
        Refused: DTYPE_UNSUPPORTED.
    """
    wire = _BY_NUMBER.get(data_type)
    if wire is None:
        raise Refused("DTYPE_UNSUPPORTED", tensor="(all)", got=data_type, allowed=_ALLOWED)
    return wire
