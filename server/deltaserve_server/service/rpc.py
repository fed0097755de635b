"""Between gRPC and the servicers: decoding, encoding, and every failure turned into its documented status."""

import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Event
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from deltaserve._common.codec import StreamCodec
from deltaserve._common.error_table import to_status
from deltaserve_server.memory import BudgetExceeded
from deltaserve_server.model import Refused

T = TypeVar("T")

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.2


class CallerGoneError(Exception):
    """Nobody waits for the answer of this call any more."""


def handler(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """Returns gRPC's handler for a service; `servicer` has a method of the same name for each RPC.

    A method takes the request message, or an iterator of what `StreamCodec.decode` returns, and the call's context. It
    returns the response message, or yields encoded messages.
    """
    methods = {method.name: _method(method, getattr(servicer, method.name)) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def wait(context: grpc.ServicerContext, future: "Future[T]") -> T:
    """Waits for a future, but no longer than for the caller, who may go away; what it waits for goes on."""
    if not future.done():
        wake = Event()
        future.add_done_callback(lambda _: wake.set())
        if context.add_callback(wake.set):
            wake.wait()
    if not future.done():
        raise CallerGoneError
    return future.result()


def refused(error: Exception) -> Refused:
    """Returns the refusal that an exception stands for; one that is none of ours is logged and becomes INTERNAL."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, BudgetExceeded):
        retry_seconds = _RETRY_SECONDS if error.is_temporary else None
        return Refused("MEMORY_BUDGET", retry_seconds, needed=error.needed, available=max(error.available, 0))
    incident = secrets.token_hex(8)
    _log.error("incident %s", incident, exc_info=error)
    return Refused("INTERNAL", incident=incident)


def _method(method: MethodDescriptor, behaviour: Callable[..., Any]) -> "grpc.RpcMethodHandler[bytes, bytes]":
    request = GetMessageClass(method.input_type)
    decode = _stream_decoder(request) if method.client_streaming else _decoder(request)
    if method.server_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(_streaming(decode, behaviour))
    make_unary = (
        grpc.stream_unary_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
    )
    return make_unary(_answering(decode, behaviour))


def _answering(decode: Callable[[Any], Any], behaviour: Callable[..., Message]) -> Callable[..., bytes]:
    def answer(request: Any, context: grpc.ServicerContext) -> bytes:
        try:
            return behaviour(decode(request), context).SerializeToString()
        except Exception as error:
            _abort(context, error)

    return answer


def _streaming(
    decode: Callable[[Any], Any], behaviour: Callable[..., Iterator[bytes]]
) -> Callable[..., Iterator[bytes]]:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from behaviour(decode(request), context)
        except Exception as error:
            _abort(context, error)

    return answer


def _decoder(kind: type[Message]) -> Callable[[bytes], Message]:
    def decode(data: bytes) -> Message:
        try:
            return kind.FromString(data)
        except DecodeError:
            raise Refused("MESSAGE_INVALID", message=kind.DESCRIPTOR.name) from None

    return decode


def _stream_decoder(kind: type[Message]) -> Callable[[Iterator[bytes]], Iterator[Any]]:
    codec = StreamCodec(kind)

    def decode(messages: Iterator[bytes]) -> Iterator[Any]:
        for message in messages:
            try:
                yield codec.decode(message)
            except DecodeError:
                raise Refused("MESSAGE_INVALID", message=kind.DESCRIPTOR.name) from None

    return decode


def _abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """Ends the call with the error's status."""
    if isinstance(error, CallerGoneError | grpc.RpcError):  # gRPC raises the latter where a request stream broke off
        context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")
    refusal = refused(error)
    context.abort_with_status(to_status(refusal.reason, refusal.metadata, refusal.retry_seconds))
