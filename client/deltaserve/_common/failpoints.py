"""Named places at which a test makes this process die, stop, wait or fail; off unless the environment names them.

    DELTASERVE_FAILPOINTS="worker.mid_body=kill@3;push.staged=sleep(0.05)@1/20"

Each entry is NAME=ACTION, where ACTION is kill (SIGKILL of this process), stop (SIGSTOP of it), sleep(SECONDS) or error
(raises `FailpointError`). Without more it happens every time; with @N the Nth time; with @1/N one time in N, by chance,
from DELTASERVE_FAILPOINTS_SEED. Before it happens, a line is added to the file DELTASERVE_FAILPOINTS_LOG.

The environment is read once, when this is imported: a place that is off costs a call and a comparison.
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
    # A worker's side.
    "worker.opened": "the server has opened the session, the worker does not know yet",
    "worker.rejoined": "a new session is open after the lease ran out, nothing is pushed in it yet",
    "worker.renewing": "the lease is about to be renewed in the background",
    "worker.before_send": "a push is about to be sent, nothing of it has been",
    "worker.mid_body": "StreamStep: one more chunk of the gradient is handed to gRPC",
    "worker.sent": "StreamStep: all of the push is handed to gRPC, no answer has come",
    "worker.acknowledged": "the answer has come, the worker has taken no note of it",
    "worker.mid_answer": "one more chunk of the weights is written to the caller's memory",
    "worker.recorded": "the worker has taken note of the answer, its caller does not know yet",
    # The server's side, in the order in which a push comes by.
    "push.headers": "the header has been looked at, no value has come",
    "push.chunk": "one more chunk of values has come, and is not looked at",
    "push.admitted": "all values are here and are good",
    "push.staged": "the push is handed to the model, which does not have it yet",
    "push.accepted": "the model has the push and has decided, nothing is carried out",
    "push.waiting": "the call is about to wait for the update; nothing is held",
    "push.reduce": "a push is about to be added to the sum, or several to be combined",
    "push.mid_update": "a part of the update is done",
    "push.updated": "the new version is computed, not current",
    "push.published": "the new version is current, nobody has been told",
    "push.acknowledged": "the update is made, its answer is about to be sent",
    # Where there is a journal.
    "journal.recorded": "an update is made, its record waits to be written",
    "journal.written": "records are written, and not on the disk",
    "journal.synced": "records are as safe as they are to be, nobody has been told",
    # Whenever a small file or a snapshot is written.
    "file.created": "a file is made under another name, and is empty",
    "file.mid_write": "a part of it is written",
    "file.written": "all of it is written, and not on the disk",
    "file.synced": "it is on the disk, under another name",
    "file.renamed": "it has its name, which is not on the disk",
    "file.safe": "it is there for good",
    "snapshot.cut": "a snapshot is taken, nothing of it is written",
    "snapshot.tensors": "its tensors are there for good, its manifest is not begun",
    "snapshot.manifest": "it is there for good, nothing old is removed",
    "snapshot.removing": "one more old file is about to be removed",
    # When a server comes back.
    "recovery.manifest": "a model's newest manifest is read",
    "recovery.tensors": "its tensors are read",
    "recovery.replay": "one more record has happened again",
    "recovery.done": "a model is back, and not yet served",
}
"""Every place, and what holds there."""

_SHAPE = re.compile(r"(?P<name>[a-z_.]+)=(?P<action>[a-z]+)(\((?P<seconds>[^()]*)\))?(@(?P<chance>1/)?(?P<count>\d+))?")


class FailpointError(RuntimeError):
    """What a failpoint with the action `error` raises."""


@dataclass(slots=True)
class _Armed:
    """A place that is on, and when its turn is: always, the `nth` time, or by chance one time in `one_in`."""

    name: str
    action: str
    act: Callable[[], None]
    nth: int = 0
    one_in: int = 0
    chance: random.Random = field(default_factory=random.Random)
    reached: int = 0

    def due(self) -> bool:
        """Counts one more time that the place was reached, and says whether it is to happen now."""
        self.reached += 1
        if self.one_in:
            return self.chance.randrange(self.one_in) == 0
        return self.nth in (0, self.reached)


def failpoint(name: str) -> None:
    """Does what the environment asks for at this place; `name` is one of `NAMES`."""
    if _armed is not None:
        _reach(name)


def parse(text: str, seed: str = "") -> list[_Armed]:
    """Returns what a value of DELTASERVE_FAILPOINTS asks for.

    Raises:
        ValueError: It cannot be understood, or names a place or an action that does not exist.
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
    # Chance decides when a test's fault happens, and nothing else.
    return _Armed(name, found["action"], act, **which, chance=random.Random(f"{seed}:{name}"))  # noqa: S311


def _action(name: str, action: str, seconds: str | None) -> Callable[[], None]:
    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)

    def fail() -> None:
        raise FailpointError(f"failpoint {name}")

    if action == "sleep" and seconds is not None:
        length = _seconds(seconds)
        return lambda: sleep(length)
    actions = {"kill": lambda: send(signal.SIGKILL), "stop": lambda: send(signal.SIGSTOP), "error": fail}
    if action not in actions or seconds is not None:
        given = action if seconds is None else f"{action}({seconds})"
        raise ValueError(f"DELTASERVE_FAILPOINTS: {name}: expected kill, stop, sleep(SECONDS) or error, got {given}")
    return actions[action]


def _seconds(text: str) -> float:
    try:
        length = float(text)
    except ValueError:
        length = -1.0
    if not isfinite(length) or length < 0:
        raise ValueError(f"DELTASERVE_FAILPOINTS: expected seconds, 0 or more, got {text!r}")
    return length


def _reach(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"failpoint {name} is not in the list of names")
    with _lock:
        due = [armed for armed in (_armed or {}).get(name, ()) if armed.due()]
    for armed in due:
        _tell(f"{monotonic_ns()} {os.getpid()} {name} {armed.action} {armed.reached}\n")
        armed.act()


def _tell(line: str) -> None:
    """Adds a line to the log in one write, which a death that follows does not undo."""
    if _log_path:
        log = os.open(_log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
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
