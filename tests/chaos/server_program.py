"""The server under test, in a process of its own; or one with a planted defect, to see that the harness finds it."""

import sys
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from deltaserve_server import Server, ServerConfig
from deltaserve_server.memory.host import HostStore
from deltaserve_server.model import Answer, Machine, Push, PushResult
from deltaserve_server.model.sessions import Session


def _forget_duplicates() -> None:
    """The last push, sent again, is taken for a new one."""
    known = Session.known

    def forgetful(session: Session, push: Push) -> bool:
        return known(session, push) and push.sequence != session.last_accepted

    Session.known = forgetful  # type: ignore[method-assign, assignment]


def _lose_pushes() -> None:
    """Now and then a push is answered, and in no update."""
    push, count = Machine.push, iter(range(1 << 60))

    def careless(machine: Machine, given: Push, now: float) -> Any:
        session = machine.check(given, now)
        if next(count) % 10 or session.known(given):
            return push(machine, given, now)
        session.accept(given)
        result = PushResult(version=machine.version)
        session.apply(given.sequence, result, monotonic())
        return [Answer(given.key, result)]

    Machine.push = careless  # type: ignore[method-assign, assignment]


def _forget_weights() -> None:
    """A push's own weight does not count in the sum."""
    fold = HostStore.fold

    def plain(store: HostStore, staging: Any, factor: float) -> None:
        fold(store, staging, 1.0)

    HostStore.fold = plain  # type: ignore[method-assign, assignment]


PLANTS: Mapping[str, Callable[[], None]] = {
    "none": lambda: None,
    "doubles": _forget_duplicates,
    "loses": _lose_pushes,
    "other-bits": _forget_weights,
}


def main(plant: str) -> None:
    PLANTS[plant]()
    server = Server(ServerConfig(bind="127.0.0.1:0", device="cpu", threads=2))
    server.start()
    print(server.target, flush=True)
    server.wait()


if __name__ == "__main__":
    main(sys.argv[1])
