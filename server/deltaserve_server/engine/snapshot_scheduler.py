"""Takes snapshots when they are due, in a thread of low priority."""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from deltaserve_server.engine.clock import Clock
from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import BudgetExceeded
from deltaserve_server.model import Refused

_log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 0.1
_NICE = 10


class SnapshotScheduler:
    """Checks every model ten times a second and takes a snapshot with `save` if one is due."""

    def __init__(
        self, models: Callable[[], Iterable[ModelEngine]], save: Callable[[ModelEngine], object], clock: Clock
    ) -> None:
        self._models = models
        self._save = save
        self._clock = clock
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends, after the snapshot that is being taken."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        with suppress(AttributeError, OSError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            until = self._clock.monotonic() + _INTERVAL_SECONDS
            with self._changed:
                while not self._stopped and self._clock.monotonic() < until:
                    self._clock.wait(self._changed, until)
                if self._stopped:
                    return
            self._save_all()

    def _save_all(self) -> None:  # a function of its own: a local variable of _run would keep a deleted model alive
        for engine in self._models():
            if self._stopped or not engine.is_due():
                continue
            name = engine.machine.name
            try:
                self._save(engine)
            except (OSError, BudgetExceeded) as error:
                _log.warning("model %s: taking a snapshot failed, the server tries again: %s", name, error)
            except Refused:
                pass  # the model has ended
            except Exception:
                _log.exception("model %s: taking a snapshot failed", name)
