"""Messages of requests, written by hand from the contract."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray

from deltaserve.v1 import common_pb2, model_service_pb2, worker_service_pb2
from deltaserve.v1.common_pb2 import AsyncPolicy, BoundedPolicy, ModelConfig, Policy, SyncPolicy, TensorSpec
from deltaserve.v1.optimizers_pb2 import Optimizer
from deltaserve.v1.worker_service_pb2 import PushHeader

Vector = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

CHUNK = 1 << 18
"""Elements of a chunk unless a test says otherwise."""

ADADELTA_SLOTS = ("square_avg", "acc_delta")
"""The optimizer state of a model unless a test says otherwise."""


def sync(min_workers: int | None = None, **fields: Any) -> Policy:
    """The synchronous policy."""
    return Policy(sync=SyncPolicy(min_workers=min_workers, **fields))


def asynchronous(**fields: Any) -> Policy:
    """The asynchronous policy."""
    policies: dict[str, Any] = {"async": AsyncPolicy(**fields)}  # Python's keyword
    return Policy(**policies)


def bounded(slack: int | None = None) -> Policy:
    """The bounded policy."""
    return Policy(bounded=BoundedPolicy(slack=slack))


def optimizer(kind: str, **fields: Any) -> Optimizer:
    """An optimizer of this kind with only these fields set."""
    message = Optimizer()
    inner = getattr(message, kind)
    inner.SetInParent()
    for name, value in fields.items():
        setattr(inner, name, value)
    return message


def adadelta(**fields: Any) -> Optimizer:
    """Adadelta with only these fields set."""
    return optimizer("adadelta", **fields)


def floats(values: ArrayLike) -> bytes:
    """Returns a vector as the wire has it."""
    return np.asarray(values, "<f4").tobytes()


def creation(
    name: str,
    shapes: Shapes | None = None,
    *,
    weights: ArrayLike | None = None,
    groups: Sequence[Optimizer] = (),
    group_of: Sequence[int] = (),
    policy: Policy | None = None,
) -> list[Message]:
    """The messages of a CreateModel."""
    shapes = {"w": (4,), "b": ()} if shapes is None else shapes
    config = ModelConfig(
        name=name,
        tensors=[
            TensorSpec(name=tensor, shape=shape, group=group_of[k] if group_of else 0)
            for k, (tensor, shape) in enumerate(shapes.items())
        ],
        groups=groups,
        policy=policy,
    )
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    vector = np.zeros(size, np.float32) if weights is None else np.asarray(weights, np.float32)
    kind = model_service_pb2.CreateModelRequest
    return [kind(config=config), *(kind(weights=piece) for piece in pieces(vector))]


def replacement(
    model: str,
    vectors: Sequence[ArrayLike],
    counts: Sequence[int] = (),
    slots: Sequence[str] = ADADELTA_SLOTS,
    chunk: int = CHUNK,
) -> list[Message]:
    """The messages of a PutState."""
    kind, start = model_service_pb2.PutStateRequest, 0
    header = model_service_pb2.PutStateHeader(model=model, update_counts=counts, slots=slots)
    messages: list[Message] = [kind(header=header)]
    for vector in vectors:
        messages += [kind(state=piece) for piece in pieces(vector, start, chunk)]
        start += np.size(vector)
    return messages


def pieces(vector: ArrayLike, start: int = 0, size: int = CHUNK) -> Iterator[common_pb2.Chunk]:
    """Cuts a vector into chunks."""
    whole = np.asarray(vector, np.float32).reshape(-1)
    for at in range(0, whole.size, size):
        yield common_pb2.Chunk(offset=start + at, data=floats(whole[at : at + size]))


def cut(vector: ArrayLike, size: int = CHUNK) -> list[tuple[int, Vector]]:
    """Cuts a vector into offsets and values."""
    whole = np.asarray(vector, np.float32).reshape(-1)
    return [(at, whole[at : at + size]) for at in range(0, whole.size, size)]


def push(header: PushHeader, chunks: Iterable[tuple[int, ArrayLike]]) -> Iterator[bytes]:
    """The messages of a StreamStep."""
    kind = worker_service_pb2.StreamStepRequest
    yield kind(header=header).SerializeToString()
    for offset, values in chunks:
        data = values if isinstance(values, bytes) else floats(values)
        yield kind(gradient=common_pb2.Chunk(offset=offset, data=data)).SerializeToString()
