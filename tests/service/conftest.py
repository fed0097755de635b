"""What the tests of the service begin with."""

from collections.abc import Iterator

import pytest
from wire import Wire

from deltaserve_server import LocalServer


@pytest.fixture
def wire(server: LocalServer) -> Iterator[Wire]:
    """A plain channel to `server`, and every RPC over it."""
    with Wire(server.target) as plain:
        yield plain
