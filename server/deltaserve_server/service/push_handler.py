"""A push on its way in, by any door: its header, its values, and the wait for its update."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from time import monotonic
from typing import Any

import grpc

from deltaserve._common.codec import Chunk
from deltaserve._common.failpoints import failpoint
from deltaserve.v1 import worker_service_pb2 as rpc
from deltaserve_server.adadelta.formats import Values
from deltaserve_server.engine.catalog import ModelCatalog
from deltaserve_server.memory import Staging
from deltaserve_server.memory.store import ELEMENT_BYTES
from deltaserve_server.model import Hyperparameters, Push, PushResult, Refused, Sync
from deltaserve_server.service import admission, conversion
from deltaserve_server.service.admission import ChunkValidator, ValueChecker
from deltaserve_server.service.element_types import element_type_of
from deltaserve_server.service.rpc import wait

_WEIGHTS = 1e-9, 1e9

_RETRY_SECONDS = 0.05


class PushHandler:
    """One push on its way in, for both doors: looked at by its header, then by its values, then taken.

    Raises:
        Refused: The header alone is enough to refuse it.

    Attributes:
        engine: Owns the model.
        gate: Lets its chunks pass.
        weights_size: Number of elements that the session knows.
        wire: The type of elements in the answer.
    """

    def __init__(self, catalog: ModelCatalog, header: rpc.PushHeader) -> None:
        self._catalog = catalog
        self.engine = catalog.get(header.model)
        if not self.engine.waiting:  # while draining, a round that is under way is still finished
            catalog.check_open()
        with self.engine.event():
            machine = self.engine.machine
            self._push = _push(header, machine.groups, len(machine.layout.tensors))
            self._session = self.engine.check(self._push)
            self._layout = machine.layout
            # Where it is to wait for its round, or to be written down, a shared push is copied. Otherwise it is used
            # where it is: should the worker alter it meanwhile, contrary to the protocol, its own gradient is another.
            waits = isinstance(machine.policy, Sync) or self.engine.journals
            self._in_place = header.shared_memory and not waits
        _check_absent(header.absent_tensors, self._session.tensor_count)
        runs = self._layout.runs(self._session.tensor_count, self._push.absent)
        self.gate = ChunkValidator(runs, element_type_of(header.gradient_type))
        self.wire = element_type_of(header.weights_type)
        self.weights_size = self._layout.offsets[self._session.tensor_count]
        failpoint("push.headers")

    def pieces(self, messages: Iterator[Any]) -> Iterator[tuple[int, Values]]:
        """Yields the values of a stream's chunks; each renews the lease, for a slow worker is not a dead one."""
        for message in messages:
            if not isinstance(message, Chunk):
                raise Refused("MESSAGE_INVALID", message="StreamStepRequest: chunks follow the PushHeader")
            self._session.renew(monotonic())
            yield message.offset, self.gate.take(message.offset, message.data)

    def push(self, pieces: Iterable[tuple[int, Values]], context: grpc.ServicerContext) -> PushResult:
        """Takes the values in, hands the push over, and waits for its update; meanwhile the session stays alive."""

        def admit(staging: Staging) -> ValueChecker:
            return admission.admit_push(pieces, self.gate, self._layout, staging)

        return self._wait(self._take(self.gate.size_bytes, admit), context)

    def push_shared(self, context: grpc.ServicerContext) -> PushResult:
        """The same for values that lie in the session's shared memory."""
        memory = self.engine.shared_memory(self._session.id)
        if self.gate.size_bytes != self.gate.size * ELEMENT_BYTES:
            raise Refused("PUSH_INVALID", field="gradient_type", allowed="DATA_TYPE_FLOAT32 in shared memory")
        if memory is None:
            raise Refused("SHARED_MEMORY_UNAVAILABLE", why="the session has none: call OpenSharedMemory first")
        vector, crew = memory[: self.weights_size], (self._catalog.executor, self._catalog.threads)

        def admit(staging: Staging) -> ValueChecker:
            return admission.admit_shared(vector, self.gate, self._layout, staging, *crew, in_place=self._in_place)

        return self._wait(self._take(0 if self._in_place else self.gate.size_bytes, admit), context)

    def _wait(self, accepted: "Future[PushResult]", context: grpc.ServicerContext) -> PushResult:
        failpoint("push.waiting")
        if accepted.done():
            result = accepted.result()
        else:
            with self.engine.present(self._session):
                result = wait(context, accepted)
        failpoint("push.acknowledged")
        return result

    def _take(self, kept_bytes: int, admit: Callable[[Staging], ValueChecker]) -> "Future[PushResult]":
        """Admits a push of which so many bytes are kept as they came, and hands it over."""
        with ExitStack() as undo:
            reservation = undo.enter_context(self._catalog.staged.reserve(self.engine.staging_bytes(kept_bytes)))
            staging = self.engine.stage()
            seen = admit(staging)
            push = replace(self._push, fingerprint=seen.fingerprint, norm=seen.norm)
            with self.engine.event():
                if self._in_place and isinstance(self.engine.machine.policy, Sync):
                    raise Refused("SHARED_MEMORY_UNAVAILABLE", _RETRY_SECONDS, why="the policy has just changed")
                accepted = self.engine.push(push, staging, reservation)
                undo.pop_all()  # it is the engine's, also if what has happened cannot be written down
        return accepted


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
        hyperparameters=conversion.to_groups(header.hyperparameters, groups) or None,
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
