"""Fixtures of the tests of the service."""

from collections.abc import Iterator

import pytest
from reused_server import ReusedServers
from wire import Wire

from deltaserve_server import LocalServer


@pytest.fixture(scope="session")
def reused_servers() -> Iterator[ReusedServers]:
    """Servers that the tests of this folder share."""
    servers = ReusedServers()
    yield servers
    servers.stop_all()


@pytest.fixture
def server(reused_servers: ReusedServers) -> Iterator[LocalServer]:
    """A server without models."""
    with reused_servers.serving() as local:
        yield local


@pytest.fixture
def own_server() -> Iterator[LocalServer]:
    """A server for a test that stops it."""
    with LocalServer() as local:
        yield local


@pytest.fixture
def own_wire(own_server: LocalServer) -> Iterator[Wire]:
    """A plain channel to `own_server`."""
    with Wire(own_server.target) as plain:
        yield plain


@pytest.fixture
def wire(server: LocalServer) -> Iterator[Wire]:
    """A plain channel to `server`, and every RPC over it."""
    with Wire(server.target) as plain:
        yield plain
