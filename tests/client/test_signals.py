"""Calls that no handler of a signal interrupts: what the handlers do, they do afterwards, once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve._signals import undisturbed

if TYPE_CHECKING:
    pass

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)


class Recorder:
    """Handlers that write down what they are called with, and when."""

    def __init__(self) -> None:
        self.inside = False
        self.got: list[tuple[int, bool]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.got.append((number, self.inside))

    def calls(self, *numbers: signal.Signals) -> Callable[[], str]:
        """What is called undisturbed: it raises signals."""

        def function() -> str:
            self.inside = True
            for number in numbers:
                os.kill(os.getpid(), number)
                sleep(0.01)
            self.inside = False
            return "done"

        return function


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """All signals of `ALL` are recorded, in this process."""
    held = {number: signal.getsignal(number) for number in ALL}
    made = Recorder()
    for number in ALL:
        signal.signal(number, made)
    yield made
    for number, handler in held.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in signal.valid_signals()]


@pytest.mark.parametrize("number", ALL)
def test_a_handler_runs_afterwards_and_once(recorder: Recorder, number: signal.Signals) -> None:
    before = handlers()
    assert undisturbed(recorder.calls(number)) == "done"
    assert recorder.got == [(number, False)]
    assert handlers() == before


def test_every_signal_that_came_is_handled(recorder: Recorder) -> None:
    undisturbed(recorder.calls(*ALL, signal.SIGINT))
    assert sorted(recorder.got) == sorted((number, False) for number in (*ALL, signal.SIGINT))


def test_without_a_signal_nothing_happens(recorder: Recorder) -> None:
    before = handlers()
    assert undisturbed(recorder.calls()) == "done"
    assert recorder.got == []
    assert handlers() == before


def test_whatever_the_call_raises_handlers_are_put_back_and_run(recorder: Recorder) -> None:
    before = handlers()

    def fails() -> None:
        recorder.calls(signal.SIGTERM)()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        undisturbed(fails)
    assert recorder.got == [(signal.SIGTERM, False)]
    assert handlers() == before


def test_the_default_of_ctrl_c_interrupts_afterwards() -> None:
    held = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = []

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sleep(0.01)
        ended.append(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            undisturbed(interrupted)
        assert ended == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, held)


@pytest.mark.parametrize("order", [ALL, ALL[::-1]], ids=["forwards", "backwards"])
def test_a_handler_that_raises_takes_no_other_ones_signal(
    recorder: Recorder, order: tuple[signal.Signals, ...]
) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        recorder(number, frame)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        undisturbed(recorder.calls(*order))
    assert sorted(recorder.got) == sorted((number, False) for number in ALL)
    assert handlers() == before


def test_calls_within_calls(recorder: Recorder) -> None:
    before = handlers()

    def inner() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(0.01)

    def outer() -> str:
        recorder.inside = True
        undisturbed(inner)
        assert recorder.got == []
        recorder.inside = False
        return "done"

    assert undisturbed(outer) == "done"
    assert recorder.got == [(signal.SIGTERM, False)]
    assert handlers() == before


DEFAULTS = """
import os, signal, sys, time
from deltaserve._signals import undisturbed

signal.signal(signal.SIGUSR1, signal.SIG_IGN)
def function():
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
undisturbed(function)
"""


def test_what_is_ignored_stays_so_and_what_ends_the_process_ends_it() -> None:
    ended = subprocess.run([sys.executable, "-c", DEFAULTS], timeout=20, check=False)
    assert ended.returncode == -signal.SIGTERM


def test_signals_from_outside_at_any_moment_are_all_handled_and_no_handler_is_lost(recorder: Recorder) -> None:
    """Also while the handlers are changed and put back; one signal at a time, so that the system merges none."""
    before, sent, over = handlers(), 0, threading.Event()

    def send() -> None:
        nonlocal sent
        pid = os.getpid()
        while not over.is_set():
            seen = len(recorder.got)
            os.kill(pid, signal.SIGUSR1)
            sent += 1
            deadline = monotonic() + 10
            while len(recorder.got) == seen and monotonic() < deadline and not over.is_set():
                sleep(0)

    thread = threading.Thread(target=send)
    thread.start()
    deadline = monotonic() + 2
    while monotonic() < deadline or sent < 100:
        undisturbed(lambda: None)
    over.set()
    thread.join()
    deadline = monotonic() + 10
    while len(recorder.got) < sent and monotonic() < deadline:
        sleep(0.01)
    assert len(recorder.got) == sent
    assert handlers() == before
