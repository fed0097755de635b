"""Servers that serve many tests, one after the other. Starting one for each test would take most of their time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from wire import Wire, eventually

from deltaserve_server import LocalServer, ServerConfig

DEFAULT = ServerConfig(device="cpu", lease_seconds_min=0.1)
"""The default but for the shortest lease, so that a test of a lease that runs out need not wait for a second."""


class ReusedServers:
    """Keeps one running server for each configuration. Every test finds it without models."""

    def __init__(self) -> None:
        self._running: dict[ServerConfig, tuple[LocalServer, ExitStack]] = {}

    @contextmanager
    def serving(self, config: ServerConfig = DEFAULT) -> Iterator[LocalServer]:
        """Gives a server to one test, and deletes the models that the test leaves."""
        if config not in self._running:
            stack = ExitStack()
            self._running[config] = stack.enter_context(LocalServer(config)), stack
        server, _ = self._running[config]
        with Wire(server.target) as wire:
            available = wire.info().limits.memory_available_bytes
            yield server
            if config not in self._running:  # the test has stopped it
                return
            try:
                for model in wire.models():
                    wire.delete(model.name)
                eventually(
                    lambda: wire.info().limits.memory_available_bytes == available,
                    "the memory of deleted models is not given back",
                )
            except BaseException:
                self.stop(config)  # the next test gets a new server
                raise

    def stop(self, config: ServerConfig = DEFAULT) -> None:
        """Stops a server, because a test has left it unfit for others."""
        _, stack = self._running.pop(config)
        stack.close()

    def stop_all(self) -> None:
        """Stops all servers."""
        for config in list(self._running):
            self.stop(config)
