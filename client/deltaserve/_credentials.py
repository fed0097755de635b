"""How a client secures its channel and proves who it is."""

from collections.abc import Sequence
from typing import Any, Protocol

import grpc


class Credentials(Protocol):
    """Opens the channel to a server."""

    def open_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Returns a channel to `target`, HOST:PORT or unix:PATH, with gRPC's channel arguments `options`."""
        ...


class Plaintext:
    """No encryption and no identity: for a trusted network, and for Unix sockets."""

    def open_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Returns a plaintext channel."""
        return grpc.insecure_channel(target, options=options)
