"""Unary steps of a program that receives signals at any moment, or SIGINT while it waits."""

import signal
from contextlib import suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.support.states import assert_same_state

from deltaserve import Client, Sync
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProgram

pytestmark = pytest.mark.deep

BEGIN = """
import os, queue, random, signal, sys, threading, time
import numpy as np
import deltaserve

chance, end = random.Random(int(sys.argv[2])), time.monotonic() + 3
client = deltaserve.connect(sys.argv[1], timeout_seconds=20)
worker = client.model("m").worker("a")
worker.pull()
values = []
def gradient():
    values.append(float(np.float32(chance.random())))
    return {"w": np.full(3, values[-1])}
"""

END = """
print(worker.version, len(values), *values, flush=True)
sys.stdin.readline()
"""

RAISING = """
interrupts = 0
armed = False
def interrupt(number, frame):
    if armed:  # the signal may arrive after the step
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
while time.monotonic() < end or interrupts < 20:
    pushed, number = gradient(), worker._session.sequence
    while worker._session.sequence == number:
        try:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.003))
                worker.step(pushed)
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
        except deltaserve.StaleGradientError:
            pass
assert signal.getsignal(signal.SIGALRM) is interrupt
"""

RETURNING = """
caught, sent, over = queue.SimpleQueue(), 0, threading.Event()
signal.signal(signal.SIGTERM, caught.put)
signal.signal(signal.SIGUSR1, lambda number, frame: caught.put(number))
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
def disturb():
    global sent
    other = random.Random(1)
    while not over.is_set():
        time.sleep(other.uniform(0, 0.003))
        os.kill(os.getpid(), other.choice((signal.SIGTERM, signal.SIGUSR1)))
        sent += 1
        while caught.qsize() < sent and not over.is_set():  # the system merges pending signals
            time.sleep(0.0001)
thread = threading.Thread(target=disturb)
thread.start()
while time.monotonic() < end or sent < 100:
    worker.step(gradient())
over.set()
thread.join()
assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
assert caught.qsize() == sent, (caught.qsize(), sent)
"""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("storm", [RAISING, RETURNING], ids=["raising", "returning"])
def test_a_storm_of_signals_loses_and_repeats_no_push(
    storm: str, seed: int, server: LocalServer, client: Client, start_program: "StartProgram"
) -> None:
    """The program repeats each step until it returns, so each gradient is applied once, in order."""
    model = client.create_model("m", {"w": np.zeros(3)})
    program = start_program(BEGIN + storm + END, server.target, str(seed))
    line = program.line()
    assert line, f"the program died: {program.finish()[2]}"
    version, count, *values = line.split()
    assert int(version) == int(count) == model.info().version
    program.tell("enough")
    assert program.finish()[0] == 0
    with client.create_model("twin", {"w": np.zeros(3)}).worker() as twin:
        for value in values:
            twin.step({"w": np.full(3, float(value))})
    assert_same_state(client.model("m").pull_state(), client.model("twin").pull_state())


WAITS = """
import sys, time
import numpy as np
import deltaserve

client = deltaserve.connect(sys.argv[1], timeout_seconds=60)
worker = client.model("m").worker("a")
worker.pull()
print("ready", flush=True)
try:
    worker.step({"w": np.ones(3)})
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("after_seconds", [0.0, 0.1, 1.0])
def test_ctrl_c_ends_a_unary_step_that_waits_in_its_round(
    after_seconds: float, server: LocalServer, client: Client, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    model = client.create_model("m", {"w": np.zeros(3)}, policy=Sync(min_workers=2))
    program = start_program(WAITS, server.target)
    assert program.line() == "ready"
    eventually(lambda: model.info().sessions[0].waiting)
    sleep(after_seconds)
    sent = monotonic()
    program.process.send_signal(signal.SIGINT)
    ended = float(program.line())
    assert ended - sent < 10
    with suppress(BrokenPipeError):
        assert program.finish()[0] == 0
