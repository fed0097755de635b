"""Undisturbed lines to the server under test: one sees every update, one looks at the sessions again and again."""

import threading
from collections.abc import Callable
from time import monotonic, sleep

from scenarios import LEASE_SECONDS, MODEL, Scenario

import deltaserve
from deltaserve import ModelEvent, PushStatus, Sync
from deltaserve._types import to_push_status
from deltaserve.v1 import worker_service_pb2 as rpc

_LOOK_SECONDS = 0.1
_WAIT_SECONDS = 20.0

GROSS_SECONDS = 4.0
"""So much beyond its bound is a violation: the line may hold a connection for 2 s, the server may stand still."""


class Watch:
    """Every update, as the server tells it.

    Attributes:
        events: What came.
        problems: What went wrong.
    """

    def __init__(self, target: str) -> None:
        self.events: list[ModelEvent] = []
        self.problems: list[str] = []
        self._begun = threading.Event()
        self._client = deltaserve.connect(target, timeout_seconds=30)
        threading.Thread(target=self._watch, daemon=True).start()
        if not self._begun.wait(30):
            raise RuntimeError("the watcher did not begin")

    def wait(self, version: Callable[[], int]) -> None:
        """Waits until the watcher has seen the version where the model stands."""
        end = monotonic() + _WAIT_SECONDS
        while self.events[-1].version < version():
            if monotonic() > end:
                self.problems.append(f"the watcher stays at version {self.events[-1].version} of {version()}")
                return
            sleep(0.02)

    def _watch(self) -> None:
        try:
            for event in self._client.model(MODEL).watch():
                self.events.append(event)
                self._begun.set()
        except Exception as error:
            self.problems.append(f"the watcher ended: {error!r}")


class Census:
    """Looks at the sessions while faults happen: how long the dead are held alive, and how long pushes wait.

    Attributes:
        problems: What grossly exceeds its bound.
    """

    def __init__(self, target: str, scenario: Scenario) -> None:
        self.problems: list[str] = []
        self._policy = scenario.policy
        self._client = deltaserve.connect(target, timeout_seconds=30)
        self._lock = threading.Lock()
        self._first: dict[tuple[str, int], float] = {}
        self._silent: dict[tuple[str, int], float] = {}
        self._waiting: dict[tuple[str, int, int], float] = {}
        self._longest_held = self._longest_wait = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_until_closed, daemon=True)
        self._thread.start()

    def silent(self, worker: str, at: float) -> None:
        """Says that a worker's process has ended: each session that it has left is to end with its lease."""
        with self._lock:
            for session in self._first:
                if session[0] == worker:
                    self._silent.setdefault(session, at)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(40)
        self._client.close()

    def figures(self) -> dict[str, float]:
        """Returns the longest times that were seen, in seconds."""
        return {"dead session held": self._longest_held, "push waited": self._longest_wait}

    def _look_until_closed(self) -> None:
        model = self._client.model(MODEL)
        while not self._closed.wait(_LOOK_SECONDS):
            sessions, now = model.info().sessions, monotonic()
            with self._lock:
                for one in sessions:
                    self._look(one, now)

    def _look(self, one: deltaserve.SessionInfo, now: float) -> None:
        session = one.worker, one.epoch
        self._first.setdefault(session, now)
        if session in self._silent:
            held = now - self._silent[session]
            self._longest_held = max(self._longest_held, held)
            if held > LEASE_SECONDS + GROSS_SECONDS:
                self.problems.append(f"session {session} is alive {held:.1f} s after its worker died")
        if one.waiting:
            waited = now - self._waiting.setdefault((*session, one.last_sequence), now)
            self._longest_wait = max(self._longest_wait, waited)
            limit = self._policy.round_timeout_seconds if isinstance(self._policy, Sync) else None
            if limit is not None and waited > limit + GROSS_SECONDS:
                self.problems.append(f"push {(*session, one.last_sequence)} has waited for {waited:.1f} s")


def ask(client: deltaserve.Client, session_id: bytes, sequence: int) -> PushStatus:
    """Returns what GetPush says."""
    request = rpc.GetPushRequest(model=MODEL, session_id=session_id, sequence=sequence)
    return to_push_status(client._connection.call("GetPush", request))
