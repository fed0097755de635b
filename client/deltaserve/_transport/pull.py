"""Weights in a stream of chunks."""

from collections.abc import Iterable
from typing import Any

from deltaserve._common.codec import Chunk
from deltaserve._common.element_types import ElementType
from deltaserve._common.failpoints import failpoint
from deltaserve._connection import Connection
from deltaserve._weights import LocalWeights
from deltaserve.v1 import common_pb2
from deltaserve.v1 import worker_service_pb2 as rpc


def pull(
    connection: Connection, model: str, wait_for_version: int | None, wire: ElementType, weights: LocalWeights
) -> common_pb2.ModelPosition:
    """Writes the model's weights to `weights.target` and returns where the model stands.

    The server answers no earlier than at `wait_for_version`; None means at once. After a failed attempt the weights may
    be older, because a server that restarted from an older state may not reach the version for long.

    Raises:
        Error: The server refused the request, or did not answer in time.
        ServerRestartedError: The answer came from another incarnation of the server.
    """

    def start(attempt: int, seconds: float) -> Any:
        version = None if attempt else wait_for_version
        request = rpc.PullRequest(model=model, wait_for_version=version, weights_type=wire.data_type)
        return connection.stub("Pull")(request.SerializeToString(), timeout=seconds)

    def take(header: rpc.PullHeader, chunks: Iterable[Chunk]) -> common_pb2.ModelPosition:
        weights.begin(header.position)
        write_chunks(chunks, wire, weights)
        return header.position

    return connection.receive("Pull", start, take)


def write_chunks(chunks: Iterable[Chunk], wire: ElementType, weights: LocalWeights) -> None:
    """Writes received weights to `weights.target`."""
    for chunk in chunks:
        weights.target.write(chunk.offset, chunk.data, wire)
        failpoint("worker.mid_answer")
