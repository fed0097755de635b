"""A worker's session: its numbers, the renewal of its lease in the background, its end."""

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

_CLOSE_SECONDS = 2.0  # short, because the lease ends the session anyway


class Session:
    """A session of a worker with a model. A thread renews the lease every third of it while the object exists.

    Args:
        lease_seconds: None means the server's default.
        tensor_count, group_count: How many of the model's tensors and parameter groups the worker knows.
        lineage: The lineage that the worker knows the model by; None if it knows none.

    Attributes:
        opened: The server's answer.
        id: The fields that name the session in every request.
        sequence: The number of the next push; of the last one while `sent` is set.
        sent: Whether push `sequence` was sent and its answer is not known: the server may have accepted it.
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
        self.sequence = 1
        self.sent = False
        self._process = os.getpid()
        self._renewing = True
        self._ended = False
        self._closed: SimpleQueue[None] = SimpleQueue()
        connection.sessions.add(self)
        renewal = weakref.ref(self), self._closed, self.opened.lease_seconds / 3  # two attempts may fail
        thread = threading.Thread(target=_renew, args=renewal, name=f"lease of {worker}", daemon=True)
        BackgroundCall(thread.start).run()  # an interrupt within `start` could leave a lock held

    @property
    def last_sent(self) -> int:
        """The number of the last push that was sent; 0 before the first."""
        return self.sequence if self.sent else self.sequence - 1

    def keep(self, timeout_seconds: float | None = None) -> rpc.KeepSessionResponse:
        """Renews the lease and returns what the server knows of the session."""
        answer: rpc.KeepSessionResponse = self._connection.call(
            "KeepSession", rpc.KeepSessionRequest(**self.id), timeout_seconds=timeout_seconds
        )
        return answer

    def close(self) -> None:
        """Ends the session, once. Does nothing in a forked child: the session is the parent's."""
        if self._ended or self._process != os.getpid():
            return
        self._stop_renewing()
        request = rpc.CloseSessionRequest(**self.id)
        try:
            self._connection.call("CloseSession", request, timeout_seconds=_CLOSE_SECONDS)
        except (Error, ValueError) as error:
            _log.info("worker %s: the session was not closed and ends with its lease: %s", self._worker, error)
        self._ended = True  # last: after an interrupt the next close() asks the server again

    def abandon(self) -> None:
        """Ends the session without a call, because the server no longer knows it."""
        self._ended = True
        self._stop_renewing()

    def _stop_renewing(self) -> None:
        self._renewing = False
        self._closed.put(None)  # wakes the thread, which may otherwise sleep for a third of the lease

    def renew(self, timeout_seconds: float) -> bool:
        """Renews the lease from the background thread; returns whether to renew it again."""
        failpoint("worker.renewing")
        try:
            self.keep(timeout_seconds)
        except (Error, ValueError) as error:
            if not self._renewing:
                return False
            if isinstance(error, SessionError) and error.reason == "SESSION_UNKNOWN":
                _log.info("worker %s: the session has ended; the next step opens a new one", self._worker)
                return False
            # A server that was busy or out of reach may answer the next time.
            passes = isinstance(error, UnavailableError) or (isinstance(error, Error) and error.reason is None)
            level = logging.INFO if passes else logging.WARNING
            _log.log(level, "worker %s: the lease was not renewed: %s", self._worker, error)
            return passes
        return self._renewing


def _renew(reference: "weakref.ref[Session]", closed: "SimpleQueue[None]", seconds: float) -> None:
    """Renews a session every `seconds` until it is closed or garbage: an interrupt may leave one without an owner."""
    while True:
        with suppress(Empty):
            return closed.get(timeout=seconds)
        session = reference()
        if not (session and session.renew(seconds)):
            return None
        del session  # the thread must not keep the session alive while it sleeps
