"""Named places in the code at which a test makes this process die, stop, wait or fail.

    DELTASERVE_FAILPOINTS="worker.mid_body=kill@3;push.staged=sleep(0.05)@1/20"

Each entry is NAME=ACTION. The action is kill (SIGKILL to this process), stop (SIGSTOP), sleep(SECONDS) or error (raises
`FailpointError`). An action happens every time the process reaches the place; with @N the Nth time; with @1/N one time
in N at random, seeded by DELTASERVE_FAILPOINTS_SEED. Each action first adds a line to the file
DELTASERVE_FAILPOINTS_LOG.

The environment is read once, on import. A place that it does not name costs a call and a comparison.
"""

import os
import random
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from time import monotonic_ns, sleep

NAMES: Mapping[str, str] = {
    # The client.
    "worker.opened": "the server has opened the session, the worker has not recorded it",
    "worker.rejoined": "a new session has replaced the old one, nothing was pushed in it yet",
    "worker.renewing": "the background thread is about to renew the lease",
    "worker.before_send": "a push is about to be sent",
    "worker.mid_body": "StreamStep: gRPC has taken one more chunk of the gradient",
    "worker.sent": "StreamStep: gRPC has taken the whole push, no answer has arrived",
    "worker.acknowledged": "the answer has arrived, the worker has not recorded it",
    "worker.mid_answer": "one more chunk of the weights is written to the caller's memory",
    "worker.recorded": "the worker has recorded the answer, the call has not returned",
    # The server's side, in the order in which a push comes by.
    "push.headers": "the header is checked, no value has arrived",
    "push.chunk": "one more chunk of values has arrived, it is not checked",
    "push.admitted": "all values have arrived and are valid",
    "push.staged": "the push is about to be handed to the model",
    "push.accepted": "the model has decided about the push, nothing is carried out",
    "push.waiting": "the call is about to wait for the update, it holds no lock",
    "push.reduce": "a push is about to be added to the sum, or several are about to be combined",
    "push.mid_update": "part of the update is done",
    "push.updated": "the new version is computed, it is not the current one",
    "push.published": "the new version is the current one, no call is answered",
    "push.acknowledged": "the update is done, its answer is about to be sent",
    # With a journal.
    "journal.recorded": "an update is done, its record waits to be written",
    "journal.written": "records are written, not synced",
    "journal.synced": "records are durable, no call is answered",
    # For every small file and snapshot that is written.
    "file.created": "an empty temporary file exists",
    "file.mid_write": "part of it is written",
    "file.written": "all of it is written, not synced",
    "file.synced": "it is synced, under its temporary name",
    "file.renamed": "it has its final name, the folder is not synced",
    "file.safe": "the folder is synced: the file is durable",
    "snapshot.cut": "a snapshot is taken in memory, nothing of it is written",
    "snapshot.tensors": "its tensors are durable, its manifest does not exist",
    "snapshot.manifest": "its manifest is durable, nothing old is removed",
    "snapshot.removing": "one more old file is about to be removed",
    # During recovery.
    "recovery.manifest": "a model's newest manifest is read",
    "recovery.tensors": "its tensors are read",
    "recovery.replay": "one more journal record is replayed",
    "recovery.done": "a model is recovered, it is not served yet",
}
"""Every place, and what is true when the process reaches it."""

_SHAPE = re.compile(r"(?P<name>[a-z_.]+)=(?P<action>[a-z]+)(\((?P<seconds>[^()]*)\))?(@(?P<chance>1/)?(?P<count>\d+))?")


class FailpointError(RuntimeError):
    """The error of a failpoint with the action `error`."""


@dataclass(slots=True)
class _Armed:
    """An active failpoint, and when it acts: always, the `nth` time, or at random one time in `one_in`."""

    name: str
    action: str
    act: Callable[[], None]
    nth: int = 0
    one_in: int = 0
    chance: random.Random = field(default_factory=random.Random)
    reached: int = 0

    def due(self) -> bool:
        """Counts a visit to the place and returns whether it acts now."""
        self.reached += 1
        if self.one_in:
            return self.chance.randrange(self.one_in) == 0
        return self.nth in (0, self.reached)


def failpoint(name: str) -> None:
    """Performs the actions that the environment asks for at the place `name`, one of `NAMES`."""
    if _armed is None:
        return
    if name not in NAMES:
        raise ValueError(f"failpoint {name} is not in the list of names")
    with _lock:  # threads share the counts, and @3 must act once
        due = [armed for armed in _armed.get(name, ()) if armed.due()]
    for armed in due:
        # Before the action, which may be the end.
        _log(f"{monotonic_ns()} {os.getpid()} {name} {armed.action} {armed.reached}\n")
        armed.act()


def parse(text: str, seed: str = "") -> list[_Armed]:
    """Parses a value of DELTASERVE_FAILPOINTS.

    Raises:
        ValueError: The syntax is wrong, or a place or an action does not exist.
    """
    return [_entry(entry, f"{seed}:{index}") for index, entry in enumerate(filter(None, text.split(";")))]


def _entry(text: str, seed: str) -> _Armed:
    found = _SHAPE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"DELTASERVE_FAILPOINTS: expected NAME=ACTION, NAME=ACTION@N or NAME=ACTION@1/N, got {text!r}")
    name, count = found["name"], int(found["count"] or 0)
    if name not in NAMES:
        raise ValueError(f"DELTASERVE_FAILPOINTS: there is no place named {name}; there are {', '.join(NAMES)}")
    if found["count"] and not count:
        raise ValueError(f"DELTASERVE_FAILPOINTS: expected a count of 1 or more, got {text!r}")
    which = {"one_in": count} if found["chance"] else {"nth": count}
    act = _action(name, found["action"], found["seconds"])
    # Not for cryptography: it decides when a test's fault happens.
    return _Armed(name, found["action"], act, **which, chance=random.Random(f"{seed}:{name}"))  # noqa: S311


def _action(name: str, action: str, seconds: str | None) -> Callable[[], None]:
    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)

    def fail() -> None:
        raise FailpointError(f"failpoint {name}")

    if action == "sleep" and seconds is not None:
        try:
            length = float(seconds)
        except ValueError:
            length = -1.0
        if not isfinite(length) or length < 0:
            raise ValueError(f"DELTASERVE_FAILPOINTS: expected seconds, 0 or more, got {seconds!r}")
        return lambda: sleep(length)
    actions = {"kill": lambda: send(signal.SIGKILL), "stop": lambda: send(signal.SIGSTOP), "error": fail}
    if action not in actions or seconds is not None:
        given = action if seconds is None else f"{action}({seconds})"
        raise ValueError(f"DELTASERVE_FAILPOINTS: {name}: expected kill, stop, sleep(SECONDS) or error, got {given}")
    return actions[action]


def _log(line: str) -> None:
    """Adds a line to the log in one write, which survives the death of the process."""
    if _log_path:
        log = os.open(_log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)  # several processes write to it
        try:
            os.write(log, line.encode())
        finally:
            os.close(log)


def _from_environment() -> dict[str, list[_Armed]] | None:
    by_name: dict[str, list[_Armed]] = {}
    for armed in parse(os.environ.get("DELTASERVE_FAILPOINTS", ""), os.environ.get("DELTASERVE_FAILPOINTS_SEED", "")):
        by_name.setdefault(armed.name, []).append(armed)
    return by_name or None


_lock = threading.Lock()
_log_path = os.environ.get("DELTASERVE_FAILPOINTS_LOG")
_armed = _from_environment()
