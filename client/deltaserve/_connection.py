"""A channel to a server: a deadline on every call, retries within the caller's budget, errors as exceptions."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from math import inf
from numbers import Real
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from deltaserve._background import BackgroundCall
from deltaserve._common.address import check_target
from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.error_table import from_call
from deltaserve._credentials import Credentials, Plaintext
from deltaserve._errors import Error
from deltaserve._retry import AttemptFailed, RetryPolicy
from deltaserve.v1 import model_service_pb2, system_service_pb2, worker_service_pb2

T = TypeVar("T")

_log = logging.getLogger("deltaserve")

_MIB = 1 << 20

_KEEPALIVE_MS = 20_000
_STREAM_SECONDS = 86_400
"""The deadline of a stream without an end, since no call is without a deadline."""

_MIN_ATTEMPT_SECONDS = 0.001  # with no time left gRPC would not even start the call

_QUIET_RETRIES = 3
"""The retry after these is logged as a warning: the user learns once that the client waits for a server."""

_OPTIONS = [
    ("grpc.enable_retries", 0),  # `retry` knows the reasons and the caller's budget, gRPC does not
    ("grpc.max_receive_message_length", 64 * _MIB),
    ("grpc.max_send_message_length", -1),  # the server's limit decides
    ("grpc.http2.max_frame_size", 4 * _MIB),  # a vector travels in few frames
    ("grpc.experimental.tcp_read_chunk_size", 4 * _MIB),
    # A stopped peer is found only if all of these are set.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Every connection has a channel of its own: two clients in one process share nothing.
    ("grpc.use_local_subchannel_pool", 1),
]

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in (model_service_pb2, worker_service_pb2, system_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every RPC by its name."""

_RESPONSES: dict[str, Any] = {name: GetMessageClass(method.output_type) for name, method in METHODS.items()}


class _Closable(Protocol):
    def close(self) -> None: ...


