"""Vectors in a stream of chunks, for models of any size."""

from collections.abc import Iterable, Iterator
from typing import Any

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.element_types import ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._connection import Connection
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.protocol import Answer, Push
from deltaserve._transport.pull import write_chunks
from deltaserve._weights import LocalWeights
from deltaserve.v1 import worker_service_pb2 as rpc


class StreamTransport:
    """Sends a push with the StreamStep RPC, or takes over one that began during backward."""

    def __init__(self, connection: Connection, wire: ElementType) -> None:
        self._connection = connection
        self.wire = wire

    def step(self, push: Push, weights: LocalWeights) -> Answer:
        """As in `Transport`."""
        push.header.gradient_type = push.header.weights_type = self.wire.data_type
        push.header.shared_memory = False  # an attempt through shared memory may have set it
        overlapped, push.overlapped = push.overlapped, None  # taken over once: sent again, it begins anew

        def start(attempt: int, seconds: float) -> Any:
            if attempt:
                # Asks first: a server that has restarted says so before the whole gradient travels for nothing.
                request = rpc.KeepSessionRequest(
                    model=push.header.model, session_id=push.header.session_id, epoch=push.header.epoch
                )
                weights.check(self._connection.call_once("KeepSession", request, seconds).position)
            elif overlapped and (call := overlapped.take(push.header, push.gradient)):
                return call
            return self._connection.stub("StreamStep")(self._messages(push), timeout=seconds)

        def take(answer: rpc.StreamStepHeader, chunks: Iterable[Chunk]) -> Answer:
            failpoint("worker.acknowledged")
            weights.begin(answer.position)
            write_chunks(chunks, self.wire, weights)
            return Answer(answer.result, answer.position)

        return self._connection.receive("StreamStep", start, take, push.timeout_seconds)

    def begin(self, overlapped: OverlappedPush, header: rpc.PushHeader, size: int) -> bool:
        """As in `Transport`: chunks travel as soon as their tensors have a gradient."""
        if not size:
            return False
        header.gradient_type = header.weights_type = self.wire.data_type
        overlapped.begin(self._connection, header, self.wire)
        return True

    def close(self) -> None:
        """Has nothing to release."""

    def _messages(self, push: Push) -> Iterator[bytes]:
        codec = StreamCodec(rpc.StreamStepRequest)
        yield codec.header(push.header)
        for offset, parts in push.gradient.chunks(push.absent, self.wire):
            yield codec.chunk("gradient", offset, self.wire.encoded(parts))
            failpoint("worker.mid_body")
        failpoint("worker.sent")
