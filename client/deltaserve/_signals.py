"""Short calls in the main thread that no signal's handler interrupts; `_aside` says why, and has those that last."""

import _signal  # type: ignore[import-not-found]  # signal's functions without enums: four times as fast
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_NUMBERS = [int(number) for number in signal.valid_signals()]


def undisturbed(function: Callable[[], T]) -> T:
    """Calls a function in the main thread; the handlers of signals that come meanwhile run when it is over.

    Every handler that Python would run is replaced by one that takes note, and put back.
    """
    held: dict[int, Any] = {number: handler for number in _NUMBERS if callable(handler := _signal.getsignal(number))}
    came: list[int] = []
    over = False

    def note(number: int, frame: FrameType | None) -> None:
        if over:  # left in place, because another handler raised while they were put back
            held[number](number, frame)
        else:
            came.append(number)

    try:
        for number in held:
            _signal.signal(number, note)
        return function()
    finally:
        try:
            _put_back(list(held.items()), came)
        finally:
            over = True


def _put_back(held: list[tuple[int, Any]], came: list[int]) -> None:
    """Puts the handlers back and raises the signals that came, all of them also where a handler raises."""
    try:
        while held:
            _signal.signal(*held[-1])
            del held[-1]
        while came:
            signal.raise_signal(came.pop(0))
    finally:
        if held or came:
            _put_back(held, came)
