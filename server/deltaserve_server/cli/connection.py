"""A client for one command."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltaserve_server.cli.health import check

if TYPE_CHECKING:
    import deltaserve

REACH_SECONDS = 5.0


@contextlib.contextmanager
def connected(target: str, timeout_seconds: float = 30.0) -> "Iterator[deltaserve.Client]":
    """Yields a client of a server that answers.

    The client itself keeps trying until its time is up, which is right for a worker; who types a command wants to know
    at once that nothing is there.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: How long each call may take.

    Raises:
        CommandError: nothing answers there.
    """
    import deltaserve

    check(target, REACH_SECONDS)
    with deltaserve.connect(target, timeout_seconds=timeout_seconds) as client:
        yield client
