"""One push, from its header to its result."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from time import sleep
from typing import Any

import grpc

from deltaserve._common.codec import Chunk
from deltaserve._common.failpoints import failpoint
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server.engine.catalog import ModelCatalog
from deltaserve_server.engine.events import Position
from deltaserve_server.memory import BudgetExceeded, Reservation, Staging
from deltaserve_server.memory.store import ELEMENT_BYTES, Vector
from deltaserve_server.model import Machine, Push, PushResult, Refused, Sync
from deltaserve_server.optimizers.formats import Values
from deltaserve_server.service import admission, optimizers
from deltaserve_server.service.admission import ChunkValidator, ValueChecker
from deltaserve_server.service.element_types import element_type_of
from deltaserve_server.service.method_handlers import wait

_WEIGHTS = 1e-9, 1e9

_RETRY_SECONDS = 0.05


class PushHandler:
    """Checks one push by its header, then takes its values, hands it to the engine and waits for its result.

    Raises:
        Refused: The header alone is reason enough.

    Attributes:
        engine: The model's engine.
        validator: Checks the push's chunks.
        weights_size: Number of elements that the session knows; the answer has as many.
        weights_type: Element type of the answer.
    """

    def __init__(self, catalog: ModelCatalog, header: rpc.PushHeader) -> None:
        self._quotas = catalog.quotas
        self._now = catalog.clock.monotonic
        self.engine = engine = catalog.get(header.model)
        if header.HasField("lineage") and header.lineage != engine.head.lineage:
            # First of all: whatever else the worker knows of the model may belong to versions that are lost.
            raise Refused("LINEAGE_CHANGED", model=header.model)
        if not engine.waiting:  # a draining server still completes the rounds that are under way
            catalog.quotas.check_open()
        with engine.lock:
            machine = engine.machine
            self._push = _push(header, machine)
            self._session = engine.check(self._push)
            self._layout = machine.layout
            # A shared push that waits for its round, or for the journal, is copied. Any other is used where it is: a
            # worker that changes it early, against the protocol, only changes its own gradient.
            waits = isinstance(machine.policy, Sync) or engine.journals
            self._in_place = header.shared_memory and not waits
        count, absent = self._session.tensor_count, header.absent_tensors
        if any(left >= right for left, right in pairwise(absent)) or (absent and absent[-1] >= count):
            raise _absent_refused(count)
        runs = self._layout.runs(count, self._push.absent)
        self.validator = ChunkValidator(runs, element_type_of(header.gradient_type))
        self.weights_type = element_type_of(header.weights_type)
        self.weights_size = self._layout.offsets[count]
        failpoint("push.headers")

    def chunks(self, messages: Iterator[Any]) -> Iterator[tuple[int, Values]]:
        """Yields offset and values of a stream's chunks. Each chunk renews the lease: a slow worker is alive."""
        for message in messages:
            if not isinstance(message, Chunk):
                raise Refused("MESSAGE_INVALID", message="StreamStepRequest: chunks follow the PushHeader")
            self._session.renew(self._now())
            yield message.offset, self.validator.take(message.offset, message.data)

    def push(self, chunks: Iterable[tuple[int, Values]], context: grpc.ServicerContext) -> PushResult:
        """Takes the values that `chunks` yields; returns the push's result once its update is made."""
        with ExitStack() as undo:
            staging, reservation = self._stage(self.validator.size_bytes, undo)
            checker = admission.admit_push(chunks, self.validator, self._layout, staging)
            future = self._hand_over(checker, staging, reservation, undo)
        return self._wait(future, context)

    def push_shared(self, context: grpc.ServicerContext, executor: Executor, threads: int) -> PushResult:
        """Takes the values that lie in the session's shared memory; up to `threads` threads check them. See `push`."""
        shared = self.engine.shared_gradient(self._session.id)
        # The memory is sized for float32, and the kernels read it as such.
        if self.validator.size_bytes != self.validator.size * ELEMENT_BYTES:
            raise Refused("PUSH_INVALID", field="gradient_type", allowed="DATA_TYPE_FLOAT32 in shared memory")
        if shared is None:
            raise Refused("SHARED_MEMORY_UNAVAILABLE", why="the session has none: call OpenSharedMemory first")
        vector = shared[: self.weights_size]
        with ExitStack() as undo:
            staging, reservation = self._stage(0 if self._in_place else self.validator.size_bytes, undo)
            failpoint("push.chunk")
            if not self._in_place:
                vector = admission.copy_shared(vector, executor, threads)
            checker = admission.admit_shared(vector, self.validator, self._layout, staging, executor, threads)
            future = self._hand_over(checker, staging, reservation, undo)
        return self._wait(future, context)

    @contextmanager
    def reading(self, context: grpc.ServicerContext) -> Iterator[tuple[Position, Vector]]:
        """Gives the weights for the answer. If there is no memory for them, the caller waits until there is.

        The push is applied: an error would tell the worker nothing that it could act on.
        """
        while True:
            try:
                position, version = self.engine.acquire_version(applied=True)
                break
            except BudgetExceeded:
                if not context.is_active():
                    raise
            sleep(_RETRY_SECONDS)
        try:
            yield position, version.weights
        finally:
            version.release()

    def _stage(self, received_bytes: int, undo: ExitStack) -> tuple[Staging, Reservation]:
        """Reserves memory for a push's values and returns their place; `received_bytes` are kept as they arrive."""
        reservation = self._quotas.staged.reserve(self.engine.staging_bytes(received_bytes))
        return self.engine.stage(), undo.enter_context(reservation)

    def _hand_over(
        self, checker: ValueChecker, staging: Staging, reservation: Reservation, undo: ExitStack
    ) -> "Future[PushResult]":
        push = replace(self._push, fingerprint=checker.fingerprint, norm=checker.norm)
        with self.engine.lock:
            # The policy may have changed since the header: a push that waits must not lie in the worker's memory.
            if self._in_place and isinstance(self.engine.machine.policy, Sync):
                raise Refused("SHARED_MEMORY_UNAVAILABLE", _RETRY_SECONDS, why="the policy has just changed")
            future = self.engine.push(push, staging, reservation)
            undo.pop_all()  # under the lock: the engine owns the memory even if leaving the lock fails on the journal
        return future

    def _wait(self, future: "Future[PushResult]", context: grpc.ServicerContext) -> PushResult:
        failpoint("push.waiting")
        if future.done():
            result = future.result()
        else:
            with self.engine.kept_alive(self._session):
                result = wait(context, future)
        failpoint("push.acknowledged")
        return result


