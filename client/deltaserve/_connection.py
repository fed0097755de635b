"""A channel to a server: deadlines on every call, retries within the caller's budget, errors as exceptions."""

import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from time import monotonic, sleep
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from deltaserve._background import BackgroundCall
from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve._common.error_table import from_call
from deltaserve._errors import Error
from deltaserve._signals import undisturbed
from deltaserve.v1 import model_service_pb2, system_service_pb2, worker_service_pb2

T = TypeVar("T")

_log = logging.getLogger("deltaserve")

_MIB = 1 << 20
_BACKOFF_FIRST_SECONDS = 0.1
_BACKOFF_MOST_SECONDS = 5.0
_RECONNECT_MOST_SECONDS = 0.5
"""The most where a server is on its way: nobody answers, which costs nothing, or it says that it still reads."""

_ON_ITS_WAY = None, "RECOVERING"

_FATE_UNKNOWN = None, "STORAGE_UNAVAILABLE", "DRAINING"
"""Reasons after which a request may have been taken, as errors.proto says."""

_PORT_MOST = 65_535

_KEEPALIVE_MS = 20_000
_STREAM_SECONDS = 86_400
"""No call is without a deadline."""

_SHORTEST_SECONDS = 0.001
_SOON_SECONDS = 0.25
"""How long Ctrl+C may have to wait for a call that is expected to be short."""

_PATIENCE = 3
"""Retries before the user is told, once, that somebody is waited for."""

