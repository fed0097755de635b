"""Takes snapshots when they are due, in a thread of its own that gives way to the others."""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from deltaserve_server.engine.model_engine import ModelEngine
from deltaserve_server.memory import BudgetExceeded
from deltaserve_server.model import Refused

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
_NICE = 10


class SnapshotScheduler:
    """Looks at all models again and again.

    Args:
        models: Returns them.
        saved: Is told of each model that a snapshot was taken of.
    """

    def __init__(self, models: Callable[[], Iterable[ModelEngine]], saved: Callable[[ModelEngine], None]) -> None:
        self._models = models
        self._saved = saved
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends; a snapshot that is being taken is finished."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(AttributeError, OSError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while not self._stopped.wait(_LOOK_SECONDS):
            self._save_all()

    def _save_all(self) -> None:  # a method, so that afterwards nothing here refers to a model that is deleted
        for engine in self._models():
            if engine.is_due() and not self._stopped.is_set():
                self._save(engine)

    def _save(self, engine: ModelEngine) -> None:
        try:
            engine.save()
        except (OSError, BudgetExceeded) as error:
            _log.warning("model %s: no snapshot was taken, the next try follows: %s", engine.machine.name, error)
        except Refused:
            pass  # it has ended
        except Exception:
            _log.exception("model %s: no snapshot was taken", engine.machine.name)
        else:
            self._saved(engine)
