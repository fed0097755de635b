"""A server for the examples that are given one."""

from collections.abc import Iterator

import pytest

from deltaserve_server import LocalServer


@pytest.fixture
def target() -> Iterator[str]:
    with LocalServer() as server:
        yield server.target
