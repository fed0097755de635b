"""A worker's standing with a model, over all its sessions."""

import logging
import weakref
from collections.abc import Sequence
from functools import partial
from math import prod

from deltaserve._common.element_types import ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._connection import Connection, incarnation
from deltaserve._errors import Error, RequestError, SessionError, StaleGradientError, StateLostError
from deltaserve._recovery import History, RolledBack, compare, history, rolled_back_error
from deltaserve._session import Session
from deltaserve._transport.choice import open_transport
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.protocol import Transport, TransportName
from deltaserve._types import TensorSpec
from deltaserve._weights import LocalWeights
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")


class Membership:
    """A worker's standing with a model: its session, the model's lineages as it knows them, and its transport.

    It outlives its sessions. After a restart of the server or the end of a lease it finds out what the server still
    has, and goes on in the same session or in a new one.

    Attributes:
        session: The current session.
        lineage: The model's lineage.
        weights: The worker's copy of the weights.
        owed: An error that the caller must get before a further gradient counts: the weights that it was computed on
            are lost, or the fate of its last push is. None if there is none.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        worker: str,
        lease_seconds: float | None,
        tensors: Sequence[TensorSpec],
        group_count: int,
        transport: TransportName,
        wire: ElementType,
    ) -> None:
        self._connection = connection
        self._model = model
        self._worker = worker
        self._open = partial(Session, connection, model, worker, lease_seconds, len(tensors), group_count)
        size = sum(prod(spec.shape) for spec in tensors)
        self._open_transport = partial(open_transport, connection, size=size, name=transport, wire=wire)
        self.session = self._open()
        self._finalize = weakref.finalize(self, self.session.close)  # at exit too, so that no round waits for the lease
        opened = self.session.opened
        self.lineage = opened.lineage
        self._ancestors = list(opened.ancestors)
        self.weights = LocalWeights(model, tensors, opened.position)
        self.owed: StaleGradientError | None = None
        self._renew_transport = False
        self._succeeding = False  # a new session may have been opened that has not replaced this one
        try:
            self._transport: Transport = self._open_transport(session=self.session.id)
        except (Error, OSError):  # the caller gets no worker that could be closed
            self.session.close()
            raise

    def transport(self) -> Transport:
        """Returns the session's transport. Opens shared memory anew after a restart of the server or a new session.

        Raises:
            Error: The caller asked for shared memory, and the server refuses it.
            OSError: The caller asked for shared memory, and it cannot be opened here.
        """
        # Keep the old transport while a push is uncertain: it knows whether the push went through shared memory.
        if self._renew_transport and not self.session.sent:
            self._transport = self._open_transport(session=self.session.id)
            self._renew_transport = False
        return self._transport

    @property
    def wire(self) -> ElementType:
        """The type of elements in messages."""
        return self._transport.wire

    def begin(self, push: OverlappedPush, header: rpc.PushHeader, size: int) -> bool:
        """Starts a push before its gradient is whole, as `Transport.begin`; not while the transport is outdated."""
        return not self._renew_transport and self._transport.begin(push, header, size)

    def close(self) -> None:
        """Ends the session and releases shared memory."""
        self.session.close()  # not through the finalizer, which would be gone after an interrupt
        self._transport.close()
        self._finalize.detach()

    def find_push(self, number: int) -> rpc.GetPushResponse | None:
        """Asks the server for a push of the session; returns None if the session ended too long ago."""
        request = rpc.GetPushRequest(model=self._model, session_id=self.session.id["session_id"], sequence=number)
        try:
            answer: rpc.GetPushResponse = self._connection.call("GetPush", request)
        except SessionError:
            return None
        return answer

    def can_rejoin(self, error: SessionError) -> bool:
        """Returns whether a worker whose session is over goes on in a new one: it lost the session, and was not closed.

        A session that is fenced is lost too if its successor is the worker's own, opened by a call that an interrupt or
        the timeout has ended before its answer came.
        """
        lost = error.reason == "SESSION_UNKNOWN" or (error.reason == "SESSION_FENCED" and self._succeeding)
        return lost and self._finalize.alive

    def resume(self, refused: Error | None = None) -> None:
        """Goes on with a server that has restarted: in the same session if nothing is lost, else in a new one.

        Args:
            refused: The LINEAGE_CHANGED error that revealed the restart; raised again if KeepSession returns the old
                lineage. None if something else revealed the restart.

        Raises:
            StateLostError: The server has another model of the same name, or none.
            Error: The server refused a request, or did not answer in time.
        """
        session = self.session
        try:
            kept = session.keep()
        except SessionError as error:
            if not self.can_rejoin(error):
                raise
            return self.rejoin()
        except Error as error:
            raise self.explained(error) from None
        server = history(kept.ancestors, kept.lineage, kept.position.version)
        owed = self._loss(server, session.sequence - 1, kept.last_applied_sequence)
        if owed:
            return self._replace_session(self._open_session(), owed)
        if refused and kept.lineage == self.lineage:
            raise refused
        _log.info("worker %s: the server was restarted, and nothing is lost", self._worker)
        self.weights.position = kept.position
        self.lineage, self._ancestors = kept.lineage, list(kept.ancestors)
        self._renew_transport = True
        return None

    def rejoin(self) -> None:
        """Opens a new session in place of one that the server no longer knows.

        The lease ran out, as after a pause or a long silence, or the server restarted from an older state. If the old
        session's last push was accepted, the worker stays in that session: the server still answers the push there.

        Raises:
            StateLostError: The server has another model of the same name, or none.
            Error: The server refused a request, or did not answer in time.
        """
        session = self.session
        known = self.find_push(session.sequence)
        if known and known.state != rpc.PUSH_STATE_NOT_ACCEPTED:
            # The push counts. But the weights may be newer than the push, and of versions that are lost.
            server = history(known.ancestors, known.lineage, known.position.version)
            if not self._loss(server, session.sequence - 1, known.last_applied_sequence):
                self.weights.position = known.position
                self.lineage, self._ancestors = known.lineage, list(known.ancestors)
                return
        session.abandon()
        successor = self._open_session()
        opened = successor.opened
        server = history(opened.ancestors, opened.lineage, opened.position.version)
        owed = self._loss(server, session.sequence - 1, known.last_applied_sequence if known else None)
        if not owed:
            cause = "the lease had run out" if opened.lineage == self.lineage else "the server was restarted"
            _log.warning("worker %s: %s; it goes on in a new session", self._worker, cause)
            # A state from before the session has no push of it, so the last one may be sent again in the new session.
            lossy = {ancestor.lineage: ancestor.lossy for ancestor in opened.ancestors}
            began = session.opened.lineage
            predates = began != opened.lineage and lossy.get(began, True)
            # A session with acknowledged pushes is not lost if the weights are not: the server has forgotten it, as one
            # of very many that ended.
            if not known and (session.sequence > 1 or not predates):
                owed = StaleGradientError(
                    f"worker {self._worker}: the session ended too long ago to know whether its last push was "
                    "applied; the gradient is left out, a new session is open and the current weights are in place"
                )
        self._replace_session(successor, owed)

    def explained(self, error: Error) -> Error:
        """Returns an error, or the StateLostError that it amounts to if the server has restarted."""
        gone, known = error.reason in ("MODEL_NOT_FOUND", "LINEAGE_UNKNOWN"), self.weights.position
        restarted = f"the server at {self._connection.target} was restarted"
        if isinstance(error, RequestError) and error.metadata.get("field") in ("tensor_count", "group_count"):
            text = (
                f"{restarted} from a state of model {self._model} that is older than a part of its layout: extend the "
                "model again"
            )
        elif not gone or incarnation(self._connection) in (None, known.incarnation):
            return error
        else:
            text = (
                f"{restarted} and has lost model {self._model}: its weights and state of version {known.version} were "
                f"not durable ({known.version} updates). Start it again from your own weights"
            )
        return StateLostError(text, reason=error.reason, metadata=error.metadata)

    @property
    def _version(self) -> int:
        """The version that the worker's history ends with; before the first pull, the one that the model had."""
        return self.weights.position.version if self.weights.version is None else self.weights.version

    def _loss(self, server: History, acknowledged: int, last_applied: int | None) -> StaleGradientError | None:
        """Returns the error for weights or pushes that a restart has lost; None if nothing is lost."""
        own = history(self._ancestors, self.lineage, self._version)
        verdict = compare(own, server, acknowledged=acknowledged, last_applied=last_applied)
        if verdict is None:
            raise StateLostError(
                f"model {self._model} is a different model of the same name than the one that the worker knew"
            )
        if isinstance(verdict, RolledBack):
            return rolled_back_error(self._worker, self._model, self._version, verdict)
        return None

    def _open_session(self) -> Session:
        """Opens a session under the newest of the worker's lineages that the server knows."""
        self._succeeding = True
        lineages = [self.lineage, *(ancestor.lineage for ancestor in reversed(self._ancestors))]
        for lineage in lineages:
            try:
                return self._open(lineage)
            except Error as error:
                if error.reason != "LINEAGE_UNKNOWN" or lineage == lineages[-1]:
                    raise self.explained(error) from None
        raise AssertionError("unreachable")

    def _replace_session(self, successor: Session, owed: StaleGradientError | None) -> None:
        """Goes on in another session. The error that is owed and the session change together, or not at all."""
        finalize = weakref.finalize(self, successor.close)
        opened, previous, ancestors = successor.opened, self._finalize, list(successor.opened.ancestors)
        self.session.abandon()
        owed = self.owed or owed
        # No call from here on: Python handles an interrupt only at a call.
        self.session = successor
        self.owed = owed
        self.lineage = opened.lineage
        self._ancestors = ancestors
        self.weights.position = opened.position
        self._finalize = finalize
        self._renew_transport = True
        self._succeeding = False
        previous.detach()
        failpoint("worker.rejoined")
