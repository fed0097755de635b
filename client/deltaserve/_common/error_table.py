"""The table of errors: the server turns a reason into a status, the client a status into an exception."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from string import Formatter

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from deltaserve._errors import (
    ConflictError,
    Error,
    RequestError,
    ServerError,
    SessionError,
    StaleGradientError,
    StateLostError,
    UnavailableError,
)

DOMAIN = "deltaserve.dev"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the error table: the status code, the exception and the text of a reason.

    Attributes:
        code: The gRPC status code.
        exception: The exception that the client raises.
        text: The message, one line; fields in braces are metadata keys.
    """

    code: grpc.StatusCode
    exception: type[Error]
    text: str

    @property
    def keys(self) -> frozenset[str]:
        """The metadata keys."""
        return frozenset(name for _, name, _, _ in Formatter().parse(self.text) if name)


_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_EXISTS = grpc.StatusCode.ALREADY_EXISTS
_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

TABLE: Mapping[str, Row] = {
    "MESSAGE_INVALID": Row(_INVALID, RequestError, "not a valid {message}"),
    "NAME_INVALID": Row(_INVALID, RequestError, "{field}: expected {allowed}"),
    "SHAPE_INVALID": Row(_INVALID, RequestError, "shape of tensor {tensor}: expected {allowed}, got {shape}"),
    "DTYPE_UNSUPPORTED": Row(_INVALID, RequestError, "type of tensor {tensor}: expected {allowed}, got {got}"),
    "HYPERPARAMETER_INVALID": Row(_INVALID, RequestError, "{field}: expected {allowed}"),
    "OPTIMIZER_UNKNOWN": Row(
        _INVALID, RequestError, "{field}: no optimizer that this server knows is set; it has {allowed}"
    ),
    "OPTIMIZER_MISMATCH": Row(
        _PRECONDITION, ConflictError, "model {model} has the optimizer {expected}, not {got}, and keeps it"
    ),
    "STATE_MISMATCH": Row(_INVALID, RequestError, "optimizer state: expected {expected}, got {got}"),
    "POLICY_INVALID": Row(_INVALID, RequestError, "{field}: expected {allowed}"),
    "CHUNK_SEQUENCE": Row(_INVALID, RequestError, "chunks: expected {expected}, got {got}"),
    "PUSH_INCOMPLETE": Row(_INVALID, RequestError, "the stream ended early: expected {expected} elements, got {got}"),
    "VALUE_NOT_FINITE": Row(_INVALID, RequestError, "NaN or infinity in tensor {tensor} at element {index}"),
    "VALUE_TOO_LARGE": Row(
        _INVALID, RequestError, "value in tensor {tensor} at element {index} is too large: its square is not finite"
    ),
    "PUSH_INVALID": Row(_INVALID, RequestError, "{field}: expected {allowed}"),
    "MODEL_NOT_FOUND": Row(grpc.StatusCode.NOT_FOUND, RequestError, "no model is named '{model}'"),
    "MODEL_MISMATCH": Row(_EXISTS, ConflictError, "model {model} exists and differs: {difference}"),
    "SESSION_UNKNOWN": Row(
        _PRECONDITION, SessionError, "no such session: it was closed, or its lease ran out; open a new one"
    ),
    "SESSION_FENCED": Row(
        _PRECONDITION,
        SessionError,
        "a newer session of worker {worker} has taken over (epoch {current}, this one is {epoch}): "
        "give every worker its own name",
    ),
    "SEQUENCE_GAP": Row(_PRECONDITION, ConflictError, "sequence number: expected {expected}, got {got}"),
    "SEQUENCE_REUSED": Row(_EXISTS, ConflictError, "sequence number {sequence} was used for another gradient"),
    "ROUND_CLOSED": Row(
        _PRECONDITION,
        StaleGradientError,
        "the gradient was computed on version {base}, its round needs {current}: pull that, compute again, push",
    ),
    "HYPERPARAMETER_CONFLICT": Row(
        _PRECONDITION, ConflictError, "{field}: other workers push {round} in this round, got {got}"
    ),
    "MEMORY_BUDGET": Row(
        _EXHAUSTED,
        UnavailableError,
        "needs {needed} bytes of the server's memory budget, {available} bytes are available",
    ),
    "SESSION_LIMIT": Row(_EXHAUSTED, UnavailableError, "the server has reached its limit of {limit} sessions"),
    "MODEL_LIMIT": Row(_EXHAUSTED, UnavailableError, "the server has reached its limit of {limit} models"),
    "RECOVERING": Row(
        grpc.StatusCode.UNAVAILABLE,
        UnavailableError,
        "the server still reads model {model} from its disk: {percent} % done, about {seconds} s left",
    ),
    "STORAGE_UNAVAILABLE": Row(
        grpc.StatusCode.UNAVAILABLE, UnavailableError, "the server cannot use its data directory: {why}"
    ),
    "NOT_DURABLE": Row(
        _PRECONDITION, RequestError, "the server has no data directory: start it with --data-dir to have snapshots"
    ),
    "LINEAGE_UNKNOWN": Row(
        _PRECONDITION,
        StateLostError,
        "model {model} is a different model of the same name than the one that the worker knew",
    ),
    "LINEAGE_CHANGED": Row(
        _PRECONDITION,
        ConflictError,
        "the server has restarted since the worker learned the lineage of model {model}: KeepSession tells the new one",
    ),
    "DRAINING": Row(grpc.StatusCode.UNAVAILABLE, UnavailableError, "the server is about to stop"),
    "STALE_BASE": Row(
        grpc.StatusCode.ABORTED,
        StaleGradientError,
        "the gradient was computed on version {base}, more than {bound} before the current {current}: "
        "pull, compute again, push",
    ),
    "ROUND_FAILED": Row(
        grpc.StatusCode.ABORTED,
        UnavailableError,
        "the round's time was up with {got} of the {need} pushes that it needs; none was applied: step again",
    ),
    "WATCHER_LIMIT": Row(_EXHAUSTED, UnavailableError, "the server has reached its limit of {limit} watchers"),
    "SLACK_EXCEEDED": Row(
        _PRECONDITION,
        UnavailableError,
        "the worker is {ahead} steps ahead of the slowest, {slack} are allowed: the answer to its last push waits",
    ),
    "INTERNAL": Row(
        grpc.StatusCode.INTERNAL, ServerError, "the server has a bug; look for incident {incident} in its log"
    ),
    "SHARED_MEMORY_UNAVAILABLE": Row(_PRECONDITION, RequestError, "no shared memory: {why}"),
}