class Connection:
    """A channel to one server.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: Budget of a call, retries included.
        credentials: Opens the channel; None means plaintext.

    Raises:
        ValueError: `target` is no address, or `timeout_seconds` is not a finite number above 0.

    Attributes:
        sessions: Open sessions, which end with the connection.
    """

    def __init__(self, target: str, timeout_seconds: float, credentials: Credentials | None = None) -> None:
        check_target(target)
        _check_timeout(timeout_seconds)
        self.target = target
        self.timeout_seconds = timeout_seconds
        # A session renews its lease while it exists: nothing here keeps it.
        self.sessions: WeakSet[_Closable] = WeakSet()
        self._process = os.getpid()  # gRPC does not survive a fork
        self._channel: grpc.Channel | None = (credentials or Plaintext()).open_channel(target, _OPTIONS)
        self._stubs: dict[str, Any] = {}

    def close(self) -> None:
        """Closes the sessions, then ends all calls. Does nothing in a forked child: the channel is the parent's."""
        for session in list(self.sessions):
            session.close()
        channel, self._channel = self._channel, None
        if channel and self._process == os.getpid():
            BackgroundCall(channel.close).run()

    def check_usable(self) -> grpc.Channel:
        """Returns the channel.

        Raises:
            ValueError: The connection is closed.
            RuntimeError: The process was forked since the connection was made.
        """
        if self._channel is None:
            raise ValueError("the connection is closed")
        if self._process != os.getpid():
            raise RuntimeError("a connection does not survive a fork: call deltaserve.connect in the child process")
        return self._channel

    def stub(self, method: str) -> Any:
        """Returns gRPC's callable of an RPC; it sends and receives bytes.

        Raises:
            ValueError, RuntimeError: As `check_usable`.
        """
        channel = self.check_usable()
        if method not in self._stubs:
            descriptor = METHODS[method]
            sends, receives = (
                ("unary", "stream")[streams] for streams in (descriptor.client_streaming, descriptor.server_streaming)
            )
            path = f"/{descriptor.containing_service.full_name}/{method}"
            make = getattr(channel, f"{sends}_{receives}")
            # Bytes both ways: a request is serialized once for all attempts, and chunks are never parsed by protobuf.
            self._stubs[method] = make(path, request_serializer=None, response_deserializer=None)
        return self._stubs[method]

    def call(self, method: str, request: Message, *, timeout_seconds: float | None = None) -> Any:
        """Makes a unary call and returns the response message.

        Raises:
            Error: The server refused the request, or did not answer in time.
        """
        data = request.SerializeToString()
        policy = RetryPolicy(budget_seconds=timeout_seconds or self.timeout_seconds)
        response = self.retry(lambda seconds: self.stub(method)(data, timeout=seconds), policy=policy)
        return _RESPONSES[method].FromString(response)

    def call_once(self, method: str, request: Message, seconds: float) -> Any:
        """Makes a unary call without a retry, as part of an attempt at another call; returns the response message.

        Raises:
            grpc.RpcError: The call failed.
        """
        return _RESPONSES[method].FromString(self.stub(method)(request.SerializeToString(), timeout=seconds))

    def send(self, method: str, messages: Callable[[], Iterable[bytes]], *, repeats_uncertain: bool = True) -> Any:
        """Makes a client-streaming call and returns the response message.

        Args:
            method: The RPC.
            messages: Returns the messages of one attempt.
            repeats_uncertain: As in `RetryPolicy`.

        Raises:
            Error: The server refused the request, or did not answer in time.
        """
        delivered = False

        def tracked() -> Iterator[bytes]:
            nonlocal delivered
            yield from messages()
            delivered = True  # a server does not carry out a stream that ends early

        def attempt(seconds: float) -> Any:
            nonlocal delivered
            delivered = False
            return self.stub(method)(tracked(), timeout=seconds)

        policy = RetryPolicy(budget_seconds=self.timeout_seconds, repeats_uncertain=repeats_uncertain)
        return _RESPONSES[method].FromString(self.retry(attempt, policy=policy, delivered=lambda: delivered))

    def receive(
        self,
        method: str,
        start: Callable[[int, float], Any],
        take: Callable[[Any, Iterator[Chunk]], T],
        timeout_seconds: float | None = None,
    ) -> T:
        """Makes a call whose response is a stream.

        Args:
            method: The RPC.
            start: Starts the call of an attempt and returns it. Arguments: the attempt's number from 0, and the seconds
                that are left.
            take: Reads the response: its header and its chunks. Called once for every attempt that gets an answer.
            timeout_seconds: None means the connection's timeout.

        Returns:
            The result of `take`.

        Raises:
            Error: The server refused the request, or did not answer in time.
        """
        codec = StreamCodec(_RESPONSES[method])
        calls: list[Any] = []
        numbers = count()

        def attempt(seconds: float) -> T:
            call = start(next(numbers), seconds)
            calls[:] = [call]
            decoded = (codec.decode(message) for message in call)
            try:
                return take(next(decoded), decoded)
            finally:
                call.cancel()
                # Released here: the call's destructor is gRPC's code, and this thread is never interrupted.
                decoded.close()
                calls.clear()
                del call

        # Cancelled after an interrupt, because the call writes to the caller's memory.
        policy = RetryPolicy(budget_seconds=timeout_seconds or self.timeout_seconds)
        return self.retry(attempt, policy=policy, cancel=partial(_cancel, calls))

    def stream(self, method: str, request: Message) -> Iterator[Any]:
        """Yields the messages of a server-streaming call without an end, and makes the call again when it breaks.

        Raises:
            Error: The server refused the request, or did not answer in time.
        """
        kind, data = _RESPONSES[method], request.SerializeToString()
        calls: list[Any] = []

        def begin(seconds: float) -> bytes:
            # The stream's own deadline is a day: a short call finds out first whether the server answers.
            self.stub("GetServerInfo")(b"", timeout=seconds)
            calls[:] = [self.stub(method)(data, timeout=_STREAM_SECONDS)]
            return next(calls[0])  # type: ignore[no-any-return]

        cancel = partial(_cancel, calls)
        try:
            while True:
                message = self.retry(begin, cancel=cancel)
                with suppress(grpc.RpcError):
                    while True:
                        yield kind.FromString(message)
                        message = BackgroundCall(lambda: next(calls[0]), cancel).run()
        finally:
            BackgroundCall(cancel).run()

    def retry(
        self,
        attempt: Callable[[float], T],
        *,
        policy: RetryPolicy | None = None,
        cancel: Callable[[], object] | None = None,
        delivered: Callable[[], bool] = lambda: False,
    ) -> T:
        """Calls `attempt` until it succeeds, its failure is final, or the budget is spent; returns its result.

        Args:
            attempt: Makes one attempt, in any thread, within the seconds that it gets.
            policy: None means the default policy with the connection's timeout.
            cancel: Makes an attempt end soon after an interrupt; None lets the attempt go on by itself.
            delivered: Returns whether the server may have received the whole request of the last attempt.

        Raises:
            Error: The server refused the request, or did not answer in time.
        """
        policy = policy or RetryPolicy(budget_seconds=self.timeout_seconds)
        deadline = monotonic() + policy.budget_seconds

        def outcome() -> T | AttemptFailed:
            try:
                return attempt(max(deadline - monotonic(), _MIN_ATTEMPT_SECONDS))
            except grpc.RpcError as error:
                # A gRPC error is the call itself. Without its traceback, which makes a cycle, it dies here: its
                # destructor is gRPC's code, which the garbage collector must not run in the main thread.
                return AttemptFailed(*from_call(error.with_traceback(None), self.target, policy.budget_seconds))

        reason: str | None = ""  # no error has this reason
        repeats = 0
        for retries in count():
            result = BackgroundCall(outcome, cancel).run()
            if not isinstance(result, AttemptFailed):
                return result
            error = result.error
            # A new reason starts the backoff anew: the server is back, and something else is wrong.
            repeats, reason = (repeats + 1 if error.reason == reason else 0), error.reason
            wait_seconds = policy.wait_seconds(result, repeats, delivered=delivered())
            if wait_seconds is None or monotonic() + wait_seconds >= deadline:
                raise error
            level = logging.WARNING if retries == _QUIET_RETRIES else logging.INFO
            _log.log(level, "%s; trying for another %.0f s", error, deadline - monotonic())
            sleep(wait_seconds)
        raise AssertionError("unreachable")


def incarnation(connection: Connection) -> str | None:
    """Returns the server's incarnation; None if the server does not answer."""
    try:
        info = connection.call("GetServerInfo", system_service_pb2.GetServerInfoRequest(), timeout_seconds=5.0)
    except Error:
        return None
    return str(info.incarnation)


def _check_timeout(seconds: object) -> None:
    if not isinstance(seconds, Real) or not 0 < float(seconds) < inf:
        raise ValueError(f"timeout_seconds: expected a finite number above 0, got {seconds!r}")


def _cancel(calls: list[Any]) -> None:
    for call in calls:
        call.cancel()
