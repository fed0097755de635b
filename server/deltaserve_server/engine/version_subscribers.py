"""Those who want to know of a model's versions: watchers get every event, waiters one version."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Condition, Lock

from deltaserve_server.engine.events import Observer, Updated
from deltaserve_server.model import Refused

_RETRY_SECONDS = 0.05

_QUEUE_LENGTH = 256
"""How many events wait for one watcher. A slow watcher must not fill the memory."""


class Watcher:
    """A queue of events for one caller. Iteration yields each event with the number of events missed before it.

    Args:
        first: The event that the queue begins with: where the model stands. Later events are of newer versions.
    """

    def __init__(self, first: Updated) -> None:
        self.since = first.position.version
        self._events = deque([first])
        self._missed = 0
        self._closed = False
        self._refusal: Refused | None = None
        self._changed = Condition()

    def put(self, event: Updated) -> None:
        """Adds an event; a full queue loses its oldest."""
        with self._changed:
            if len(self._events) == _QUEUE_LENGTH:
                self._events.popleft()
                self._missed += 1
            self._events.append(event)
            self._changed.notify()

    def close(self, refusal: Refused | None = None) -> None:
        """Ends the iteration once the queue is empty; a `refusal` is then raised."""
        with self._changed:
            self._closed = True  # what is queued is still delivered
            self._refusal = self._refusal or refusal
            self._changed.notify()

    def __iter__(self) -> Iterator[tuple[Updated, int]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._closed)
                if not self._events:
                    break
                event, missed, self._missed = self._events.popleft(), self._missed, 0
            yield event, missed  # outside the lock, for sending may block
        if self._refusal:
            raise self._refusal


class VersionSubscribers(Observer):
    """The watchers and waiters of one model; thread-safe."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._awaited: list[tuple[int, Future[None]]] = []
        self._lock = Lock()  # a separate one: the thread that writes the journal announces versions

    def __bool__(self) -> bool:
        """Whether there are watchers or waiters."""
        return bool(self._watchers or self._awaited)

    def watch(self, first: Updated) -> Watcher:
        """Adds a watcher whose queue begins with `first`."""
        watcher = Watcher(first)
        with self._lock:
            self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Removes a watcher."""
        with self._lock:
            self._watchers.discard(watcher)

    def wait(self, future: "Future[None]", version: int, limit: int) -> None:
        """Adds a waiter: `future` is done when the model reaches `version`, which must be newer than the current one.

        Raises Refused SESSION_LIMIT if `limit` callers wait already.
        """
        with self._lock:
            if len(self._awaited) >= limit:
                raise Refused("SESSION_LIMIT", _RETRY_SECONDS, limit=limit)
            self._awaited.append((version, future))

    def forget(self, future: "Future[None]") -> None:
        """Removes a waiter, if it still waits."""
        with self._lock:
            self._awaited = [waiter for waiter in self._awaited if waiter[1] is not future]

    def updated(self, event: Updated) -> None:
        """Tells the watchers of a new version, and wakes those who wait for it."""
        version = event.position.version
        with self._lock:
            # A watcher that came after this version was made, and before it was durable, began with it.
            watchers = [watcher for watcher in self._watchers if watcher.since < version]
            reached = [future for awaited, future in self._awaited if awaited <= version]
            if reached:
                self._awaited = [waiter for waiter in self._awaited if waiter[0] > version]
        # Outside the lock: what waits for a future may run in this thread.
        for watcher in watchers:
            watcher.put(event)
        for future in reached:
            future.set_result(None)

    def end(self, refusal: Refused) -> None:
        """Ends every watch and every wait with `refusal`."""
        with self._lock:
            awaited, self._awaited = self._awaited, []
            watchers = list(self._watchers)
        for _, future in awaited:
            future.set_exception(refusal)
        for watcher in watchers:
            watcher.close(refusal)
