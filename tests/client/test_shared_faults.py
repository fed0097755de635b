"""Steps through shared memory that are interrupted, or whose answer is lost, are applied exactly once."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.client.sharing_scene import BEGIN, SIZE, ones, twin

import deltaserve
from deltaserve import Client, Sync
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProgram, StartProxy

pytestmark = pytest.mark.deep


@pytest.fixture
def start(start_program: "StartProgram", server: LocalServer) -> "StartProgram":
    """Starts a program with a worker of model "m" of `server`."""
    return lambda source, *more: start_program(BEGIN + source, server.target, str(SIZE), *more)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_during_a_step_loses_and_repeats_nothing(
    client: Client, server: LocalServer, start_proxy: "StartProxy", direction: str
) -> None:
    proxy = start_proxy(server.target)
    model = client.create_model("m", ones(0))
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far:
        worker = far.model("m").worker("a", transport="shared")
        worker.pull()
        for number in range(1, 31):
            proxy.cut_after(direction, 10 + 7 * number)
            worker.step(ones(number))
            proxy.cut_after(direction, 1 << 40)
            assert model.info().version == number
        assert proxy.cuts > 10
        weights = worker.weights["w"].copy()
    np.testing.assert_array_equal(weights, twin(client, *range(1, 31)))


@pytest.mark.parametrize("same", [True, False], ids=["the same", "another"])
def test_after_a_lost_answer_the_next_gradient_is_not_taken_for_the_first(
    client: Client,
    server: LocalServer,
    start_proxy: "StartProxy",
    eventually: "Eventually",
    time_is_up: Callable[[], None],
    same: bool,
) -> None:
    proxy = start_proxy(server.target)
    model = client.create_model("m", ones(0))
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far, ThreadPoolExecutor(1) as pool:
        worker = far.model("m").worker("a", transport="shared")
        worker.pull()
        proxy.hold_answers()
        step = pool.submit(worker.step, ones())
        eventually(lambda: model.info().version == 1)
        time_is_up()
        proxy.cut()
        with pytest.raises(deltaserve.UnavailableError):
            step.result()
        worker.step(ones(1.0 if same else 2.0))
        worker.step(ones(3.0))
        assert model.info().version == (2 if same else 3)
        weights = worker.weights["w"].copy()
    np.testing.assert_array_equal(weights, twin(client, *((1, 3) if same else (1, 2, 3))))


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_push_is_repeated_in_messages_with_the_same_values(
    client: Client,
    server: LocalServer,
    start_proxy: "StartProxy",
    eventually: "Eventually",
    time_is_up: Callable[[], None],
    wire: Any,
) -> None:
    """Rounded to 16 bits the gradient would not match its first attempt and would be applied a second time."""
    third = float(np.float32(1 / 3))
    proxy = start_proxy(server.target)
    model = client.create_model("m", ones(0))
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far, ThreadPoolExecutor(1) as pool:
        worker = far.model("m").worker("a", transport="shared", wire=wire)
        worker.pull()
        proxy.hold_answers()
        step = pool.submit(worker.step, ones(third))
        eventually(lambda: model.info().version == 1)
        time_is_up()
        proxy.cut()
        with pytest.raises(deltaserve.UnavailableError):
            step.result()
        worker.step(ones(third))
        assert worker.last_result is not None
        assert (worker.last_result.duplicate, model.info().version) == (True, 1)
        weights = worker.weights["w"].copy()
    np.testing.assert_array_equal(weights, twin(client, third))


INTERRUPTED = """
client, model = connect()
worker = model.worker("a", transport="shared")
worker.pull()
print("ready", flush=True)
try:
    worker.step(ones())
except KeyboardInterrupt:
    print("interrupted", flush=True)
value = float(sys.stdin.readline())
try:
    worker.step(ones(value))
except deltaserve.ConflictError as error:
    print(error.reason, flush=True)
    worker.step(ones(value))
print(worker.last_result.version, worker.last_result.contributors, flush=True)
"""


@pytest.mark.parametrize("value", [1, 5])
def test_ctrl_c_during_a_step_that_waits_in_its_round(
    client: Client, start: "StartProgram", eventually: "Eventually", value: int
) -> None:
    model = client.create_model("m", ones(0), policy=Sync(min_workers=2))
    program = start(INTERRUPTED)
    assert program.line() == "ready", program.finish()
    eventually(lambda: model.info().sessions[0].waiting)
    sent = monotonic()
    program.process.send_signal(signal.SIGINT)
    assert program.line() == "interrupted"
    assert monotonic() - sent < 10
    program.tell(str(value))
    with model.worker("b", transport="shared") as b, ThreadPoolExecutor(1) as pool:
        b.step(ones(3))
        if value == 1:
            assert program.line() == "1 2"
            expected = [2.0]
        else:
            assert program.line() == "ROUND_CLOSED"
            second = pool.submit(b.step, ones(3))
            assert program.line() == "2 2"
            second.result()
            expected = [2.0, 4.0]
        assert program.finish()[0] == 0
        weights = b.weights["w"].copy()
    np.testing.assert_array_equal(weights, twin(client, *expected))


STORM = """
import random
armed = False
def interrupt(number, frame):
    if armed:  # the signal may arrive after the step
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
chance, interrupts, values = random.Random(int(sys.argv[3])), 0, []
client, model = connect()
worker = model.worker("a", transport="shared")
worker.pull()
while interrupts < 60:
    values.append(float(np.float32(chance.random())))
    number = worker._session.sequence
    while worker._session.sequence == number:
        try:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.012))
                worker.step(ones(values[-1]))
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
        except deltaserve.StaleGradientError:
            pass
print(worker.version, *values, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_interrupts_at_any_moment_lose_and_repeat_nothing(client: Client, start: "StartProgram", seed: str) -> None:
    model = client.create_model("m", ones(0))
    program = start(STORM, seed)
    line = program.line()
    assert line, program.finish()[2]
    version, *values = line.split()
    assert int(version) == len(values) == model.info().version
    program.tell("enough")
    assert program.finish()[0] == 0
    with model.worker("b") as b:
        np.testing.assert_array_equal(b.weights["w"], twin(client, *map(float, values)))
