"""A worker: one session with one model."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from deltaserve._common.element_types import Array, ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._common.flat_vector import FlatVector, contiguous
from deltaserve._connection import Connection
from deltaserve._errors import (
    ConflictError,
    Error,
    RolledBackError,
    SessionError,
    StaleGradientError,
    UnavailableError,
)
from deltaserve._restarts import explained, rolled_back
from deltaserve._session import Session
from deltaserve._transport.exchange import Exchange, Transport
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._types import Hyperparameters, PushStatus, StepResult, TensorSpec, to_push_status, to_step_result
from deltaserve.v1 import common_pb2
from deltaserve.v1 import worker_service_pb2 as rpc

_log = logging.getLogger("deltaserve")

_POLL_SECONDS = 0.1


class _RestartedError(Exception):
    """An answer came from a server that was started anew; nothing of it was taken."""


class Worker:
    """One worker's standing with a model; a context manager that closes it. Made by `Model.worker`.

    Its lease is renewed in the background. One thread at a time may use it. It is closed at the latest when it is
    garbage or the process exits; one that is killed keeps a synchronous round waiting for as long as its lease.

    Attributes:
        name: The worker's name.
        rank: The lowest number that no other live worker of the model had when this one came.
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
        transport: Transport,
        wire: ElementType,
    ) -> None:
        self._connection = connection
        self._model = model
        self.name = name
        self.tensors = tensors
        self._result: rpc.PushResult | None = None
        self._last_result: StepResult | None = None  # made of it when it is asked for
        self._own: dict[str, Array] | None = None
        self._version: int | None = None
        self._torn = False
        self._lineage: bytes | None = None
        self._owed: StaleGradientError | None = None
        self._share_again = False
        self._transport = transport
        self._exchange = Exchange(connection, wire)
        self._open_session = partial(Session, connection, model, name, lease_seconds, len(tensors), group_count)
        self._join()
        try:
            self._share()
        except (Error, OSError):
            self._session.close()
            raise

    def _join(self) -> None:
        """Opens a session and numbers pushes from 1."""
        session = self._open_session(self._lineage)
        finalize = weakref.finalize(self, session.close)
        opened = session.opened
        # From here on without a call that could be interrupted: the numbers are those of this session.
        self._session = session
        self._finalize = finalize
        self.rank: int = opened.rank
        self._position = opened.position
        self._first_version: int = opened.first_version
        self._lineage = opened.lineage
        self._sequence = 1
        self._sent = False

    def _share(self) -> None:
        self._share_again = False
        self._exchange.share(self._session.id, sum(prod(spec.shape) for spec in self.tensors), self._transport)

    @property
    def version(self) -> int:
        """The version of the weights that this worker has; before the first pull, the one it is to start from."""
        return self._first_version if self._version is None else self._version

    @property
    def last_result(self) -> StepResult | None:
        """What became of the last push; None before the first, and where it was refused."""
        if self._last_result is None and self._result:
            self._last_result = to_step_result(self._result)
        return self._last_result

    @property
    def weights(self) -> dict[str, Array]:
        """The newest weights by tensor name, in the worker's own memory: the next `pull` or `step` writes over them."""
        if self._own is None or self._torn:
            self.pull()
        return dict(self._own or {})

    def pull(self, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Returns the newest weights; the first time, no older ones than this worker is to start from.

        Where the server has gone back to an older state meanwhile, these are the weights of now; a warning in the log
        says what is lost.

        Args:
            out: By tensor name: C-contiguous float32 arrays to write to; None means the worker's own memory.

        Raises:
            StateLostError: The server was restarted without the model.
            Error: See there.
        """
        arrays = self._memory(out)
        own = dict(arrays) if out is None else None
        target = FlatVector(list(arrays.values()))
        lost = self._refresh(target, self._first_version if self._version is None else None)
        if lost:
            _log.warning("%s", lost)
        self._own = own
        return arrays

    def step(
        self,
        gradients: Mapping[str, ArrayLike | None],
        *,
        hyperparameters: Sequence[Hyperparameters] | None = None,
        weight: float = 1.0,
        out: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Pushes a gradient and returns the weights after the update that it became part of, or newer ones.

        Under `Sync` it waits for the round, under `Bounded` for slower workers. Where it raises without a `reason`, or
        is interrupted, the push may have been accepted all the same: called again with the same gradients, it finds
        out and does not push twice.

        Args:
            gradients: By tensor name, of the tensor's shape, converted to float32. None for a tensor without a
                gradient: it keeps its weights and state, unless another worker of the round has one.
            hyperparameters: For this update, by parameter group; None means the model's own.
            weight: How much it counts in the mean of its round, for instance its number of samples; 1e-9 to 1e9.
            out: By tensor name: C-contiguous float32 arrays to write the weights to; None means the worker's memory.

        Raises:
            ValueError: A tensor is missing, unknown or has another shape.
            TypeError: A gradient does not consist of real numbers.
            RequestError: A value is not finite, or a hyperparameter is out of range; nothing was changed.
            StaleGradientError: The gradient is of weights that are too old for the round or for `max_staleness`, or
                that had arrived in part only. Newer weights are in place now.
            RolledBackError: The gradient is of weights that a restart of the server has lost; the error says which
                pushes were lost too. The weights of now are in place.
            ConflictError: Workers of one round pushed different hyperparameters.
            SessionError: The session is over, because a newer one of this name was opened, or it was closed; a note
                says what became of the last push.
            StateLostError: The server was restarted without the model.
            UnavailableError: The server was not reached, or the round did not close, within the timeout; or the round
                failed for want of workers.
        """
        if self._version is None:
            self.pull(out=out)
        pushed, absent = self._gradients(gradients)
        arrays = self._memory(out)
        own = dict(arrays) if out is None else None
        target = FlatVector(list(arrays.values()))
        mended = self._owed or (StaleGradientError(self._torn_text()) if self._torn else None)
        if mended and not (self._sent and self._is_accepted()):
            raise self._refresh(target, self._first_version if self._owed else None) or mended
        header = self._header(absent, hyperparameters, weight)
        if self._share_again and not self._sent:
            self._share()
        while not self._is_through(header, pushed, absent, target, mended):
            self._address(header)
        self._own = own
        return arrays

    def _is_through(
        self,
        header: rpc.PushHeader,
        pushed: FlatVector,
        absent: list[int],
        target: FlatVector,
        mended: StaleGradientError | None,
    ) -> bool:
        """Pushes; returns False where that is to be done again, the session, or the server, being another now."""
        session = self._session
        try:
            self._push_after_any(header, pushed, absent, target, mended)
        except _RestartedError:
            stale = self._go_on()
        except SessionError as error:
            if error.reason != "SESSION_UNKNOWN" or not self._finalize.alive:
                error.add_note(self._fate())
                raise
            stale = self._rejoin()
        else:
            return True
        if self._session is not session:
            stale = stale or mended
        if stale:
            raise self._refresh(target, self._first_version) or stale from None
        return False

    def get_push(self, sequence: int | None = None) -> PushStatus:
        """Returns what became of a push, also when the session is over.

        Args:
            sequence: Its number, 1 for the first; None means the last one that was sent.

        Raises:
            ValueError: Nothing was pushed yet, or there is no such number.
            SessionError: The session ended too long ago.
        """
        number = self._last_number if sequence is None else sequence
        if number < 1:
            problem = "there is no push yet" if sequence is None else f"sequence: expected 1 or more, got {sequence}"
            raise ValueError(problem)
        status = self._ask(number)
        if status is None:
            raise SessionError("the session ended too long ago")
        return to_push_status(status)

    def close(self) -> None:
        """Ends the session. A push that waits for its round still counts."""
        self._session.close()  # not the finalizer's: interrupted, that would not be there for a second try
        self._exchange.close()
        self._finalize.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- a step that begins early, as `RemoteAdadelta(overlap=True)` makes it

    def _begin(
        self, push: OverlappedPush, absent: list[int], hyperparameters: Sequence[Hyperparameters], weight: float
    ) -> bool:
        """Begins to send the next push, in any thread, while its gradient is still being made.

        Args:
            push: What is begun.
            absent: Indices of the tensors that are expected to have no gradient.
            hyperparameters: As in `step`.
            weight: As in `step`.

        Returns:
            False where that is of no use, or the next step has something else to settle first.
        """
        if self._version is None or self._torn or self._sent:
            return False
        missing = set(absent)
        size = sum(prod(spec.shape) for index, spec in enumerate(self.tensors) if index not in missing)
        return self._exchange.begin(push, self._header(absent, hyperparameters, weight), size)

    def _take_over(self, push: OverlappedPush | None) -> None:
        """Has the next step take over a push that was begun, if it is the one to be made."""
        self._exchange.early = push

    # --- what is sent

    def _gradients(self, gradients: Mapping[str, ArrayLike | None]) -> tuple[FlatVector, list[int]]:
        """Returns the gradient as a flat vector, and the indices of tensors without one."""
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

    def _header(
        self, absent: list[int], hyperparameters: Sequence[Hyperparameters] | None, weight: float
    ) -> rpc.PushHeader:
        header = rpc.PushHeader(
            base_version=self._version,
            absent_tensors=absent,
            hyperparameters=[group._to_proto() for group in hyperparameters or ()],
            weight=weight,
        )
        self._address(header)
        return header

    def _address(self, header: rpc.PushHeader) -> None:
        """Makes it the header of the session's next push."""
        header.MergeFrom(rpc.PushHeader(**self._session.id, sequence=self._sequence))

    def _push_after_any(
        self,
        header: rpc.PushHeader,
        pushed: FlatVector,
        absent: list[int],
        target: FlatVector,
        mended: StaleGradientError | None,
    ) -> None:
        """Pushes, whatever became of the push before; raises `mended`, if anything, instead of a push beyond that."""
        sent = self._sent
        try:
            self._push(header, pushed, absent, target)
        except ConflictError as error:
            if error.reason != "SEQUENCE_REUSED" or not sent:
                raise
            self._skip_accepted(target)
            if mended:
                raise mended from None
            self._address(header)
            self._push(header, pushed, absent, target)

    def _push(self, header: rpc.PushHeader, pushed: FlatVector, absent: list[int], target: FlatVector) -> None:
        failpoint("worker.before_send")
        # From here on an interrupt, or the refusal of a second attempt, says nothing of what became of the first.
        unsure, self._sent = self._sent, True
        self._take_note(None)
        try:
            result, position = self._exchange.step(
                header, pushed, absent, target, self._check, self._arriving, unsure=unsure
            )
            self._torn = False
        except StaleGradientError as error:
            self._catch_up(error, target)
            raise
        except Error as error:
            if isinstance(error, UnavailableError) and error.reason is None:
                where = f"deltaserve status {self._model} --target {self._connection.target}"
                error.add_note(f"If the server is there, the push waits for other workers; to see for whom: {where}")
            raise self._explained(error) from None
        self._take_note(result)
        if result.duplicate:
            _log.info("worker %s: push %d had been applied by an earlier attempt", self.name, self._sequence)
        self._moved(position)
        # Last, and without a call that could be interrupted: until then the answer counts as lost.
        self._sequence += 1
        self._sent = False
        failpoint("worker.recorded")

    # --- what comes

    def _pull(self, target: FlatVector, wait_for_version: int | None) -> None:
        deadline = monotonic() + self._connection.timeout_seconds
        while True:
            request = rpc.PullRequest(model=self._model, wait_for_version=wait_for_version)
            try:
                self._moved(self._exchange.pull(request, target, self._arriving))
            except Error as error:
                raise self._explained(error) from None
            if self._position.version >= (wait_for_version or 0):
                return
            if monotonic() > deadline:
                raise UnavailableError(f"model {self._model} has not reached version {wait_for_version} in time")

    def _refresh(self, target: FlatVector, wait_for_version: int | None) -> StaleGradientError | None:
        """Pulls, however often the server is started anew meanwhile; returns what is owed to the caller by then."""
        while True:
            try:
                self._pull(target, wait_for_version)
            except _RestartedError:
                if self._go_on():
                    wait_for_version = self._first_version
            else:
                owed, self._owed = self._owed, None
                return owed

    def _catch_up(self, error: StaleGradientError, target: FlatVector) -> None:
        """Takes the weights that a gradient should have been of. Its number is free: no attempt at it is accepted."""
        error.add_note("Newer weights are in place now.")
        self._sent = False
        # Last: whoever is interrupted later must not take the gradient for one of these weights.
        self._pull(target, int(error.metadata["current"]))

    def _go_on(self) -> StaleGradientError | None:
        """Goes on with a server that was started anew: in the same session, where it has lost nothing.

        Returns:
            As `_rejoin`.
        """
        try:
            self._position = self._session.keep().position
        except SessionError as error:
            if error.reason != "SESSION_UNKNOWN":
                raise
            return self._rejoin()
        except Error as error:
            raise self._explained(error) from None
        _log.info("worker %s: the server was restarted, and nothing is lost", self.name)
        self._share_again = True  # not now: what became of the last push is not known
        return None

    def _rejoin(self) -> StaleGradientError | None:
        """Opens a new session where the old one is not known any more.

        Its lease ran out, as after a pause or a long silence; or the server was started anew from an older state. A
        push that the old session had accepted is still answered there, also by a server that was started anew: then the
        worker stays, and takes that.

        Returns:
            What to raise where the weights that the worker has are lost, or where the server does not know any more
            which pushes the old session made. It is owed until `_refresh` returns it.
        """
        known = self._ask(self._sequence)
        if known and known.state != rpc.PUSH_STATE_NOT_ACCEPTED:
            self._position = known.position
            self._lineage = known.lineage  # nothing that this worker knows is lost there
            return None
        finalize, lineage, next_number = self._finalize, self._lineage, self._sequence
        self._session.lose()
        try:
            self._join()
        except Error as error:
            raise self._explained(error) from None
        lost = range(known.last_applied_sequence + 1 if known else 1, next_number)
        self._owed = self._owed or self._found_out(lineage, lost, known is not None)
        self._share()
        failpoint("worker.rejoined")
        finalize.detach()
        return self._owed

    def _found_out(self, lineage: bytes | None, lost: range, known: bool) -> StaleGradientError | None:
        """Returns what a new session tells of the one before.

        Args:
            lineage: What the worker knew the model by.
            lost: Numbers of the pushes that are lost, if the model went back.
            known: Whether the server knows the session before.
        """
        if self._lineage != lineage:
            return self._rolled_back(lineage, lost)
        _log.warning("worker %s: the lease had run out; it goes on in a new session", self.name)
        if known:
            return None
        return StaleGradientError(
            f"worker {self.name}: the lease had run out too long ago to know whether the last push was applied; the "
            "gradient is left out, a new session is open and newer weights are in place"
        )

    def _rolled_back(self, lineage: bytes | None, lost: range) -> RolledBackError | None:
        """Compares what this worker has with what is left of the lineage that it knew."""
        version, ancestors = self.version, self._session.opened.ancestors
        restored = next(one.version for one in ancestors if one.lineage == lineage)
        if version <= restored and not lost:
            _log.warning("worker %s: the server was restarted; it goes on in a new session", self.name)
            return None
        return rolled_back(self.name, self._model, version, restored, lost)

    def _ask(self, number: int) -> rpc.GetPushResponse | None:
        """Returns what became of a push of the session; None where that is no longer known."""
        request = rpc.GetPushRequest(model=self._model, session_id=self._session.id["session_id"], sequence=number)
        try:
            answer: rpc.GetPushResponse = self._connection.call("GetPush", request)
        except SessionError:
            return None
        return answer

    def _is_accepted(self) -> bool:
        """Whether the server has the push whose answer was lost; if it has not, it may still get it."""
        push = self._ask(self._sequence)
        return push is not None and push.state != rpc.PUSH_STATE_NOT_ACCEPTED

    def _skip_accepted(self, target: FlatVector) -> None:
        """Goes on after an interrupted push that was accepted: if it counts, the next one takes the next number."""
        push, deadline = self._ask(self._sequence), monotonic() + self._connection.timeout_seconds
        while push and push.state == rpc.PUSH_STATE_WAITING:  # asked for again: a round that fails makes no version
            if monotonic() > deadline:
                raise UnavailableError(f"worker {self.name}: push {self._sequence} still waits for its round")
            sleep(_POLL_SECONDS)
            push = self._ask(self._sequence)
        if push is None:  # as of a session that a restart has lost
            raise SessionError(f"worker {self.name}: the session ended too long ago", reason="SESSION_UNKNOWN")
        counts = push.state == rpc.PUSH_STATE_APPLIED
        if counts:
            _log.warning("worker %s: push %d, whose answer was lost, counts", self.name, self._sequence)
        self._pull(target, push.position.version)
        self._take_note(push.result if push.HasField("result") else None)
        self._sequence += counts
        self._sent = False

    def _check(self, position: common_pb2.ModelPosition) -> None:
        """Looks at where the model stands, as an answer has it.

        Raises:
            _RestartedError: It is of another incarnation than what came before.
            Error: It is not of the model that the session was opened with.
        """
        before = self._position
        if position.incarnation != before.incarnation:
            raise _RestartedError
        if position.version < before.version:
            raise Error(f"model {self._model} went back from version {before.version} to {position.version}")

    def _arriving(self, position: common_pb2.ModelPosition) -> None:
        """Looks at an answer before its weights are written; until the last of them is, they are of two versions."""
        self._check(position)
        self._torn = True

    def _take_note(self, result: rpc.PushResult | None) -> None:
        """Takes note of what became of a push."""
        self._result, self._last_result = result, None

    def _moved(self, position: common_pb2.ModelPosition) -> None:
        """Takes note of the version that the weights now have."""
        self._position = position
        self._version = position.version
        self._torn = False

    def _torn_text(self) -> str:
        return (
            f"worker {self.name}: weights had arrived in part only, and the gradient is of those; they are whole now: "
            "compute it again"
        )

    def _explained(self, error: Error) -> Error:
        """Returns the error, or what it means where the server is another than the session was opened with."""
        return explained(error, self._connection, self._model, self._position)

    @property
    def _last_number(self) -> int:
        """The number of the last push that was sent; 0 before the first."""
        return self._sequence if self._sent else self._sequence - 1

    def _fate(self) -> str:
        """Says what became of the last push, for a session that is over."""
        try:
            push = self.get_push()
        except (Error, ValueError):
            return "What became of its last push is not known."
        version = f", as part of version {push.result.version}" if push.result else ""
        return f"Its last push, number {self._last_number}: {push.state}{version}."

    def _memory(self, out: Mapping[str, Array] | None) -> dict[str, Array]:
        if out is None:
            return dict(self._own or {spec.name: np.empty(spec.shape, np.float32) for spec in self.tensors})
        arrays = {spec.name: _checked(spec, out) for spec in self.tensors}
        self._own = None  # no longer the newest
        return arrays


def _checked(spec: TensorSpec, out: Mapping[str, Array]) -> Array:
    array = out.get(spec.name)
    if array is None:
        raise ValueError(f"out: tensor {spec.name} is missing")
    if array.shape != spec.shape or array.dtype != np.dtype("<f4") or not array.flags.carray:
        raise ValueError(f"out: tensor {spec.name} must be a writable C-contiguous float32 array of shape {spec.shape}")
    return array
