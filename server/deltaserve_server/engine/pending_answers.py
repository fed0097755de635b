"""The results that pushes wait for."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from deltaserve_server.model import Key, PushResult, Refused


class PendingAnswers:
    """The futures of a model's pushes, by key. The caller holds the model's lock.

    A future leaves the table when its outcome is decided, and is set when that is durable. A worker that sends the push
    again in between waits for a future of its own.
    """

    def __init__(self, on_durable: Callable[[Callable[[], None]], None]) -> None:
        self._on_durable = on_durable  # calls a function once everything that happened so far is durable
        self._futures: dict[Key, Future[PushResult]] = {}
        self._decided: set[Future[PushResult]] = set()

    def __bool__(self) -> bool:
        """Whether any push waits."""
        return bool(self._futures or self._decided)

    def get(self, key: Key) -> "Future[PushResult] | None":
        """Returns the future of a push that waits; None if it does not."""
        return self._futures.get(key)

    def expect(self, key: Key) -> "Future[PushResult]":
        """Returns the future of a push, a new one if it did not wait."""
        return self._futures.setdefault(key, Future())

    def settle(self, key: Key, outcome: PushResult | Refused) -> None:
        """Decides a push; its future is set once the outcome is durable."""
        future = self._futures.pop(key, None)
        if future:  # after a restart nobody may wait for a push any more
            self._decided.add(future)
            self._on_durable(partial(self._set, future, outcome))

    def fail(self, refusal: Refused) -> None:
        """Refuses every push that waits. The caller keeps the journal from calling back until this returns."""
        for future in (*self._futures.values(), *self._decided):
            future.set_exception(refusal)
        self._futures.clear()
        self._decided.clear()

    def _set(self, future: "Future[PushResult]", outcome: PushResult | Refused) -> None:
        self._decided.discard(future)
        if future.done():
            return  # the model has ended since
        if isinstance(outcome, Refused):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
