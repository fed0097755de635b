"""Ends sessions whose lease has run out and rounds whose time is up, in a thread of its own."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from deltaserve_server.engine.clock import Clock
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.model import Refused

_log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 0.25


class LeaseTimer:
    """Calls `tick` of every model four times a second, and sooner when a round is due.

    A model with a journal may wait for its disk. Its ticks run in a pool, so that no model waits for another's disk.
    """

    def __init__(self, models: Callable[[], Iterable[ModelEngine]], max_models: int, clock: Clock) -> None:
        self._models = models
        self._clock = clock
        self._pool = ThreadPoolExecutor(max_models, "lease")
        self._again: dict[ModelEngine, bool] = {}  # models whose tick runs now; True to tick once more
        self._next = 0.0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def schedule(self, due: float) -> None:
        """Requests a call of the ticks no later than `due`."""
        with self._changed:
            if due < self._next:
                self._next = due
                self._changed.notify_all()

    def stop(self) -> None:
        """Ends, after the ticks that run; once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        while True:
            # Before the ticks, so that what they schedule counts.
            self._next = self._clock.monotonic() + _INTERVAL_SECONDS
            self._tick_all()
            with self._changed:
                while not self._stopped and self._clock.monotonic() < self._next:
                    self._clock.wait(self._changed, self._next)
                if self._stopped:
                    return

    def _tick_all(self) -> None:  # a function of its own: a local variable of _run would keep a deleted model alive
        for engine in self._models():
            if not engine.journals:
                _tick(engine)
                continue
            with self._changed:  # a tick that runs already runs once more afterwards
                running = self._again[engine] = engine in self._again
            if not running:
                self._pool.submit(self._tick_in_pool, engine)

    def _tick_in_pool(self, engine: ModelEngine) -> None:
        _tick(engine)
        with self._changed:
            again = self._again.pop(engine)
        if again:
            self.schedule(self._clock.monotonic())


def _tick(engine: ModelEngine) -> None:
    try:
        engine.tick()
    except Refused:
        pass  # the model has ended, or its disk does not work: the next tick tries again
    except Exception:
        _log.exception("model %s: leases and rounds were not checked", engine.machine.name)
