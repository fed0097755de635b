"""The choice of a session's transport."""

import logging
from typing import Any

from deltaserve._common.element_types import FLOAT32, ElementType
from deltaserve._common.flat_vector import ELEMENT_BYTES
from deltaserve._connection import Connection
from deltaserve._errors import Error
from deltaserve._transport.protocol import Transport, TransportName
from deltaserve._transport.shared_memory import SharedMemory, SharedMemoryTransport
from deltaserve._transport.stream import StreamTransport
from deltaserve._transport.unary import UnaryTransport
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

_UNARY_BYTES = 1 << 20
"""Up to this size a vector travels in one message, which is quicker than a stream and than shared memory."""


def open_transport(
    connection: Connection, session: dict[str, Any], size: int, name: TransportName, wire: ElementType
) -> Transport:
    """Returns the transport of a session for a vector of `size` elements, with shared memory opened if it is used.

    Raises:
        Error: The caller asks for shared memory, and the server refuses it.
        OSError: The caller asks for shared memory, and it cannot be opened here.
    """
    is_small = size * ELEMENT_BYTES <= _UNARY_BYTES
    messages = (UnaryTransport if is_small else StreamTransport)(connection, wire)
    if name == "stream" or (name == "auto" and is_small):
        return messages
    try:
        answer = connection.call("OpenSharedMemory", rpc.OpenSharedMemoryRequest(**session))
        memory = SharedMemory(answer.gradient)
    except OSError as problem:
        text = (
            f"the server's memory cannot be opened here: it is another host's, user's or container's ({problem}). "
            "Use transport='auto' or 'stream'"
        )
        if name == "shared":
            raise OSError(text) from None
        _log.info("vectors travel in messages: %s", text)
        return messages
    except Error as problem:
        if name == "shared":
            raise
        _log.debug("vectors travel in messages: %s", problem)
        return messages
    # The same gradient must be sent if a push has to be repeated in messages.
    messages.wire = FLOAT32
    return SharedMemoryTransport(connection, memory, messages, wire)
