"""Method handlers for gRPC: bytes become messages, answers become bytes, and exceptions become documented statuses.

The handlers decode requests themselves. If a deserializer that gRPC calls fails on a stream, gRPC may never end the
call, and `grpc.Server.stop` then waits for it forever.
"""

import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from threading import Event
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from deltaserve._common.codec import StreamCodec
from deltaserve._common.error_table import to_status
from deltaserve_server.engine.events import Observers, RequestRefused
from deltaserve_server.memory import BudgetExceeded
from deltaserve_server.model import Refused

T = TypeVar("T")

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.2


class CallerGoneError(Exception):
    """The caller has ended the call; there is nobody to answer."""


def handler(
    service: ServiceDescriptor, servicer: object, observers: Observers, *, chunked: bool = True
) -> grpc.GenericRpcHandler:
    """Returns gRPC's handler of a service.

    Args:
        service: The service.
        servicer: Has a method for each RPC, of the RPC's name. It takes the request message, or an iterator over the
            messages of a request stream, and the call's context. It returns the response message, or an iterator over
            encoded messages.
        observers: Receive the events of refused requests.
        chunked: Request streams consist of a header and chunks, which `StreamCodec` decodes.
    """
    methods = {
        method.name: _Method(method, getattr(servicer, method.name), observers, chunked).handler()
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def wait(context: grpc.ServicerContext, future: "Future[T]") -> T:
    """Returns a future's result.

    Raises:
        CallerGoneError: The call has ended first. Only the wait ends; the work behind the future continues.
    """
    if not future.done():  # the usual case of asynchronous models needs no event
        wake = Event()
        future.add_done_callback(lambda _: wake.set())
        if context.add_callback(wake.set):  # False: the call has ended already
            wake.wait()
    if not future.done():
        raise CallerGoneError
    return future.result()


class _Method:
    """One RPC."""

    def __init__(
        self, method: MethodDescriptor, behaviour: Callable[..., Any], observers: Observers, chunked: bool
    ) -> None:
        self._method = method
        self._behaviour = behaviour
        self._observers = observers
        request = GetMessageClass(method.input_type)
        chunks = method.client_streaming and chunked
        self._parse: Callable[[bytes], Any] = StreamCodec(request).decode if chunks else request.FromString
        # A message, or an iterator over those of a stream.
        self._decode: Callable[[Any], Any] = (
            partial(map, self._decode_message) if method.client_streaming else self._decode_message
        )

    def handler(self) -> "grpc.RpcMethodHandler[bytes, bytes]":
        if self._method.server_streaming:
            if self._method.client_streaming:
                return grpc.stream_stream_rpc_method_handler(self._stream)
            return grpc.unary_stream_rpc_method_handler(self._stream)
        if self._method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._answer)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: Any, context: grpc.ServicerContext) -> bytes:
        try:
            response: bytes = self._behaviour(self._decode(request), context).SerializeToString()
            return response
        except Exception as error:
            self._abort(context, error)

    def _stream(self, request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from self._behaviour(self._decode(request), context)
        except Exception as error:
            self._abort(context, error)

    def _decode_message(self, data: bytes) -> Any:
        try:
            return self._parse(data)
        except DecodeError:
            raise Refused("MESSAGE_INVALID", message=self._method.input_type.name) from None

    def _abort(self, context: grpc.ServicerContext, error: Exception) -> NoReturn:
        if isinstance(error, CallerGoneError | grpc.RpcError):  # gRPC raises RpcError where a request stream broke off
            context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")
        refusal = _refused(error)
        self._observers.emit(RequestRefused(method=self._method.full_name, reason=refusal.reason))
        context.abort_with_status(to_status(refusal.reason, refusal.metadata, refusal.retry_seconds))


def _refused(error: Exception) -> Refused:
    """Returns the refusal for an exception. One that is not expected is logged and becomes INTERNAL."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, BudgetExceeded):
        retry_seconds = _RETRY_SECONDS if error.is_temporary else None
        return Refused("MEMORY_BUDGET", retry_seconds, needed=error.needed, available=max(error.available, 0))
    # The text of the exception stays here: it may hold what the caller must not see.
    incident = secrets.token_hex(8)
    _log.error("incident %s", incident, exc_info=error)
    return Refused("INTERNAL", incident=incident)
