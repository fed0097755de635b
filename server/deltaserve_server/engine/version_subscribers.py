"""Who is told of a model's versions: those who watch, and those who wait for one."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial

from deltaserve.v1 import model_service_pb2 as rpc
from deltaserve_server.engine.watch import Watcher
from deltaserve_server.model import Refused

_RETRY_SECONDS = 0.05


class VersionSubscribers:
    """A model's audience; the model's owner alone calls it."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._awaited: list[tuple[int, Future[None]]] = []

    @property
    def watches(self) -> bool:
        """Whether somebody watches."""
        return bool(self._watchers)

    def watch(self, first: rpc.WatchModelResponse) -> Watcher:
        """Adds somebody who watches from the message `first` on."""
        watcher = Watcher(first)
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """Ends what `watch` began."""
        self._watchers.discard(watcher)

    def wait(self, version: int, limit: int) -> "Future[None]":
        """Returns a future that is done when a version is told of that has not come yet.

        Raises:
            Refused: SESSION_LIMIT where `limit` of them wait already.
        """
        if len(self._awaited) >= limit:
            raise Refused("SESSION_LIMIT", _RETRY_SECONDS, limit=limit)
        future: Future[None] = Future()
        self._awaited.append((version, future))
        return future

    def forget(self, future: "Future[None]") -> None:
        """Ends what `wait` began, for a caller who waits no longer."""
        self._awaited = [(version, held) for version, held in self._awaited if held is not future]

    def told(self, version: int, message: rpc.WatchModelResponse | None) -> Callable[[], None] | None:
        """Returns what tells those who are here now of a version; None where nobody is to be told."""
        reached = [future for awaited, future in self._awaited if awaited <= version]
        if reached:
            self._awaited = [(awaited, future) for awaited, future in self._awaited if awaited > version]
        return partial(_tell, tuple(self._watchers), message, reached) if message or reached else None

    def end(self, refusal: Refused) -> None:
        """Tells everybody that nothing more comes."""
        for _, future in self._awaited:
            future.set_exception(refusal)
        for watcher in self._watchers:
            watcher.close(refusal)


def _tell(
    watchers: Collection[Watcher], message: rpc.WatchModelResponse | None, reached: Sequence["Future[None]"]
) -> None:
    if message:
        for watcher in watchers:
            watcher.put(message)
    for future in reached:
        future.set_result(None)
