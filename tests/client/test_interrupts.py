"""SIGINT during a step that waits for its round ends the step, and the worker stays usable."""

import signal
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deltaserve import Client, Sync
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProgram

pytestmark = pytest.mark.deep

PROGRAM = """
import sys
import numpy as np
import deltaserve

size = int(sys.argv[2])
client = deltaserve.connect(sys.argv[1], timeout_seconds=60)
worker = client.model("m").worker("a", transport=sys.argv[3])
worker.pull()
print("ready", flush=True)
try:
    worker.step({"w": np.ones(size)})
except KeyboardInterrupt:
    print("interrupted", flush=True)
value = sys.stdin.readline().strip()
if value:
    gradient = {"w": np.full(size, float(value))}
    try:
        worker.step(gradient)
    except deltaserve.ConflictError as error:
        print(error.reason, flush=True)
        worker.step(gradient)
    result = worker.last_result
    print(result.version, result.duplicate, result.contributors, flush=True)
"""

WAYS = [(3, "auto"), (700_000, "stream"), (700_000, "shared")]

every_way = pytest.mark.parametrize(("size", "transport"), WAYS, ids=["unary", "stream", "shared"])


class Interrupted:
    """A program whose worker "a" pushed ones and was interrupted during the wait; and worker "b" in this process."""

    def __init__(
        self,
        size: int,
        transport: str,
        server: LocalServer,
        client: Client,
        start: "StartProgram",
        eventually: "Eventually",
    ) -> None:
        self.model = client.create_model("m", {"w": np.zeros(size)}, policy=Sync(min_workers=2))
        self.program = start(PROGRAM, server.target, str(size), transport)
        assert self.program.line() == "ready"
        eventually(lambda: self.model.info().sessions[0].waiting)
        self.b = self.model.worker("b")
        began = monotonic()
        self.program.process.send_signal(signal.SIGINT)
        assert self.program.line() == "interrupted"
        assert monotonic() - began < 10

    def twin(self, client: Client, size: int, *values: float) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        with client.create_model("twin", {"w": np.zeros(size)}).worker() as worker:
            for value in values:
                worker.step({"w": np.full(size, value)})
            return worker.weights["w"]


@every_way
def test_the_same_gradient_is_applied_once(
    size: int,
    transport: str,
    server: LocalServer,
    client: Client,
    start_program: "StartProgram",
    eventually: "Eventually",
) -> None:
    scene = Interrupted(size, transport, server, client, start_program, eventually)
    scene.program.tell("1")
    scene.b.step({"w": np.full(size, 3.0)})
    assert scene.program.line() in ("1 False 2", "1 True 2")
    assert scene.program.finish()[0] == 0
    assert scene.model.info().version == 1
    np.testing.assert_array_equal(scene.b.weights["w"], scene.twin(client, size, 2.0))


@every_way
def test_with_another_gradient_both_are_applied(
    size: int,
    transport: str,
    server: LocalServer,
    client: Client,
    start_program: "StartProgram",
    eventually: "Eventually",
) -> None:
    scene = Interrupted(size, transport, server, client, start_program, eventually)
    scene.program.tell("5")
    scene.b.step({"w": np.full(size, 3.0)})
    assert scene.program.line() == "ROUND_CLOSED"  # it was computed on the weights before the first push
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(scene.b.step, {"w": np.full(size, 3.0)})
        assert scene.program.line() in ("2 False 2", "2 True 2")
        second.result()
    assert scene.program.finish()[0] == 0
    np.testing.assert_array_equal(scene.b.weights["w"], scene.twin(client, size, 2.0, 4.0))


def test_an_interrupted_program_exits_at_once_and_its_push_counts(
    server: LocalServer, client: Client, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    scene = Interrupted(3, "auto", server, client, start_program, eventually)
    scene.program.tell("")
    assert scene.program.finish()[0] == 0
    assert [session.worker for session in scene.model.info().sessions] == ["b"]
    scene.b.step({"w": np.full(3, 3.0)})
    assert scene.b.last_result is not None
    assert scene.b.last_result.contributors == 2
    np.testing.assert_array_equal(scene.b.weights["w"], scene.twin(client, 3, 2.0))


OUT = """
import sys
import numpy as np
import deltaserve

size = int(sys.argv[2])
client = deltaserve.connect(sys.argv[1], timeout_seconds=60)
worker = client.model("m").worker("a", transport=sys.argv[3])
mine = {"w": np.zeros(size, np.float32)}
worker.pull(out=mine)
print("ready", flush=True)
try:
    worker.step({"w": np.ones(size)}, out=mine)
except KeyboardInterrupt:
    mine["w"][:] = 7
    print("interrupted", flush=True)
sys.stdin.readline()
print((mine["w"] == 7).all(), flush=True)
"""


@every_way
def test_after_an_interrupt_the_callers_memory_stays_unchanged(
    size: int,
    transport: str,
    server: LocalServer,
    client: Client,
    start_program: "StartProgram",
    eventually: "Eventually",
) -> None:
    """The answer arrives later, when the round closes, and must not overwrite the caller's arrays."""
    model = client.create_model("m", {"w": np.zeros(size)}, policy=Sync(min_workers=2))
    program = start_program(OUT, server.target, str(size), transport)
    assert program.line() == "ready"
    eventually(lambda: model.info().sessions[0].waiting)
    program.process.send_signal(signal.SIGINT)
    assert program.line() == "interrupted"
    with model.worker("b") as b:
        b.step({"w": np.ones(size)})
    sleep(0.3)
    program.tell("look")
    assert program.line() == "True"
    assert program.finish()[0] == 0


STORM = """
import random, signal, sys
import numpy as np
import deltaserve

def interrupt(number, frame):
    if armed:  # the signal may arrive after the step
        raise KeyboardInterrupt

armed = False
signal.signal(signal.SIGALRM, interrupt)
size, interrupts, chance = int(sys.argv[2]), 0, random.Random(int(sys.argv[4]))
client = deltaserve.connect(sys.argv[1], timeout_seconds=20)
worker = client.model("m").worker("a", transport=sys.argv[5])
worker.pull()
while interrupts < int(sys.argv[3]):
    gradient = {"w": np.full(size, chance.random())}
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.004 if size < 1000 else 0.03))
            worker.step(gradient)
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
    except deltaserve.ConflictError:
        pass  # the weights were received only in part
worker.pull()
worker.step({"w": np.ones(size)})
print(worker.version, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("seed", [1, 2])
@every_way
def test_interrupts_at_any_moment_leave_worker_and_connection_usable(
    size: int, transport: str, seed: int, server: LocalServer, client: Client, start_program: "StartProgram"
) -> None:
    """An exception from a signal handler inside gRPC's own Python code would corrupt its locks and counters."""
    model = client.create_model("m", {"w": np.zeros(size)})
    program = start_program(STORM, server.target, str(size), "150" if size < 1000 else "30", str(seed), transport)
    line = program.line()
    assert line, f"the program died: {program.finish()[2]}"
    version, info = int(line), model.info()
    assert info.version == version
    assert info.sessions[0].last_sequence == version, "every push that was accepted made one update"
    program.tell("enough")
    status, _, err = program.finish()
    assert status == 0, f"and the program ends: {err}"
