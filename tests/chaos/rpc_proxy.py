"""A gRPC proxy that forwards calls as bytes, and duplicates, delays or loses some of them, from a seed."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any

import grpc
from deck import Deck

_MIB = 1 << 20
_PUSHES = ("Step", "StreamStep")
_KINDS = ("duplicated at once", "duplicated after", "answer dropped", "delayed", "answer delayed")

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * _MIB),
    ("grpc.max_send_message_length", 64 * _MIB),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
    # Reconnects at once to a server that comes back.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class _Handler(grpc.GenericRpcHandler):
    """Returns one handler for all methods, because every call is a stream of messages on the wire."""

    def __init__(self, forward: Callable[[str, Iterator[bytes], Any], Iterator[bytes]]) -> None:
        self._forward = forward

    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(
            lambda messages, context: self._forward(details.method, messages, context)
        )


class RpcProxy:
    """Listens on a port of its own and repeats each call to the server.

    Args:
        upstream: HOST:PORT of the server.
        seed: Seed of the faults.
        one_in: A fault happens to one in this many calls.
        note: Called with the name of each fault of a push when it happens.
    """

    def __init__(self, upstream: str, seed: int, one_in: float, note: Callable[[str], None]) -> None:
        self._random = random.Random(seed)
        self._deck = Deck(self._random, _KINDS)
        self._one_in = one_in
        self._note = note
        self._lock = threading.Lock()
        self._calm = False
        self._channel = grpc.insecure_channel(upstream, options=_OPTIONS)
        self._server = grpc.server(ThreadPoolExecutor(96, "calls"), options=_OPTIONS)
        self._server.add_generic_rpc_handlers([_Handler(self._forward)])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def calm(self) -> None:
        """Stops all further faults."""
        self._calm = True

    def close(self) -> None:
        self._server.stop(0).wait()
        self._channel.close()

    def _fault(self) -> tuple[str | None, float]:
        with self._lock:
            if self._calm or self._random.random() * self._one_in >= 1:
                return None, 0.0
            return self._deck.draw(), self._random.uniform(0.01, 0.3)

    def _forward(self, method: str, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        fault, seconds = self._fault()
        try:
            sent = list(messages)
        except Exception:  # the worker died while it sent
            return
        if fault == "delayed":
            sleep(seconds)
        call = self._call(method, sent, context)
        if fault == "duplicated at once":
            second = self._call(method, sent, context)
            threading.Thread(target=_drain, args=(second,), daemon=True).start()
        try:
            if fault is None:
                yield from call
                return
            answer = list(call)
            if method.rpartition("/")[2] in _PUSHES:
                self._note(f"rpc {fault}")
        except grpc.RpcError as error:
            context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
            context.abort(error.code(), error.details())
        if fault == "answer dropped":
            context.abort(grpc.StatusCode.UNAVAILABLE, "dropped")
        if fault == "duplicated after":
            _drain(self._call(method, sent, context))
        if fault == "answer delayed":
            sleep(seconds)
        yield from answer

    def _call(self, method: str, sent: list[bytes], context: Any) -> Any:
        make: Any = self._channel.stream_stream(method)
        call = make(iter(sent), timeout=context.time_remaining())
        context.add_callback(call.cancel)
        return call


def _drain(call: Any) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
