"""What tests of several rooms begin with: a server in this process, and ways to reach it."""

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have let all that it starts ignore it

if TYPE_CHECKING:  # the packages are imported by the tests that need them
    import grpc

    from deltaserve import Client
    from deltaserve_server import LocalServer


@pytest.fixture
def server() -> "Iterator[LocalServer]":
    """A server on a free port."""
    from deltaserve_server import LocalServer

    with LocalServer() as local:
        yield local


@pytest.fixture
def client(server: "LocalServer") -> "Iterator[Client]":
    """A client of `server`."""
    import deltaserve

    with deltaserve.connect(server.target, timeout_seconds=30.0) as connected:
        yield connected


@pytest.fixture
def channel(server: "LocalServer") -> "Iterator[grpc.Channel]":
    """A plain channel to `server`."""
    import grpc

    with grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)]) as plain:
        yield plain
