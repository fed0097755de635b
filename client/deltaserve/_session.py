"""A worker's session as the client holds it: opened, renewed in the background, closed."""

import logging
import os
import threading
from typing import Any

from deltaserve._connection import Connection
from deltaserve._errors import Error, UnavailableError
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

_GOODBYE_SECONDS = 2.0


class Session:
    """A session; its lease is renewed at a third of it by a thread of its own.

    Args:
        connection: To the server.
        model: The model's name.
        worker: The worker's name.
        lease_seconds: None means the server's default.
        tensor_count: How many of the model's tensors the worker knows.
        group_count: How many of its groups.

    Attributes:
        opened: What the server answered.
        id: What names the session in every request.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        worker: str,
        lease_seconds: float | None,
        tensor_count: int,
        group_count: int,
    ) -> None:
        self._connection = connection
        self._worker = worker
        request = rpc.OpenSessionRequest(
            model=model,
            worker=worker,
            lease_seconds=lease_seconds,
            tensor_count=tensor_count,
            group_count=group_count,
        )
        self.opened: rpc.OpenSessionResponse = connection.call("OpenSession", request)
        self.id: dict[str, Any] = {
            "model": model,
            "session_id": self.opened.session_id,
            "epoch": self.opened.epoch,
        }
        self._process = os.getpid()
        self._closed = threading.Event()
        connection.sessions.add(self)
        threading.Thread(target=self._renew_until_closed, name=f"lease of {worker}", daemon=True).start()

    def keep(self, timeout_seconds: float | None = None) -> rpc.KeepSessionResponse:
        """Renews the lease; returns what the server has of this session."""
        answer: rpc.KeepSessionResponse = self._connection.call(
            "KeepSession", rpc.KeepSessionRequest(**self.id), timeout_seconds=timeout_seconds
        )
        return answer

    def close(self) -> None:
        """Ends the session, once; in a forked child it does nothing: the session is the parent's."""
        if self._closed.is_set() or self._process != os.getpid():
            return
        self._closed.set()
        request = rpc.CloseSessionRequest(**self.id)
        try:
            self._connection.call("CloseSession", request, timeout_seconds=_GOODBYE_SECONDS)
        except (Error, ValueError) as error:
            _log.info("worker %s: the session ends with its lease: %s", self._worker, error)

    def _renew_until_closed(self) -> None:
        seconds = self.opened.lease_seconds / 3
        while not self._closed.wait(seconds):
            try:
                self.keep(seconds)
            except (Error, ValueError) as error:
                if self._closed.is_set():
                    return
                passes = _passes(error)
                level = logging.INFO if passes else logging.WARNING
                _log.log(level, "worker %s: the lease was not renewed: %s", self._worker, error)
                if not passes:
                    return


def _passes(error: Exception) -> bool:
    """Whether the next try may succeed: the server had no room or no time, or it was not the server that decided."""
    return isinstance(error, UnavailableError) or (isinstance(error, Error) and error.reason is None)
