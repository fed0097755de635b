"""BackgroundCall: a call that another thread makes while the main thread waits."""

import os
import signal
import threading
import weakref
from contextlib import suppress
from time import sleep

import pytest

from deltaserve import _background
from deltaserve._background import BackgroundCall


class Interrupter:
    """A function that sends SIGINT to its own process while it runs."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        self.cancelled.wait(10)
        sleep(0.05)
        self.ended.set()
        return "done"


def test_the_main_thread_only_waits() -> None:
    assert BackgroundCall(threading.get_ident, None).run() != threading.get_ident()


def test_another_thread_makes_the_call_itself() -> None:
    idents: list[int] = []
    thread = threading.Thread(target=lambda: idents.append(BackgroundCall(threading.get_ident, None).run()))
    thread.start()
    thread.join()
    assert idents == [thread.ident]


@pytest.mark.parametrize("cancel", [None, lambda: None], ids=["without a cancel", "with one"])
def test_an_error_of_the_function_is_raised(cancel: None) -> None:
    with pytest.raises(ZeroDivisionError):
        BackgroundCall(lambda: 1 // 0, cancel).run()


def test_an_interrupt_cancels_the_call_and_waits_for_its_end() -> None:
    function = Interrupter()
    with pytest.raises(KeyboardInterrupt):
        BackgroundCall(function, function.cancelled.set).run()
    assert function.ended.is_set(), "the call uses the caller's memory until then"


def test_an_interrupt_does_not_cancel_a_call_that_cannot_be_cancelled() -> None:
    function = Interrupter()
    with pytest.raises(KeyboardInterrupt):
        BackgroundCall(function, None).run()
    assert not function.ended.is_set()
    assert BackgroundCall(lambda: 3, None).run() == 3, "further calls do not wait for it"
    function.cancelled.set()
    assert function.ended.wait(10)


def test_calls_share_a_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_background, "_pool", _background._ThreadPool())
    idents = {BackgroundCall(threading.get_ident, lambda: None).run() for _ in range(300)}
    assert len(idents) < 100, "a thread takes the next call as soon as it is done"
    assert _background._pool._idle <= 3


def test_a_call_keeps_no_memory_of_its_caller() -> None:
    class Gradient:
        def __call__(self) -> None:
            raise ValueError

    function = Gradient()
    gone = weakref.ref(function)
    with suppress(ValueError):
        BackgroundCall(function, lambda: None).run()
    del function
    for _ in range(100):
        if gone() is None:
            break
        sleep(0.01)
    assert gone() is None, "without the garbage collector"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    BackgroundCall(lambda: None, None).run()
    child = os.fork()
    if not child:
        os._exit(7 if BackgroundCall(lambda: 7, None).run() == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
