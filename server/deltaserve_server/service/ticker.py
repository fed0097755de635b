"""Has models do what is due: end sessions whose lease has run out, and rounds whose time is up."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from deltaserve_server.model import Refused
from deltaserve_server.service.applier import Applier

_log = logging.getLogger(__name__)

_SECONDS = 0.25
_SHORTEST_SECONDS = 0.001


class Ticker:
    """Looks at all models four times a second, and when it is wanted.

    A model that writes down what it does may wait for its disk: each of these is looked at in a thread that waits for
    no other.

    Args:
        models: Returns them.
        most: How many there are at most.
    """

    def __init__(self, models: Callable[[], Iterable[Applier]], most: int) -> None:
        self._models = models
        self._waits = ThreadPoolExecutor(most, "lease")
        self._again: dict[Applier, bool] = {}
        self._lock = threading.Lock()
        self._next = 0.0
        self._alarm = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def want(self, due: float) -> None:
        """Sees to it that models are looked at when it is time to, however short before they were."""
        with self._lock:
            if due < self._next:
                self._next = due
                self._alarm.set()

    def stop(self) -> None:
        """Ends; once."""
        self._stopped.set()
        self._alarm.set()
        self._thread.join()
        self._waits.shutdown()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._next = monotonic() + _SECONDS
            self._tick_all()
            while not self._stopped.is_set() and monotonic() < self._next:
                self._alarm.clear()
                self._alarm.wait(max(self._next - monotonic(), _SHORTEST_SECONDS))

    def _tick_all(self) -> None:  # a method, so that afterwards nothing here refers to a model that is deleted
        for applier in self._models():
            if not applier.journals:
                _tick(applier)
            elif not self._is_under_way(applier):
                self._waits.submit(self._tick_apart, applier)

    def _is_under_way(self, applier: Applier) -> bool:
        """Whether a model is still being looked at: then it is to be again."""
        with self._lock:
            under_way = applier in self._again
            self._again[applier] = under_way
        return under_way

    def _tick_apart(self, applier: Applier) -> None:
        _tick(applier)
        with self._lock:
            again = self._again.pop(applier)
        if again:
            self.want(monotonic())


def _tick(applier: Applier) -> None:
    try:
        applier.tick()
    except Refused:
        pass  # a fault has ended this model, and is in the log; or it is told when the disk works again
    except Exception:
        _log.exception("model %s: what is due was not done", applier.machine.name)
