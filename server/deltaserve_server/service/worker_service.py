"""WorkerService: sessions, steps and pulls."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from time import monotonic
from typing import Any

import grpc

from deltaserve._codec import Piece, StreamCodec
from deltaserve._failpoints import failpoint
from deltaserve._flat import CHUNK_ELEMENTS
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server.memory.store import ELEMENT_BYTES
from deltaserve_server.model import Hyperparameters, Push, PushResult, Refused
from deltaserve_server.service import admission, convert
from deltaserve_server.service.admission import Gate
from deltaserve_server.service.registry import Registry
from deltaserve_server.service.rpc import wait

_STEP = StreamCodec(rpc.StreamStepResponse)
_PULL = StreamCodec(rpc.PullResponse)

_SPARE_BYTES = 1 << 16
"""Room in a Step's messages for all but the vector."""

_WEIGHTS = 1e-9, 1e9

_STATES = {
    "not accepted": rpc.PUSH_STATE_NOT_ACCEPTED,
    "waiting": rpc.PUSH_STATE_WAITING,
    "applied": rpc.PUSH_STATE_APPLIED,
}


class WorkerServicer:
    """Serves WorkerService.

    Args:
        registry: The server's models.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def OpenSession(self, request: rpc.OpenSessionRequest, _: grpc.ServicerContext) -> rpc.OpenSessionResponse:
        """Gives a worker a standing with a model."""
        worker = convert.checked_name("worker", request.worker)
        tensor_count = request.tensor_count if request.HasField("tensor_count") else None
        group_count = request.group_count if request.HasField("group_count") else None
        session = self._registry.open_session(request.model, worker, self._lease(request), tensor_count, group_count)
        return rpc.OpenSessionResponse(
            session_id=session.id,
            epoch=session.epoch,
            rank=session.rank,
            lease_seconds=session.lease_seconds,
            first_version=session.first_version,
            tensor_count=session.tensor_count,
            position=self._registry.get(request.model).position,
        )

    def KeepSession(self, request: rpc.KeepSessionRequest, _: grpc.ServicerContext) -> rpc.KeepSessionResponse:
        """Renews a lease, and tells what was applied."""
        applier = self._registry.get(request.model)
        session = applier.keep_session(request.session_id, request.epoch)
        return rpc.KeepSessionResponse(
            lease_seconds=session.lease_seconds,
            last_applied_sequence=session.last_applied,
            last_accepted_sequence=session.last_accepted,
            position=applier.position,
        )

    def CloseSession(self, request: rpc.CloseSessionRequest, _: grpc.ServicerContext) -> rpc.CloseSessionResponse:
        """Lets a worker leave."""
        applier = self._registry.get(request.model)
        applier.close_session(request.session_id, request.epoch)
        return rpc.CloseSessionResponse(position=applier.position)

    def Step(self, request: rpc.StepRequest, context: grpc.ServicerContext) -> rpc.StepResponse:
        """Push and weights in one message each way."""
        if not request.HasField("header"):
            raise Refused("MESSAGE_INVALID", message="StepRequest: it has a header")
        reception = _Reception(self._registry, request.header)
        size = reception.weights_size * ELEMENT_BYTES
        if size > self._registry.config.message_bytes - _SPARE_BYTES:
            allowed = f"a vector of at most {self._registry.config.message_bytes - _SPARE_BYTES} bytes: use StreamStep"
            raise Refused("PUSH_INVALID", field="gradient", allowed=allowed)
        result = reception.push(reception.gate.cut(memoryview(request.gradient)), context)
        with reception.applier.reading(context.is_active) as (position, weights):
            raw = weights[: reception.weights_size].tobytes()
        return rpc.StepResponse(result=_result(result), position=position, weights=raw)

    def StreamStep(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The same in chunks."""
        header = next(messages, None)
        if not isinstance(header, rpc.PushHeader):
            raise Refused("MESSAGE_INVALID", message="StreamStepRequest: the stream begins with a PushHeader")
        reception = _Reception(self._registry, header)
        result = reception.push(reception.pieces(messages), context)
        with reception.applier.reading(context.is_active) as (position, weights):
            yield _STEP.header(rpc.StreamStepHeader(result=_result(result), position=position))
            for offset, data in admission.chunks(weights, reception.weights_size, CHUNK_ELEMENTS):
                yield _STEP.chunk("weights", offset, [data])

    def Pull(self, request: rpc.PullRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The weights of the current version."""
        applier = self._registry.get(request.model)
        if request.HasField("wait_for_version"):
            reached = applier.reached(request.wait_for_version, self._registry.config.sessions)
            try:
                wait(context, reached)
            finally:
                applier.forget(reached)
        with applier.reading() as (position, weights):
            not_modified = request.HasField("newer_than") and position.version <= request.newer_than
            count = 0 if not_modified else weights.size
            yield _PULL.header(rpc.PullHeader(position=position, not_modified=not_modified, element_count=count))
            for offset, data in admission.chunks(weights, count, CHUNK_ELEMENTS):
                yield _PULL.chunk("weights", offset, [data])

    def GetPush(self, request: rpc.GetPushRequest, _: grpc.ServicerContext) -> rpc.GetPushResponse:
        """What became of a push."""
        applier = self._registry.get(request.model)
        with applier.event():
            status = applier.machine.push_status(request.session_id, request.sequence)
            return rpc.GetPushResponse(
                state=_STATES[status.state],
                final=status.final,
                result=_result(status.result) if status.result else None,
                position=applier.position,
            )

    def _lease(self, request: rpc.OpenSessionRequest) -> float:
        config = self._registry.config
        if not request.HasField("lease_seconds"):
            return config.lease_seconds
        asked = request.lease_seconds
        if not isfinite(asked) or not config.lease_seconds_min <= asked <= config.lease_seconds_max:
            allowed = f"{config.lease_seconds_min:g} to {config.lease_seconds_max:g}"
            raise Refused("POLICY_INVALID", field="lease_seconds", allowed=allowed)
        return asked


class _Reception:
    """One push on its way in, for both doors: looked at by its header, then by its values, then taken.

    Raises:
        Refused: The header alone is enough to refuse it.

    Attributes:
        applier: Owns the model.
        gate: Lets its chunks pass.
        weights_size: Number of elements that the session knows.
    """

    def __init__(self, registry: Registry, header: rpc.PushHeader) -> None:
        self._registry = registry
        self.applier = registry.get(header.model)
        if not self.applier.waiting:  # while draining, a round that is under way is still finished
            registry.check_open()
        with self.applier.event():
            machine = self.applier.machine
            self._push = _push(header, machine.groups, len(machine.layout.tensors))
            self._session = self.applier.check(self._push)
            self._layout = machine.layout
        _check_absent(header.absent_tensors, self._session.tensor_count)
        self.gate = Gate(self._layout.runs(self._session.tensor_count, self._push.absent))
        self.weights_size = self._layout.offsets[self._session.tensor_count]
        failpoint("push.headers")

    def pieces(self, messages: Iterator[Any]) -> Iterator[tuple[int, memoryview]]:
        """Yields a stream's chunks; each renews the lease, for a slow worker is not a dead one."""
        for message in messages:
            if not isinstance(message, Piece):
                raise Refused("MESSAGE_INVALID", message="StreamStepRequest: chunks follow the PushHeader")
            self._session.renew(monotonic())
            yield message.offset, message.data

    def push(self, pieces: Iterable[tuple[int, memoryview]], context: grpc.ServicerContext) -> PushResult:
        """Takes the values in, hands the push over, and waits for its update; meanwhile the session stays alive."""
        accepted = self._take(pieces)
        with self.applier.present(self._session):
            failpoint("push.waiting")
            result = wait(context, accepted)
        failpoint("push.acknowledged")
        return result

    def _take(self, pieces: Iterable[tuple[int, memoryview]]) -> "Future[PushResult]":
        reservation = self._registry.staged.reserve(self.applier.staging_bytes(self.gate.size))
        try:
            staging = self.applier.stage()
            seen = admission.admit_push(pieces, self.gate, self._layout, staging)
            push = replace(self._push, fingerprint=seen.fingerprint, norm=seen.norm)
            return self.applier.push(push, staging, reservation)
        except BaseException:
            reservation.release()
            raise


def _push(header: rpc.PushHeader, groups: Sequence[Hyperparameters], tensor_count: int) -> Push:
    """Returns the push that a header announces; `groups` has what its hyperparameters leave unset."""
    if len(header.hyperparameters) > len(groups):
        raise Refused("HYPERPARAMETER_INVALID", field="hyperparameters", allowed=f"{len(groups)} groups")
    if len(header.absent_tensors) > tensor_count:
        raise _absent_refused(tensor_count)
    return Push(
        session_id=header.session_id,
        epoch=header.epoch,
        sequence=header.sequence,
        base_version=header.base_version if header.HasField("base_version") else None,
        hyperparameters=convert.to_groups(header.hyperparameters, groups) or None,
        absent=frozenset(header.absent_tensors),
        weight=_weight(header),
    )


def _weight(header: rpc.PushHeader) -> float:
    weight = header.weight if header.HasField("weight") else 1.0
    if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
        raise Refused("PUSH_INVALID", field="weight", allowed=f"{_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}")
    return weight


def _check_absent(indices: Sequence[int], tensor_count: int) -> None:
    """Raises Refused PUSH_INVALID for absent tensors that are not ascending indices of the session's tensors."""
    ascending = all(left < right for left, right in pairwise(indices))
    if not ascending or (indices and indices[-1] >= tensor_count):
        raise _absent_refused(tensor_count)


def _absent_refused(tensor_count: int) -> Refused:
    return Refused("PUSH_INVALID", field="absent_tensors", allowed=f"ascending indices of {tensor_count} tensors")


def _result(result: PushResult) -> rpc.PushResult:
    share, made = result.share, result.made
    if share is None or made is None:
        return rpc.PushResult(version=result.version, duplicate=result.duplicate)
    return rpc.PushResult(
        version=result.version,
        duplicate=result.duplicate,
        staleness=share.staleness,
        contributors=len(made.shares),
        hyperparameters=convert.from_groups(made.hyperparameters),
        gradient_norm=share.norm,
        update_norm=made.norm,
    )
