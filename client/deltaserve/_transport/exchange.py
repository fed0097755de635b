"""How a worker's vectors travel: in one message each way, in chunks, or through memory shared with the server."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from threading import Event
from typing import Any, Literal, get_args

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.element_types import FLOAT32, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import ELEMENT_BYTES, FlatVector
from deltaserve._connection import Connection
from deltaserve._errors import Error, RequestError
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.shared_memory import SharedMemory
from deltaserve.v1 import common_pb2
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

Transport = Literal["auto", "stream", "shared"]
"""Whether vectors go through shared memory: where that is possible, never, or always."""

TRANSPORTS: tuple[Transport, ...] = get_args(Transport)


def check_transport(transport: Transport) -> None:
    """Raises ValueError where there is no such transport."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {transport!r}")


_UNARY_BYTES = 1 << 20
"""Up to this size a vector travels in one message: quicker than a stream, and than shared memory."""

Look = Callable[[common_pb2.ModelPosition], None]
"""Is called with where the model stands."""


class Exchange:
    """Carries the vectors of one worker.

    Args:
        connection: To the server.
        wire: The type of elements in messages.

    Attributes:
        early: What the next step takes over if it is the push to be made.
    """

    def __init__(self, connection: Connection, wire: ElementType) -> None:
        self._connection = connection
        self._asked = self._wire = wire
        self.early: OverlappedPush | None = None
        self._shared: SharedMemory | None = None

    def share(self, session: dict[str, Any], size: int, transport: Transport) -> None:
        """Has the server share memory with a new session, as `transport` asks and where it is of use.

        Raises:
            Error: It was asked for, and the server refuses.
            OSError: It was asked for, and cannot be opened.
        """
        self._shared, self._wire = None, self._asked
        if transport == "stream" or (transport == "auto" and size * ELEMENT_BYTES <= _UNARY_BYTES):
            return
        try:
            answer = self._connection.call("OpenSharedMemory", rpc.OpenSharedMemoryRequest(**session))
            self._shared = SharedMemory(answer.gradient)
            self._wire = FLOAT32  # a push that is sent again in messages must be the same gradient
        except OSError as problem:
            text = f"the server's memory cannot be opened here, as from another host, user or container ({problem})"
            if transport == "shared":
                raise OSError(text) from None
            _log.info("vectors go through messages: %s", text)
        except Error as problem:
            if transport == "shared":
                raise
            _log.debug("vectors go through messages: %s", problem)

    def close(self) -> None:
        """Lets go of shared memory: what is mapped here is not free, whatever the server does with it."""
        self._shared = None

    def step(
        self,
        header: rpc.PushHeader,
        pushed: FlatVector,
        absent: Collection[int],
        target: FlatVector,
        check: Look,
        arriving: Look,
        *,
        unsure: bool,
    ) -> tuple[rpc.PushResult, common_pb2.ModelPosition]:
        """Pushes a gradient and writes the weights to `target`.

        Args:
            header: Which push it is.
            pushed: The gradient.
            absent: Indices of its tensors that are left out.
            target: Where the weights go.
            check: Is called where the server has said where it stands, before a push is sent again.
            arriving: Is called when an answer has come, before its weights are written.
            unsure: What became of the push before is not known: shared memory may still be read on its behalf.
        """
        if self._shared and not unsure:
            self._connection.checked()  # in a forked child the memory is the parent's
            try:
                return self._step_shared(self._shared, header, pushed, target, arriving)
            except (RequestError, OSError) as problem:  # the latter: the weights cannot be mapped
                if isinstance(problem, RequestError) and problem.reason != "SHARED_MEMORY_UNAVAILABLE":
                    raise
                _log.info("vectors go through messages from now on: %s", problem)
                self._shared = None
        header.gradient_type = header.weights_type = self._wire.data_type
        header.shared_memory = False
        if pushed.size * ELEMENT_BYTES <= _UNARY_BYTES:
            answer = self._step_unary(header, pushed, absent, target, arriving)
        else:
            answer = self._step_stream(header, pushed, absent, target, check, arriving)
        if not self._shared:
            self._wire = self._asked  # the push that may have gone through shared memory before is settled
        return answer

    def begin(self, push: OverlappedPush, header: rpc.PushHeader, size: int) -> bool:
        """Begins to send a push of `size` elements before it is whole; returns False where that would be of no use."""
        if self._shared or size * ELEMENT_BYTES <= _UNARY_BYTES:
            return False
        header.gradient_type = header.weights_type = self._wire.data_type
        push.begin(self._connection, header, self._wire)
        return True

    def pull(self, request: rpc.PullRequest, target: FlatVector, arriving: Look) -> common_pb2.ModelPosition:
        """Writes the weights to `target`.

        Where an attempt fails, the next one does not wait for a version: a server that was started anew may have gone
        back, and not reach it for long. So they may be older than was asked for.
        """

        def take(header: rpc.PullHeader, pieces: Iterable[Chunk]) -> Any:
            arriving(header.position)
            self._write(pieces, target)
            return header.position

        request.weights_type = self._wire.data_type
        again = rpc.PullRequest(model=request.model, weights_type=request.weights_type)
        position: common_pb2.ModelPosition = self._connection.receive("Pull", request, take, again=again)
        return position

    def _step_unary(
        self,
        header: rpc.PushHeader,
        pushed: FlatVector,
        absent: Collection[int],
        target: FlatVector,
        arriving: Look,
    ) -> tuple[Any, Any]:
        parts = [part for _, parts in pushed.chunks(absent) for part in parts]
        request = rpc.StepRequest(header=header, gradient=b"".join(self._wire.encoded(parts)))
        answer = self._connection.call_soon("Step", request)
        failpoint("worker.acknowledged")
        arriving(answer.position)
        self._write([Chunk("weights", 0, memoryview(answer.weights))], target)
        return answer.result, answer.position

    def _step_stream(
        self,
        header: rpc.PushHeader,
        pushed: FlatVector,
        absent: Collection[int],
        target: FlatVector,
        check: Look,
        arriving: Look,
    ) -> tuple[Any, Any]:
        codec = StreamCodec(rpc.StreamStepRequest)

        def messages() -> Iterator[bytes]:
            yield codec.header(header)
            for offset, parts in pushed.chunks(absent, self._wire):
                yield codec.chunk("gradient", offset, self._wire.encoded(parts))
                failpoint("worker.mid_body")
            failpoint("worker.sent")

        def take(answer: rpc.StreamStepHeader, pieces: Iterable[Chunk]) -> tuple[Any, Any]:
            failpoint("worker.acknowledged")
            arriving(answer.position)
            self._write(pieces, target)
            return answer.result, answer.position

        early, self.early = self.early, None
        begun = partial(early.take, header, pushed) if early else None
        return self._connection.receive("StreamStep", messages, take, begun, probe=partial(self._look, header, check))

    def _step_shared(
        self, shared: SharedMemory, header: rpc.PushHeader, pushed: FlatVector, target: FlatVector, arriving: Look
    ) -> tuple[Any, Any]:
        codec = StreamCodec(rpc.StreamStepRequest)
        header.ClearField("gradient_type")
        header.weights_type = self._wire.data_type  # in case that they come in chunks
        header.shared_memory = True
        reads: list[Event] = []  # of each attempt, whether its weights were read

        def messages() -> Iterator[bytes]:
            # In the attempt's thread: an interrupt waits for its end, and gRPC's may come to it when the step is over.
            if not reads:
                failpoint("worker.mid_body")
                shared.write_gradient(pushed)
            reads.append(Event())
            return sent(reads[-1])

        def sent(read: Event) -> Iterator[bytes]:
            yield codec.header(header)
            failpoint("worker.sent")
            read.wait()

        def take(answer: rpc.StreamStepHeader, pieces: Iterable[Chunk]) -> tuple[Any, Any]:
            failpoint("worker.acknowledged")
            arriving(answer.position)
            if answer.HasField("weights"):
                failpoint("worker.mid_answer")
                shared.read_weights(answer.weights, target)
                reads[-1].set()
                for _ in pieces:  # its end: a call that had failed by now did not keep the weights as they were
                    pass
            else:  # their memory is none that can be shared, as a GPU server's
                reads[-1].set()
                self._write(pieces, target)
            return answer.result, answer.position

        try:
            return self._connection.receive("StreamStep", messages, take)
        finally:
            for read in reads:
                read.set()

    def _look(self, header: rpc.PushHeader, check: Look, seconds: float) -> None:
        """Asks where the session stands: what a server has to say that was started anew, it says without a vector."""
        request = rpc.KeepSessionRequest(model=header.model, session_id=header.session_id, epoch=header.epoch)
        check(self._connection.call_once("KeepSession", request, seconds).position)

    def _write(self, pieces: Iterable[Chunk], target: FlatVector) -> None:
        for piece in pieces:
            target.write(piece.offset, piece.data, self._wire)
            failpoint("worker.mid_answer")