def _push(header: rpc.PushHeader, machine: Machine) -> Push:
    """Returns the push that a header announces; hyperparameters that it leaves unset are the model's."""
    groups, tensor_count = machine.groups, len(machine.layout.tensors)
    if len(header.hyperparameters) > len(groups):
        raise Refused("HYPERPARAMETER_INVALID", field="hyperparameters", allowed=f"{len(groups)} groups")
    hyperparameters = optimizers.to_groups(header.hyperparameters, field="hyperparameters", unset=groups)
    optimizers.check_matches(machine.name, groups[0], hyperparameters)
    if len(header.absent_tensors) > tensor_count:  # before a set is built of what may be millions
        raise _absent_refused(tensor_count)
    weight = header.weight if header.HasField("weight") else 1.0
    if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
        raise Refused("PUSH_INVALID", field="weight", allowed=f"{_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}")
    return Push(
        session_id=header.session_id,
        epoch=header.epoch,
        sequence=header.sequence,
        base_version=header.base_version if header.HasField("base_version") else None,
        hyperparameters=hyperparameters or None,
        absent=frozenset(header.absent_tensors),
        weight=weight,
    )


def _absent_refused(tensor_count: int) -> Refused:
    return Refused("PUSH_INVALID", field="absent_tensors", allowed=f"ascending indices of {tensor_count} tensors")
