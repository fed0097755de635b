"""Observers with direct connections to the server: a watcher, a session observer and a requester of snapshots."""

import random
import threading
from collections.abc import Callable
from time import monotonic, sleep

from history import Claim
from scenarios import LEASE_SECONDS, MODEL, Scenario

import deltaserve
from deltaserve import ModelEvent, PushStatus, ServerError, SessionError, SessionInfo, Sync, UnavailableError
from deltaserve._conversion import to_model_info, to_push_status
from deltaserve.v1 import model_service_pb2
from deltaserve.v1 import worker_service_pb2 as rpc

_POLL_SECONDS = 0.1
_WAIT_SECONDS = 20.0
_SNAPSHOT_SECONDS = 0.5
"""Mean time between two requests for a snapshot."""

GROSS_SECONDS = 4.0
"""Tolerance of a time bound: the TCP proxy holds a connection for up to 2 s, and the machine may stall."""


class Watch:
    """Watches the model, except for updates while the server is down.

    Attributes:
        events: The events received.
        problems: Descriptions of what went wrong.
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
        """Waits until the watcher has received the model's current version."""
        end = monotonic() + _WAIT_SECONDS
        while self.events[-1].version != version():
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


class Promises:
    """Versions that the server promised to keep: the durable ones, or with a journal all that it showed to anybody."""

    def __init__(self, scenario: Scenario) -> None:
        self._shown_is_durable = scenario.journals
        self._newest: dict[tuple[str, str], int] = {}

    def record(self, who: str, incarnation: str, version: int, durable: int | None) -> None:
        """Records a version in an answer to somebody."""
        claimed = max(durable or 0, version if self._shown_is_durable else 0)
        key = incarnation, who
        self._newest[key] = max(self._newest.get(key, 0), claimed)

    def claims(self) -> list[Claim]:
        return [(incarnation, version, f"{who} was told of") for (incarnation, who), version in self._newest.items()]


class SnapshotRequester:
    """Requests snapshots at random times."""

    def __init__(self, target: str, seed: int, promises: Promises) -> None:
        self._random = random.Random(seed)
        self._promises = promises
        self._client = deltaserve.connect(target, timeout_seconds=10)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._request_until_closed, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(40)
        self._client.close()

    def _request_until_closed(self) -> None:
        request = model_service_pb2.SaveSnapshotRequest(model=MODEL)
        while not self._closed.wait(self._random.expovariate(1 / _SNAPSHOT_SECONDS)):
            try:
                answer = self._client._connection.call("SaveSnapshot", request)
            except (UnavailableError, ServerError):
                continue
            incarnation = answer.position.incarnation
            self._promises.record("the requester of snapshots", incarnation, 0, answer.snapshot.version)


class SessionObserver:
    """Measures during the faults how long the sessions of dead workers live, and how long pushes wait.

    Attributes:
        problems: Times that exceed their bound by more than GROSS_SECONDS.
    """

    def __init__(self, target: str, scenario: Scenario, promises: Promises) -> None:
        self.problems: list[str] = []
        self._policy = scenario.policy
        self._promises = promises
        self._keeps_sessions = scenario.journals
        self._client = deltaserve.connect(target, timeout_seconds=30)
        self._lock = threading.Lock()
        self._incarnation = ""
        self._since = 0.0
        self._first: dict[tuple[str, int], float] = {}
        self._silent: dict[tuple[str, int], float] = {}
        self._waiting: dict[tuple[str, int, int], float] = {}
        self._longest_held = self._longest_wait = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._observe_until_closed, daemon=True)
        self._thread.start()

    def silent(self, worker: str, at: float) -> None:
        """Records that a worker's process has ended: from now on its sessions must end with their leases."""
        with self._lock:
            for session in self._first:
                if session[0] == worker:
                    self._silent.setdefault(session, at)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(40)
        self._client.close()

    def figures(self) -> dict[str, float]:
        """Returns the longest times seen, in seconds."""
        return {"dead session held": self._longest_held, "push waited": self._longest_wait}

    def _observe_until_closed(self) -> None:
        request = model_service_pb2.GetModelRequest(model=MODEL)
        while not self._closed.wait(_POLL_SECONDS):
            try:
                answer = self._client._connection.call("GetModel", request)
            except deltaserve.Error as error:
                self.problems.append(f"the observer of sessions got no answer: {error!r}")
                return
            position, now = answer.position, monotonic()
            info = to_model_info(answer)
            self._promises.record("the observer of sessions", position.incarnation, info.version, info.durable_version)
            with self._lock:
                if position.incarnation != self._incarnation:
                    self._begin(position.incarnation, now)
                for one in info.sessions:
                    self._observe(one, now)

    def _begin(self, incarnation: str, now: float) -> None:
        """Handles a new incarnation: leases start again, no push waits, and sessions may be lost."""
        self._incarnation, self._since = incarnation, now
        self._waiting.clear()
        if not self._keeps_sessions:
            self._first.clear()
            self._silent.clear()

    def _observe(self, one: SessionInfo, now: float) -> None:
        session = one.worker, one.epoch
        self._first.setdefault(session, now)
        if session in self._silent:
            held = now - max(self._silent[session], self._since)
            self._longest_held = max(self._longest_held, held)
            if held > LEASE_SECONDS + GROSS_SECONDS:
                self.problems.append(f"session {session} is alive {held:.1f} s after its worker died")
        if one.waiting:
            waited = now - self._waiting.setdefault((*session, one.last_sequence), now)
            self._longest_wait = max(self._longest_wait, waited)
            limit = self._policy.round_timeout_seconds if isinstance(self._policy, Sync) else None
            if limit is not None and waited > limit + GROSS_SECONDS:
                self.problems.append(f"push {(*session, one.last_sequence)} has waited for {waited:.1f} s")


def ask(client: deltaserve.Client, session: str, sequence: int) -> PushStatus | None:
    """Returns the answer of GetPush, or None if the server no longer knows the session."""
    request = rpc.GetPushRequest(model=MODEL, session_id=bytes.fromhex(session), sequence=sequence)
    try:
        return to_push_status(client._connection.call("GetPush", request))
    except SessionError:
        return None
