"""Fixtures of all rooms: a server in this process, shared or of the test's own, and ways to reach it."""

import itertools
import re
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

# A shell that starts the tests in the background makes them ignore SIGINT, and so their child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = itertools.count(1)

if TYPE_CHECKING:  # the packages are imported by the tests that need them
    import grpc

    from deltaserve import Client
    from deltaserve_server import LocalServer


@pytest.fixture(scope="session")
def shared_server() -> "Iterator[LocalServer]":
    """One server for all tests of this process, on a free port. A test creates its models under `unique_name`."""
    from deltaserve_server import LocalServer

    with LocalServer() as local:
        yield local


@pytest.fixture(scope="session")
def shared_client(shared_server: "LocalServer") -> "Iterator[Client]":
    """A client of `shared_server`."""
    import deltaserve

    with deltaserve.connect(shared_server.target, timeout_seconds=30.0) as connected:
        yield connected


@pytest.fixture
def unique_name(request: pytest.FixtureRequest) -> str:
    """A model name that no other test uses: the test's own name, shortened, and a number."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", request.node.name)[:80]
    return f"{readable}.{next(_numbers)}"


@pytest.fixture
def server() -> "Iterator[LocalServer]":
    """A server on a free port, for tests that cannot use `shared_server`: they count, restart or configure."""
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