def to_status(reason: str, metadata: Mapping[str, str], retry_seconds: float | None = None) -> grpc.Status:
    """Returns the status with which a server ends a call.

    Args:
        reason: A key of TABLE.
        metadata: A value for each of the row's keys, and no other.
        retry_seconds: Time after which the same request may succeed; None if a retry does not help.
    """
    row = TABLE[reason]
    status = status_pb2.Status(code=code_pb2.Code.Value(row.code.name), message=row.text.format_map(metadata))
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(metadata))
    status.details.add().Pack(info)
    if "field" in row.keys and row.code is _INVALID:  # google.rpc's standard detail, which generic tools show
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata["field"], description=f"expected {metadata['allowed']}"
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(retry_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    converted: grpc.Status = rpc_status.to_status(status)
    return converted


def from_call(error: grpc.RpcError, target: str, seconds: float) -> tuple[Error, float | None]:
    """Returns the exception for a failed call, and the seconds before the next attempt (None: a retry does not help).

    Args:
        error: The error of gRPC.
        target: The server's address, for the message.
        seconds: The call's time limit, for the message.
    """
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    found, retry_seconds = False, None
    with suppress(DecodeError, ValueError):  # a proxy's status has no details, or others
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            if detail.Unpack(info):
                found = info.domain == DOMAIN  # a proxy may send reasons of its own
            elif detail.Unpack(retry):
                retry_seconds = retry.retry_delay.ToNanoseconds() / 1e9
    if not found:
        return _transport_error(error, target, seconds)
    # A newer server may have reasons that this client does not know.
    kind = TABLE[info.reason].exception if info.reason in TABLE else Error
    return kind(str(error.details()), reason=info.reason, metadata=info.metadata), retry_seconds


def _transport_error(error: grpc.RpcError, target: str, seconds: float) -> tuple[Error, float | None]:
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"{target} did not answer within {seconds:g} s"), 0.0
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # a server that stops cancels calls
        return UnavailableError(f"cannot reach a server at {target}: is it running there? ({details})"), 0.0
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Error(f"the server at {target} does not speak deltaserve.v1: is it the right port?"), None
    if code is _EXHAUSTED:
        return RequestError(f"a message is larger than {target} takes ({details})"), None
    return Error(f"{target}: {code.name}: {details}"), None
