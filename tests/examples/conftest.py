"""A server for the examples that take an address."""

from collections.abc import Iterator

import pytest

from deltaserve_server import LocalServer


@pytest.fixture
def target() -> Iterator[str]:
    with LocalServer() as server:
        yield server.target
