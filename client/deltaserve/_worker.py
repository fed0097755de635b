"""A worker: one session with one model."""

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from math import prod
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from deltaserve._common.element_types import Array, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import FlatVector, contiguous
from deltaserve._common.optimizers import Optimizer
from deltaserve._connection import Connection
from deltaserve._conversion import from_groups, to_push_status, to_step_result
from deltaserve._errors import ConflictError, Error, SessionError, StaleGradientError, UnavailableError
from deltaserve._membership import Membership
from deltaserve._session import Session
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.protocol import Answer, Push, TransportName
from deltaserve._transport.pull import pull
from deltaserve._types import PushStatus, StepResult, TensorSpec
from deltaserve._weights import ServerRestartedError
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

_POLL_SECONDS = 0.1


class PushState(Enum):
    """What a worker's next push starts from."""

    FIRST = "no weights were pulled yet"
    IDLE = "the weights are whole, and every push has its answer"
    UNCERTAIN = "a push was sent, and its answer was lost: the server may have accepted it"
    TORN = "the weights are of two versions; no gradient that was computed on them counts"
    TORN_UNCERTAIN = "the answer to a push broke off: if the server has accepted it, the push counts"
    OWED = "the weights are lost, or the fate of the last push is: the caller must learn it first"


class Worker:
    """One worker's session with a model; a context manager that closes it. Made by `Model.worker`.

    The lease is renewed in the background. Use a worker in one thread at a time. It closes at the latest when it is
    garbage-collected or the process exits. If the process is killed, a synchronous round waits for the worker until its
    lease runs out.

    Attributes:
        name: The worker's name.
        tensors: The layout as this worker knows it.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        name: str,
        lease_seconds: float | None,
        tensors: tuple[TensorSpec, ...],
        group_count: int,
        transport: TransportName,
        wire: ElementType,
    ) -> None:
        self._connection = connection
        self._model = model
        self.name = name
        self.tensors = tensors
        self._result: rpc.PushResult | None = None
        self._last_result: StepResult | None = None  # converted from `_result` on demand
        self._overlapped: OverlappedPush | None = None
        self._membership = Membership(connection, model, name, lease_seconds, tensors, group_count, transport, wire)
        self._weights = self._membership.weights

    @property
    def rank(self) -> int:
        """The lowest number that no other live worker of the model had when this one joined."""
        return self._session.opened.rank

    @property
    def version(self) -> int:
        """The version of this worker's weights; before the first pull, the version to start from."""
        return self._first_version if self._weights.version is None else self._weights.version

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last push; None before the first, and if the push was refused."""
        if self._last_result is None and self._result:
            self._last_result = to_step_result(self._result)
        return self._last_result

    @property
    def weights(self) -> dict[str, Array]:
        """The newest weights by tensor name, in the worker's own memory: the next `pull` or `step` overwrites them."""
        if self._weights.newest is None or self._weights.torn:
            self.pull()
        return dict(self._weights.newest or {})

    def pull(self, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Returns the newest weights; the first time, weights no older than this worker must start from.

        If the server has gone back to an older state, these are its current weights, and a warning in the log says what
        is lost.

        Args:
            out: C-contiguous float32 arrays to write to, by tensor name; None means the worker's own memory.

        Raises:
            StateLostError: The server restarted without the model.
            Error: The server refused the request, or did not answer in time.
        """
        arrays = self._weights.aim(out)
        lost = self._refresh(self._first_version if self._weights.version is None else None)
        if lost:
            _log.warning("%s", lost)
        self._weights.newest = dict(arrays) if out is None else None
        return arrays

    def step(
        self,
        gradients: Mapping[str, ArrayLike | None],
        *,
        hyperparameters: Sequence[Optimizer] | None = None,
        weight: float = 1.0,
        out: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Pushes a gradient and returns the weights of the update that it became part of, or newer ones.

        Under `Sync` it waits for the round, under `Bounded` for slower workers. If it raises an error without a
        `reason`, or is interrupted, the server may have accepted the push. Call it again with the same gradients: it
        finds out, and does not push twice.

        Args:
            gradients: By tensor name, of the tensor's shape, converted to float32. None for a tensor without a
                gradient: it keeps its weights and state, unless another worker of the round has a gradient for it.
            hyperparameters: The model's optimizer with the hyperparameters of this update, by parameter group; None
                means the model's own.
            weight: The push's weight in the mean of its round, for instance its number of samples; 1e-9 to 1e9.
            out: C-contiguous float32 arrays to write the weights to, by tensor name; None means the worker's memory.

        Raises:
            ValueError: A tensor is missing, unknown or has another shape.
            TypeError: `gradients` is not a mapping, or a gradient does not consist of real numbers.
            RequestError: A value is not finite, or a hyperparameter is out of range; nothing was changed.
            StaleGradientError: The gradient was computed on weights that are too old for the round or for
                `max_staleness`, or on weights that had arrived only in part. Newer weights are in place now.
            RolledBackError: The gradient was computed on weights that a restart of the server has lost; the error says
                which pushes are lost too. The current weights are in place.
            ConflictError: Workers of one round pushed different hyperparameters, or the model has another optimizer.
            SessionError: The session is over: a newer one of this name was opened, or it was closed. A note says what
                became of the last push.
            StateLostError: The server restarted without the model.
            UnavailableError: The server did not answer, or the round did not close, within the timeout; or the round
                failed for lack of workers.
        """
        if self._push_state is PushState.FIRST:
            self.pull(out=out)
        gradient, absent = self._gradients(gradients)
        arrays = self._weights.aim(out)
        stale = self._require_whole_weights()
        push = Push(self._header(absent, hyperparameters, weight), gradient, absent)
        push.overlapped, self._overlapped = self._overlapped, None
        deadline = monotonic() + self._connection.timeout_seconds
        while True:
            session = self._session
            push.resent = session.sent
            self._address(push.header)
            failpoint("worker.before_send")
            self._set_result(None)
            try:
                transport = self._membership.transport()
                # From here until its answer is recorded, the push is uncertain, whatever interrupts this call.
                session.sent = True
                answer = transport.step(push, self._weights)
            except (Error, ServerRestartedError) as error:
                self._resolve(error, push, stale)
            else:
                break
            # One budget for all of it: a push that makes the server die must not make it die for ever.
            push.timeout_seconds = deadline - monotonic()
            if push.timeout_seconds <= 0:
                raise UnavailableError(
                    f"{self._connection.target} did not answer the push within {self._connection.timeout_seconds:g} s: "
                    "it was restarted meanwhile"
                )
        self._record(answer)
        self._weights.newest = dict(arrays) if out is None else None
        return arrays

    def get_push(self, sequence: int | None = None) -> PushStatus:
        """Returns what became of a push. It also works after the session has ended.

        Args:
            sequence: The push's number, 1 for the first; None means the last one that was sent.

        Raises:
            ValueError: Nothing was pushed yet, or there is no such number.
            SessionError: The session ended too long ago.
        """
        number = self._session.last_sent if sequence is None else sequence
        if number < 1:
            problem = "there is no push yet" if sequence is None else f"sequence: expected 1 or more, got {sequence}"
            raise ValueError(problem)
        status = self._membership.find_push(number)
        if status is None:
            raise SessionError("the session ended too long ago")
        return to_push_status(status)

    def close(self) -> None:
        """Ends the session. A push that waits for its round still counts."""
        self._membership.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- a push that begins during backward, for `RemoteAdadelta(overlap=True)`

    def _begin(
        self, push: OverlappedPush, absent: list[int], hyperparameters: Sequence[Optimizer], weight: float
    ) -> bool:
        """Starts to send the next push, from any thread, while its gradient is still being computed.

        Returns False if the transport gains nothing by it, or if the next step must first settle something else.
        """
        if self._push_state is not PushState.IDLE:
            return False
        missing = set(absent)
        size = sum(prod(spec.shape) for index, spec in enumerate(self.tensors) if index not in missing)
        return self._membership.begin(push, self._header(absent, hyperparameters, weight), size)

    def _take_over(self, push: OverlappedPush | None) -> None:
        """Lets the next step take over a push that has begun, if it turns out to be the push to send."""
        self._overlapped = push

    # --- the state of the push

    @property
    def _push_state(self) -> PushState:
        if self._membership.owed:
            return PushState.OWED
        if self._weights.version is None:
            return PushState.FIRST
        states = {
            (False, False): PushState.IDLE,
            (True, False): PushState.UNCERTAIN,
            (False, True): PushState.TORN,
            (True, True): PushState.TORN_UNCERTAIN,
        }
        return states[self._session.sent, self._weights.torn]

    def _require_whole_weights(self) -> StaleGradientError | None:
        """Pulls and raises an error if the gradient was computed on weights that do not count.

        Returns:
            The error to raise if the server has accepted another gradient than this one; None if the weights are whole.

        Raises:
            StaleGradientError: The weights were torn, or lost.
        """
        torn = StaleGradientError(
            f"worker {self.name}: the gradient was computed on weights that had arrived in part only; they are whole "
            "now: compute it again"
        )
        match self._push_state:
            case PushState.OWED:
                raise self._refresh(self._first_version) or torn
            case PushState.TORN:
                raise self._refresh() or torn
            case PushState.TORN_UNCERTAIN:
                # The gradient may be that of the accepted push, which was computed on the whole weights before.
                push = self._membership.find_push(self._session.sequence)
                if not push or push.state == rpc.PUSH_STATE_NOT_ACCEPTED:  # it may still arrive
                    raise self._refresh() or torn
                return torn
        return None

    def _resolve(self, error: Error | ServerRestartedError, push: Push, stale: StaleGradientError | None) -> None:
        """Decides what follows a push that failed. Returns if the same push is to be sent again.

        If the push turns out to be another one than the server has accepted, it raises `stale`.
        """
        session, resumed = self._session, False
        match error:
            case StaleGradientError():
                session.sent = False  # a refused push leaves its number free
                error.add_note("Newer weights are in place now.")
                raise self._refresh(int(error.metadata["current"])) or error from None
            case ConflictError(reason="SEQUENCE_REUSED") if push.resent:
                self._skip_accepted(stale)
            case ServerRestartedError() | ConflictError(reason="LINEAGE_CHANGED"):
                try:
                    self._membership.resume(error if isinstance(error, Error) else None)
                except SessionError as over:
                    over.add_note(self._fate())
                    raise
                resumed = True
            case SessionError() if self._membership.can_rejoin(error):
                self._membership.rejoin()
            case SessionError():
                error.add_note(self._fate())
                raise error from None
            case UnavailableError(reason=None):
                where = f"deltaserve status {self._model} --target {self._connection.target}"
                error.add_note(f"If the server is there, the push waits for other workers; to see for whom: {where}")
                raise error from None
            case _:
                raise self._membership.explained(error) from None
        # A server that came back may lack the accepted push that `stale` leaves a way out for.
        owed = self._membership.owed or (stale if resumed or self._session is not session else None)
        if owed:
            raise self._refresh(self._first_version) or owed from None

    def _skip_accepted(self, stale: StaleGradientError | None) -> None:
        """Waits for the push that the server has accepted under this number, so that the gradient gets the next one.

        If the gradient does not count, it then raises `stale`.
        """
        session = self._session
        push, deadline = self._membership.find_push(session.sequence), monotonic() + self._connection.timeout_seconds
        while push and push.state == rpc.PUSH_STATE_WAITING:  # polled, because a round that fails makes no version
            if monotonic() > deadline:
                raise UnavailableError(f"worker {self.name}: push {session.sequence} still waits for its round")
            sleep(_POLL_SECONDS)
            push = self._membership.find_push(session.sequence)
        if push is None:  # a restart has lost the session
            return self._membership.rejoin()
        owed = self._refresh(push.position.version)
        if owed:
            raise owed from None
        self._set_result(push.result if push.HasField("result") else None)
        if push.state == rpc.PUSH_STATE_APPLIED:
            _log.warning("worker %s: push %d, whose answer was lost, counts", self.name, session.sequence)
            session.sequence += 1
        session.sent = False
        if stale:
            raise stale from None
        return None

    def _record(self, answer: Answer) -> None:
        """Records the answer to a push."""
        session = self._session
        self._weights.torn = False
        self._set_result(answer.result)
        if answer.result.duplicate:
            _log.info("worker %s: push %d had been applied by an earlier attempt", self.name, session.sequence)
        self._weights.finish(answer.position)
        # Last, and without a call at which Python would handle an interrupt: until then the answer counts as lost.
        session.sequence += 1
        session.sent = False
        failpoint("worker.recorded")

    # --- the weights

    def _refresh(self, wait_for_version: int | None = None) -> StaleGradientError | None:
        """Pulls, however often the server restarts meanwhile. Returns the error that is owed to the caller."""
        deadline = monotonic() + self._connection.timeout_seconds
        while True:
            session = self._session
            try:
                self._pull(wait_for_version)
            except ServerRestartedError:
                self._membership.resume()
                # A server that came back from an older state may not reach the version for long, or only with this
                # worker's next push. A session that is new says itself what to start from.
                starts = self._session is not session or self._membership.owed or self._weights.version is None
                wait_for_version = self._first_version if starts else None
                if monotonic() > deadline:
                    raise UnavailableError(f"{self._connection.target} was restarted again and again") from None
            else:
                owed, self._membership.owed = self._membership.owed, None
                return owed

    def _pull(self, wait_for_version: int | None) -> None:
        deadline = monotonic() + self._connection.timeout_seconds
        wire = self._membership.wire
        while True:
            try:
                position = pull(self._connection, self._model, wait_for_version, wire, self._weights)
            except Error as error:
                raise self._membership.explained(error) from None
            self._weights.finish(position)
            if position.version >= (wait_for_version or 0):
                return
            if monotonic() > deadline:
                raise UnavailableError(f"model {self._model} has not reached version {wait_for_version} in time")

    # --- the request

    def _gradients(self, gradients: Mapping[str, ArrayLike | None]) -> tuple[FlatVector, list[int]]:
        """Returns the gradient as a flat vector, and the indices of tensors without a gradient."""
        if not isinstance(gradients, Mapping):
            raise TypeError(f"gradients: expected a mapping of tensor names to arrays, got {type(gradients).__name__}")
        unknown = gradients.keys() - {spec.name for spec in self.tensors}
        if unknown:
            raise ValueError(f"the model has no tensor named {min(unknown)}")
        arrays, absent = [], []
        for index, spec in enumerate(self.tensors):
            gradient = gradients.get(spec.name)
            if gradient is None:
                if spec.name not in gradients:
                    raise ValueError(f"the gradient of tensor {spec.name} is missing: give None if it has none")
                absent.append(index)
                gradient = np.empty(spec.shape, np.float32)  # never read
            elif np.shape(gradient) != spec.shape:
                raise ValueError(f"the gradient of tensor {spec.name} has shape {np.shape(gradient)}, not {spec.shape}")
            arrays.append(contiguous(gradient))
        return FlatVector(arrays), absent

    def _header(self, absent: list[int], hyperparameters: Sequence[Optimizer] | None, weight: float) -> rpc.PushHeader:
        header = rpc.PushHeader(
            base_version=self._weights.version,
            absent_tensors=absent,
            hyperparameters=from_groups(hyperparameters or ()),
            weight=weight,
        )
        self._address(header)
        return header

    def _address(self, header: rpc.PushHeader) -> None:
        """Makes it the header of the session's next push."""
        session, lineage = self._session, self._membership.lineage
        header.MergeFrom(rpc.PushHeader(**session.id, sequence=session.sequence, lineage=lineage))

    @property
    def _session(self) -> Session:
        return self._membership.session

    @property
    def _first_version(self) -> int:
        return self._session.opened.first_version

    def _set_result(self, result: rpc.PushResult | None) -> None:
        self._result, self._last_result = result, None

    def _fate(self) -> str:
        """Says what became of the last push, for a session that is over."""
        try:
            push = self.get_push()
        except (Error, ValueError):
            return "What became of its last push is not known."
        version = f", as part of version {push.result.version}" if push.result else ""
        return f"Its last push, number {self._session.last_sent}: {push.state}{version}."