_OPTIONS = [
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 64 * _MIB),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", 4 * _MIB),
    ("grpc.experimental.tcp_read_chunk_size", 4 * _MIB),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(_RECONNECT_MOST_SECONDS * 1000)),
    # A channel of its own for every connection: two clients in one process share nothing.
    ("grpc.use_local_subchannel_pool", 1),
]

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in (model_service_pb2, worker_service_pb2, system_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every RPC by its name."""

_ANSWERS: dict[str, Any] = {name: GetMessageClass(method.output_type) for name, method in METHODS.items()}


def check_target(target: str) -> None:
    """Raises ValueError where an address is neither HOST:PORT nor unix:PATH."""
    host, _, port = target.rpartition(":")
    if target.startswith("unix:"):
        valid = target != "unix:"
    else:
        valid = bool(host) and "/" not in host and port.isdecimal() and int(port) <= _PORT_MOST
    if not valid:
        raise ValueError(f"{target!r} is no address; write HOST:PORT, as in localhost:50051, or unix:PATH")


class _Closable(Protocol):
    def close(self) -> None: ...


class _Failed(NamedTuple):
    """An attempt that failed, and after how many seconds to try again; None: do not."""

    error: Error
    wait_seconds: float | None


class _Channel:
    """A gRPC channel and the calls that were made ready on it."""

    def __init__(self, target: str) -> None:
        self._grpc = grpc.insecure_channel(target, options=_OPTIONS)
        self._calls: dict[str, Any] = {}

    def close(self) -> None:
        self._grpc.close()

    def call(self, method: str) -> Any:
        """Returns what makes the call of an RPC, of bytes."""
        if method not in self._calls:
            descriptor = METHODS[method]
            sends, receives = (
                ("unary", "stream")[streams] for streams in (descriptor.client_streaming, descriptor.server_streaming)
            )
            path = f"/{descriptor.containing_service.full_name}/{method}"
            make = getattr(self._grpc, f"{sends}_{receives}")
            self._calls[method] = make(path, request_serializer=None, response_deserializer=None)
        return self._calls[method]


class Connection:
    """A channel to one server.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: How long a call may take in all, retries included.

    Raises:
        ValueError: Either cannot be used.

    Attributes:
        sessions: What was opened over it and is closed with it.
    """

    def __init__(self, target: str, timeout_seconds: float) -> None:
        check_target(target)
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds: expected more than 0, got {timeout_seconds}")
        self.target = target
        self.timeout_seconds = timeout_seconds
        self._process = os.getpid()
        self._channel: _Channel | None = _Channel(target)
        self.sessions: WeakSet[_Closable] = WeakSet()
        self._soon = True

    def close(self) -> None:
        """Closes the sessions, then ends all calls. In a forked child it does nothing: the channel is the parent's."""
        for session in list(self.sessions):
            session.close()
        channel, self._channel = self._channel, None
        if channel and self._process == os.getpid():
            self._uninterrupted(channel.close, None)

    def call(self, method: str, request: Message, *, timeout_seconds: float | None = None) -> Any:
        """Makes a unary call; returns the response message.

        Raises:
            Error: The server refused, or was not reached in time.
        """
        return self.retry(partial(self.call_once, method, request), timeout_seconds)

    def call_once(self, method: str, request: Message, seconds: float) -> Any:
        """Makes a unary call without a retry, as a part of an attempt; returns the response message.

        Raises:
            grpc.RpcError: It failed.
        """
        return _ANSWERS[method].FromString(self._call(method)(request.SerializeToString(), timeout=seconds))

    def call_soon(self, method: str, request: Message) -> Any:
        """Makes a unary call whose answer is likely to come at once; returns the response message.

        In the main thread, a call aside costs as much as half of such a call. So it is made there, undisturbed, though
        not for long, since Ctrl+C waits for it; where that does not do, again and aside. The server must take the same
        call twice.

        Raises:
            Error: The server refused, or was not reached in time.
        """
        data, begun = request.SerializeToString(), monotonic()
        if self._soon and self._in_main_thread():
            try:
                answer = undisturbed(
                    partial(self._call(method), data, timeout=min(_SOON_SECONDS, self.timeout_seconds))
                )
                return _ANSWERS[method].FromString(answer)
            except grpc.RpcError as failed:
                # Without its traceback: see `retry`.
                error, wait_seconds = from_call(failed.with_traceback(None), self.target, self.timeout_seconds)
                if wait_seconds is None:
                    raise error from None
        answer = self.retry(lambda seconds: self._call(method)(data, timeout=seconds), begun=begun)
        self._soon = monotonic() - begun < _SOON_SECONDS
        return _ANSWERS[method].FromString(answer)

    def send(self, method: str, messages: Callable[[], Iterable[bytes]], *, once: bool = False) -> Any:
        """Makes a client-streaming call of the messages that each call of `messages` gives anew; returns the response.

        Args:
            method: The RPC.
            messages: What it sends.
            once: Whether a call that may have been taken is not made again, since a second one would do something else.

        Raises:
            Error: The server refused, or was not reached in time.
        """
        whole = threading.Event()

        def sent() -> Iterator[bytes]:
            yield from messages()
            whole.set()  # what a server has not got whole, it does not take

        def attempt(seconds: float) -> Any:
            whole.clear()
            return self._call(method)(sent(), timeout=seconds)

        return _ANSWERS[method].FromString(self.retry(attempt, taken=whole.is_set if once else None))

    def begin(self, method: str, messages: Iterator[bytes]) -> Any:
        """Begins a call of a stream of messages, which gRPC asks for in a thread of its own; returns the call."""
        return self._call(method)(messages, timeout=self.timeout_seconds)

    def receive(
        self,
        method: str,
        request: Message | Callable[[], Iterable[bytes]],
        take: Callable[[Any, Iterator[Chunk]], T],
        begun: Callable[[], Any] | None = None,
        again: Message | None = None,
        probe: Callable[[float], object] | None = None,
    ) -> T:
        """Makes a call whose response is a stream.

        Args:
            method: The RPC.
            request: A message, or what gives the messages of a request stream.
            take: Is called with the header and the chunks that follow; anew with each attempt.
            begun: Returns a call that was begun before and is to be the first attempt, or None; asked once.
            again: The message of further attempts; None means the same.
            probe: Is called first in further attempts, with the seconds that are left, and may end them.

        Returns:
            What `take` returned.

        Raises:
            Error: The server refused, or was not reached in time.
        """
        codec = StreamCodec(_ANSWERS[method])
        calls: list[Any] = []
        first = [begun] if begun else []
        attempts = count()

        def attempt(seconds: float) -> T:
            call = first.pop()() if first else None
            another = next(attempts) > 0
            if call is None:
                if another and probe:
                    probe(seconds)
                asked = again if another and again else request
                sent = asked.SerializeToString() if isinstance(asked, Message) else iter(asked())
                call = self._call(method)(sent, timeout=seconds)
            calls[:] = [call]
            decoded = (codec.decode(message) for message in call)
            try:
                return take(next(decoded), decoded)
            finally:
                call.cancel()
                # Let go of here, in this thread: its __del__ is gRPC's code too.
                decoded.close()
                calls.clear()
                del call

        # Not left to itself after an interrupt: it writes into the caller's memory.
        return self.retry(attempt, cancel=partial(_cancel, calls))

    def stream(self, method: str, request: Message) -> Iterator[Any]:
        """Yields the messages of a server-streaming call that has no end, made again where it breaks off.

        Raises:
            Error: The server refused, or was not reached in time.
        """
        kind, data = _ANSWERS[method], request.SerializeToString()
        calls: list[Any] = []

        def begin(seconds: float) -> bytes:
            # Its own deadline says nothing of a server that is silent: a call that is to end soon asks first.
            self._call("GetServerInfo")(b"", timeout=seconds)
            calls[:] = [self._call(method)(data, timeout=_STREAM_SECONDS)]
            return next(calls[0])  # type: ignore[no-any-return]

        cancel = partial(_cancel, calls)
        try:
            while True:
                message = self.retry(begin, cancel=cancel)
                with suppress(grpc.RpcError):
                    while True:
                        yield kind.FromString(message)
                        message = self._uninterrupted(lambda: next(calls[0]), cancel)
        finally:
            cancel()

    def retry(
        self,
        attempt: Callable[[float], T],
        timeout_seconds: float | None = None,
        cancel: Callable[[], object] | None = None,
        begun: float | None = None,
        taken: Callable[[], bool] | None = None,
    ) -> T:
        """Calls `attempt` with the seconds that are left until it succeeds.

        Args:
            attempt: What to call, in any thread.
            timeout_seconds: How long to try; None means the connection's timeout.
            cancel: Makes an attempt end soon; None where one that was interrupted may go on by itself.
            begun: When that time began; None means now.
            taken: Says whether an attempt may have been taken: where that is not known for sure, none follows it.

        Raises:
            Error: The server refused in a way that a retry does not mend, or time is up.
        """
        budget = timeout_seconds or self.timeout_seconds
        deadline = (monotonic() if begun is None else begun) + budget

        def tried(seconds: float) -> T | _Failed:
            try:
                return attempt(seconds)
            except grpc.RpcError as failed:
                # Without its traceback, a cycle: gRPC's __del__ would run in the thread that collects garbage.
                return _Failed(*from_call(failed.with_traceback(None), self.target, budget))

        tries = 0
        reason: str | None = ""  # which no error has
        for total in count():
            outcome = self._uninterrupted(partial(tried, max(deadline - monotonic(), _SHORTEST_SECONDS)), cancel)
            if not isinstance(outcome, _Failed):
                return outcome
            error, wait_seconds = outcome
            # Where something else is wrong now, it is as if for the first time: a server that is back soon answers.
            tries, reason = tries + 1 if error.reason == reason else 0, error.reason
            limit = _RECONNECT_MOST_SECONDS if reason in _ON_ITS_WAY else _BACKOFF_MOST_SECONDS
            most = min(_BACKOFF_FIRST_SECONDS * 2 ** min(tries, 10), limit)
            delay = max(wait_seconds or 0.0, random.uniform(0, most))  # noqa: S311
            unsure = taken is not None and taken() and reason in _FATE_UNKNOWN
            if wait_seconds is None or monotonic() + delay >= deadline or unsure:
                raise error
            level = logging.WARNING if total == _PATIENCE else logging.INFO
            _log.log(level, "%s; trying for %.0f s more", error, deadline - monotonic())
            sleep(delay)
        raise AssertionError("unreachable")

    def _uninterrupted(self, attempt: Callable[[], T], cancel: Callable[[], object] | None) -> T:
        """Makes an attempt; an interrupt ends the wait for it, and cancels it if it can."""
        return BackgroundCall(attempt, cancel).run() if self._in_main_thread() else attempt()

    def _in_main_thread(self) -> bool:
        return threading.get_ident() == threading.main_thread().ident and self._process == os.getpid()

    def _call(self, method: str) -> Any:
        return self.checked().call(method)

    def checked(self) -> _Channel:
        """Returns the channel; raises ValueError where it is closed, RuntimeError where it is a parent process's."""
        channel = self._channel
        if channel is None:
            raise ValueError("the connection is closed")
        if self._process != os.getpid():
            raise RuntimeError("a connection does not survive a fork: call deltaserve.connect in the child process")
        return channel


def incarnation(connection: Connection) -> str | None:
    """Returns the server's incarnation, or None where it does not say."""
    try:
        info = connection.call("GetServerInfo", system_service_pb2.GetServerInfoRequest(), timeout_seconds=5.0)
    except Error:
        return None
    return str(info.incarnation)


def _cancel(calls: list[Any]) -> None:
    for call in calls:
        call.cancel()
