"""The client of a command."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltaserve_server.cli.health import check

if TYPE_CHECKING:
    import deltaserve

CHECK_SECONDS = 5.0


@contextlib.contextmanager
def connected(target: str, timeout_seconds: float = 30.0) -> "Iterator[deltaserve.Client]":
    """Yields a client, after a check that the server answers.

    Without the check the client would retry until its timeout, which suits a worker; a user at a terminal wants to know
    at once that there is no server.

    Args:
        target: The server's address, HOST:PORT or unix:PATH.
        timeout_seconds: The limit of each call, its retries included.

    Raises:
        CommandError: No server answers.
    """
    import deltaserve

    check(target, CHECK_SECONDS)
    with deltaserve.connect(target, timeout_seconds=timeout_seconds) as client:
        yield client
