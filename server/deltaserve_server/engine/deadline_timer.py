"""Has models do what is due: end sessions whose lease has run out, and rounds whose time is up."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Refused

_log = logging.getLogger(__name__)

_SECONDS = 0.25
_SHORTEST_SECONDS = 0.001


class DeadlineTimer:
    """Looks at all models four times a second, and when it is wanted.

    A model that writes down what it does may wait for its disk: each of these is looked at in a thread that waits for
    no other.

    Args:
        models: Returns them.
        most: How many there are at most.
    """

    def __init__(self, models: Callable[[], Iterable[ModelEngine]], most: int) -> None:
        self._models = models
        self._waits = ThreadPoolExecutor(most, "lease")
        self._again: dict[ModelEngine, bool] = {}
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
        for engine in self._models():
            if not engine.journals:
                _tick(engine)
            elif not self._is_under_way(engine):
                self._waits.submit(self._tick_apart, engine)

    def _is_under_way(self, engine: ModelEngine) -> bool:
        """Whether a model is still being looked at: then it is to be again."""
        with self._lock:
            under_way = engine in self._again
            self._again[engine] = under_way
        return under_way

    def _tick_apart(self, engine: ModelEngine) -> None:
        _tick(engine)
        with self._lock:
            again = self._again.pop(engine)
        if again:
            self.want(monotonic())


def _tick(engine: ModelEngine) -> None:
    try:
        engine.tick()
    except Refused:
        pass  # a fault has ended this model, and is in the log; or it is told when the disk works again
    except Exception:
        _log.exception("model %s: what is due was not done", engine.machine.name)
