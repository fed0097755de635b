"""Ctrl+C, a real SIGINT, during a step that waits in a round: it ends the step, and the worker can go on."""

import signal
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deltaserve import Client, Sync
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProgram

PROGRAM = """
import signal, sys
import numpy as np
import deltaserve

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have let this process ignore it
size = int(sys.argv[2])
client = deltaserve.connect(sys.argv[1], timeout_seconds=60)
worker = client.model("m").worker("a")
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

SIZES = [3, 700_000]

every_size = pytest.mark.parametrize("size", SIZES, ids=["unary", "stream"])


class Interrupted:
    """A program whose worker "a" pushed ones, waited for its round and was interrupted; and worker "b" of the test."""

    def __init__(
        self, size: int, server: LocalServer, client: Client, start: "StartProgram", eventually: "Eventually"
    ) -> None:
        self.model = client.create_model("m", {"w": np.zeros(size)}, policy=Sync(min_workers=2))
        self.program = start(PROGRAM, server.target, str(size))
        assert self.program.line() == "ready"
        eventually(lambda: self.model.info().sessions[0].waiting)
        self.b = self.model.worker("b")
        began = monotonic()
        self.program.process.send_signal(signal.SIGINT)
        assert self.program.line() == "interrupted"
        assert monotonic() - began < 3

    def twin(self, client: Client, size: int, *values: float) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        with client.create_model("twin", {"w": np.zeros(size)}).worker() as worker:
            for value in values:
                worker.step({"w": np.full(size, value)})
            return worker.weights["w"]


@every_size
def test_with_the_same_gradient_it_is_applied_once(
    size: int, server: LocalServer, client: Client, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    scene = Interrupted(size, server, client, start_program, eventually)
    scene.program.tell("1")
    scene.b.step({"w": np.full(size, 3.0)})
    assert scene.program.line() in ("1 False 2", "1 True 2")
    assert scene.program.finish()[0] == 0
    assert scene.model.info().version == 1
    np.testing.assert_array_equal(scene.b.weights["w"], scene.twin(client, size, 2.0))


@every_size
def test_with_another_gradient_both_are_applied(
    size: int, server: LocalServer, client: Client, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    scene = Interrupted(size, server, client, start_program, eventually)
    scene.program.tell("5")
    scene.b.step({"w": np.full(size, 3.0)})
    assert scene.program.line() == "ROUND_CLOSED"  # it was computed on the weights before the first
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(scene.b.step, {"w": np.full(size, 3.0)})
        assert scene.program.line() == "2 False 2"
        second.result()
    assert scene.program.finish()[0] == 0
    np.testing.assert_array_equal(scene.b.weights["w"], scene.twin(client, size, 2.0, 4.0))


def test_a_program_that_gives_up_leaves_at_once_and_its_push_counts(
    server: LocalServer, client: Client, start_program: "StartProgram", eventually: "Eventually"
) -> None:
    scene = Interrupted(3, server, client, start_program, eventually)
    scene.program.tell("")
    assert scene.program.finish()[0] == 0
    assert [session.worker for session in scene.model.info().sessions] == ["b"]
    scene.b.step({"w": np.full(3, 3.0)})
    assert scene.b.last_result is not None
    assert scene.b.last_result.contributors == 2
    np.testing.assert_array_equal(scene.b.weights["w"], scene.twin(client, 3, 2.0))
