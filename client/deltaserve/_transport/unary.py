"""Vectors in one message each way: the quickest way for small models."""

from deltaserve._common.codec import Chunk
from deltaserve._common.element_types import ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._connection import Connection
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.protocol import Answer, Push
from deltaserve._transport.pull import write_chunks
from deltaserve._weights import LocalWeights
from deltaserve.v1 import worker_service_pb2 as rpc


class UnaryTransport:
    """Sends a push with the Step RPC."""

    def __init__(self, connection: Connection, wire: ElementType) -> None:
        self._connection = connection
        self.wire = wire

    def step(self, push: Push, weights: LocalWeights) -> Answer:
        """As in `Transport`."""
        push.header.gradient_type = push.header.weights_type = self.wire.data_type
        push.header.shared_memory = False  # an attempt through shared memory may have set it
        parts = [part for _, parts in push.gradient.chunks(push.absent) for part in parts]
        request = rpc.StepRequest(header=push.header, gradient=b"".join(self.wire.encoded(parts)))
        answer = self._connection.call("Step", request, timeout_seconds=push.timeout_seconds)
        failpoint("worker.acknowledged")
        weights.begin(answer.position)
        write_chunks([Chunk("weights", 0, memoryview(answer.weights))], self.wire, weights)
        return Answer(answer.result, answer.position)

    def begin(self, overlapped: OverlappedPush, header: rpc.PushHeader, size: int) -> bool:
        """Returns False: one message cannot be sent before it is whole."""
        return False

    def close(self) -> None:
        """Has nothing to release."""
