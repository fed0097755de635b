"""ServerReflection: which services there are, and their descriptors."""

from collections.abc import Iterator
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection


class ReflectionServicer(reflection.ReflectionServicer):  # type: ignore[misc]  # grpc_reflection has no types
    """grpc_reflection's servicer, for `method_handlers.handler`, which takes encoded messages of a stream."""

    def ServerReflectionInfo(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        for response in super().ServerReflectionInfo(messages, context):
            yield response.SerializeToString()
