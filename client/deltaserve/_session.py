"""A worker's session as the client holds it: opened, renewed in the background, closed."""

import logging
import os
import threading
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from deltaserve._background import BackgroundCall
from deltaserve._common.failpoints import failpoint
from deltaserve._connection import Connection
from deltaserve._errors import Error, SessionError, UnavailableError
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

_GOODBYE_SECONDS = 2.0


class Session:
    """A session; its lease is renewed at a third of it by a thread of its own, for as long as somebody holds it.

    Args:
        connection: To the server.
        model: The model's name.
        worker: The worker's name.
        lease_seconds: None means the server's default.
        tensor_count: How many of the model's tensors the worker knows.
        group_count: How many of its groups.
        lineage: What the worker knows the model by; None where it knows nothing of it.

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
        lineage: bytes | None = None,
    ) -> None:
        self._connection = connection
        self._worker = worker
        request = rpc.OpenSessionRequest(
            model=model,
            worker=worker,
            lease_seconds=lease_seconds,
            tensor_count=tensor_count,
            group_count=group_count,
            lineage=lineage,
        )
        self.opened: rpc.OpenSessionResponse = connection.call("OpenSession", request)
        failpoint("worker.opened")
        self.id: dict[str, Any] = {
            "model": model,
            "session_id": self.opened.session_id,
            "epoch": self.opened.epoch,
        }
        self._process = os.getpid()
        self._open = True
        self._closed: SimpleQueue[None] = SimpleQueue()
        connection.sessions.add(self)
        renewal = weakref.ref(self), self._closed, self.opened.lease_seconds / 3
        thread = threading.Thread(target=_renew, args=renewal, name=f"lease of {worker}", daemon=True)
        BackgroundCall(thread.start, None).run()

    def keep(self, timeout_seconds: float | None = None) -> rpc.KeepSessionResponse:
        """Renews the lease; returns what the server has of this session."""
        answer: rpc.KeepSessionResponse = self._connection.call(
            "KeepSession", rpc.KeepSessionRequest(**self.id), timeout_seconds=timeout_seconds
        )
        return answer

    def close(self) -> None:
        """Ends the session, once; in a forked child it does nothing: the session is the parent's."""
        if not self._open or self._process != os.getpid():
            return
        self.lose()
        request = rpc.CloseSessionRequest(**self.id)
        try:
            self._connection.call("CloseSession", request, timeout_seconds=_GOODBYE_SECONDS)
        except (Error, ValueError) as error:
            _log.info("worker %s: the session ends with its lease: %s", self._worker, error)

    def lose(self) -> None:
        """Ends the renewals alone, as of a session that the server does not know any more."""
        self._open = False
        self._closed.put(None)

    def renew(self, timeout_seconds: float) -> bool:
        """Renews the lease in the background; returns whether that is to go on."""
        failpoint("worker.renewing")
        try:
            self.keep(timeout_seconds)
        except (Error, ValueError) as error:
            if not self._open:
                return False
            if isinstance(error, SessionError) and error.reason == "SESSION_UNKNOWN":
                _log.info("worker %s: the session has ended; the next step goes on in a new one", self._worker)
                return False
            passes = _passes(error)
            level = logging.INFO if passes else logging.WARNING
            _log.log(level, "worker %s: the lease was not renewed: %s", self._worker, error)
            return passes
        return self._open


def _renew(reference: "weakref.ref[Session]", closed: "SimpleQueue[None]", seconds: float) -> None:
    """Renews a session every so often until it is closed, or nobody's: the one who opened it may be interrupted."""
    while True:
        with suppress(Empty):
            return closed.get(timeout=seconds)
        session = reference()
        if not (session and session.renew(seconds)):
            return None
        del session


def _passes(error: Exception) -> bool:
    """Whether the next try may succeed: the server had no room or no time, or it was not the server that decided."""
    return isinstance(error, UnavailableError) or (isinstance(error, Error) and error.reason is None)
