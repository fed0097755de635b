"""`overlap=True` when something fails while a push is under way, and what it leaves behind when it ends."""

import copy
import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.client.conftest import Program, Proxy, ServerProcess
from tests.torch.conftest import Deep, batch, stream_all
from torch import nn

import deltaserve
from deltaserve.torch import RemoteAdadelta, _overlap

if TYPE_CHECKING:
    from tests.torch.conftest import Eventually, Twins

    MakeTwins = Callable[..., Twins]


@pytest.fixture
def proxy(target: str) -> Iterator[Proxy]:
    line = Proxy(target)
    yield line
    line.close()


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(source: str, *arguments: str) -> Program:
        started.append(Program(source, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.kill()


class Behind:
    """Twins whose connections pass through a proxy that can be cut.

    Attributes:
        sent: The failpoints that the sending thread has passed, one for each chunk.
    """

    def __init__(self, make_twins: "MakeTwins", proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[str] = []
        monkeypatch.setattr("deltaserve._transport.overlapped.failpoint", self.sent.append)
        self.twins = make_twins(through=proxy.target)
        self.net, self.optimizer = self.twins.nets[0], self.twins.optimizers[0]
        self.twins.train(2)
        self.sent.clear()


@pytest.fixture
def behind(proxy: Proxy, make_twins: "MakeTwins", monkeypatch: pytest.MonkeyPatch) -> Behind:
    return Behind(make_twins, proxy, monkeypatch)


def test_a_connection_that_is_cut_during_backward(behind: Behind, proxy: Proxy, eventually: "Eventually") -> None:
    """Half of the push was sent; `step` sends all of it again."""

    def cut() -> None:
        if len(behind.twins.fates) == 2:
            eventually(lambda: len(behind.sent) >= 5)
            proxy.cut()

    behind.net.half_way = cut
    behind.twins.train(3)
    assert proxy.cuts == 1
    assert behind.twins.fates[3:] == ["taken", "taken"]


@pytest.mark.parametrize(
    "bytes_down", [100, *(pytest.param(count, marks=pytest.mark.deep) for count in (1, 700, 1500))]
)
def test_a_connection_that_is_cut_while_the_answer_arrives(behind: Behind, proxy: Proxy, bytes_down: int) -> None:
    def cut(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if behind.optimizer.version == 2:
            proxy.cut_after("down", bytes_down)

    behind.optimizer.register_step_pre_hook(cut)
    behind.twins.train(3)
    assert proxy.cuts == 1
    assert behind.optimizer.version == 5, "each push counted once"


def test_a_lost_answer(behind: Behind, proxy: Proxy, client: deltaserve.Client, eventually: "Eventually") -> None:
    """The server has the push, and recognises it when it comes a second time."""
    duplicates = []

    def cut() -> None:
        eventually(lambda: client.model(behind.optimizer._model.name).info().version == 3)
        proxy.cut()

    def hold(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if behind.optimizer.version == 2:
            proxy.hold_answers()
            threading.Thread(target=cut).start()

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert behind.optimizer.last_result
        duplicates.append(behind.optimizer.last_result.duplicate)

    behind.optimizer.register_step_pre_hook(hold)
    behind.optimizer.register_step_post_hook(note)
    behind.twins.train(3)
    assert duplicates == [True, False, False]
    assert behind.optimizer.version == 5


def errors_after_a_kill(overlap: bool, restart: bool) -> list[str]:
    """Returns what steps raise after the server was killed in the middle of a backward pass."""
    server, net, errors = ServerProcess(), Deep(), []
    try:
        options: dict[str, Any] = {"overlap": overlap, "transport": "stream", "timeout_seconds": 20}
        with RemoteAdadelta(net.parameters(), server.target, model="m", **options) as optimizer:

            def kill() -> None:
                net.half_way = lambda: None
                server.kill()
                if restart:
                    server.start()
                else:
                    optimizer._client._connection.timeout_seconds = 1.0

            for step in range(4):
                if step == 2:
                    net.half_way = kill
                optimizer.zero_grad()
                net(batch(step)).sum().backward()
                try:
                    optimizer.step()
                except deltaserve.Error as error:
                    errors.append(type(error).__name__)
    finally:
        server.close()
    return errors


@pytest.mark.deep
@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "gone"])
def test_a_server_that_is_killed_during_backward(restart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are the same with and without overlap."""
    stream_all(monkeypatch)
    expected = ["StateLostError" if restart else "UnavailableError"] * 2
    assert errors_after_a_kill(True, restart) == errors_after_a_kill(False, restart) == expected


# --- Ctrl+C

ROUND = """
import sys, time
import torch
import deltaserve
from deltaserve import Sync
from deltaserve.torch import RemoteAdadelta

param = torch.nn.Parameter(torch.zeros(700_000))
options = {"transport": "stream", "timeout_seconds": 60}
optimizer = RemoteAdadelta([param], sys.argv[1], model="m", worker="a", overlap=True, policy=Sync(), **options)
def backward(value):
    optimizer.zero_grad()
    (param * value).sum().backward()
backward(1.0)
optimizer.step()
print("ready", flush=True)
sys.stdin.readline()
backward(2.0)
push = optimizer._overlap.push
while not push.header:
    time.sleep(0.01)
try:
    optimizer.step()
except KeyboardInterrupt:
    print("interrupted", push.taken, flush=True)
sys.stdin.readline()
optimizer.step()
print(optimizer.last_result.version, optimizer.last_result.contributors, flush=True)
optimizer.close()
"""


@pytest.mark.deep
def test_an_interrupt_while_a_push_waits_for_its_round(
    client: deltaserve.Client, program: Callable[..., Program], eventually: "Eventually"
) -> None:
    """The worker had taken the push over; repeated with the same gradient, it counts once."""
    a = program(ROUND, client.target)
    assert a.line() == "ready"
    model = client.model("m")
    with model.worker("b") as b:
        b.pull()
        a.tell("go")
        eventually(lambda: any(session.waiting for session in model.info().sessions))
        a.process.send_signal(signal.SIGINT)
        assert a.line() == "interrupted True"
        a.tell("again")
        b.step({"0.0": np.full(700_000, 4.0)})
        assert a.line() == "2 2"
        assert a.finish()[0] == 0
        assert model.info().version == 2
    with client.create_model("twin", {"0.0": np.zeros(700_000)}).worker() as twin:
        twin.step({"0.0": np.ones(700_000)})
        np.testing.assert_array_equal(b.weights["0.0"], twin.step({"0.0": np.full(700_000, 3.0)})["0.0"])
    for name in ("m", "twin"):
        client.delete_model(name)


STORM = """
import os, random, signal, sys, threading, time
import torch
from deltaserve.torch import RemoteAdadelta, _overlap

_overlap._MAX_DISCARDED = 1_000_000  # interrupts discard many pushes in a row
over, inside, taken, interrupts = False, False, 0, 0

def interrupt(number, frame):
    global inside
    if inside:
        inside = False
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
torch.manual_seed(0)
net = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(6)])
optimizer = RemoteAdadelta(net.parameters(), sys.argv[1], model="storm", overlap=True, transport="stream")
chance = random.Random(int(sys.argv[2]))

def storm():
    while not over:
        time.sleep(chance.choice([0.003, 0.03, 0.3]) * chance.random() * 2)
        os.kill(os.getpid(), signal.SIGINT)

x = torch.randn(8, 300)
def step(settled=False):
    global taken
    push = optimizer._overlap.push
    optimizer.zero_grad()
    net(x).pow(2).mean().backward()
    while settled and not push.header and not push.over:
        time.sleep(0.01)
    optimizer.step()
    taken += push.taken

step()
thread = threading.Thread(target=storm, daemon=True)
thread.start()
while interrupts < 25 or not taken:
    try:
        inside = True
        step()
        inside = False
    except KeyboardInterrupt:
        interrupts += 1
over = True
thread.join()
before = taken
for _ in range(5):
    step(settled=True)
torch.save([param.detach() for param in net.parameters()], sys.argv[3])
print(interrupts, before, taken - before, optimizer.version)
optimizer.close()
"""


@pytest.mark.deep
@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_storm_of_interrupts(
    seed: str, client: deltaserve.Client, program: Callable[..., Program], tmp_path: Any
) -> None:
    """Wherever they hit, nothing hangs, and training goes on with the weights of the server."""
    storm = program(STORM, client.target, seed, str(tmp_path / "weights"))
    status, output, errors = storm.finish(100)
    assert status == 0, errors
    interrupts, before, after, version = map(int, output.split())
    assert interrupts >= 25
    assert before > 0
    assert after >= 4, "the first of five may have had an earlier push to settle"
    state = client.model("storm").pull_state()
    assert state.version == version
    for index, weight in enumerate(torch.load(tmp_path / "weights", weights_only=True)):
        assert state.weights[f"0.{index}"].tobytes() == weight.numpy().tobytes()
    client.delete_model("storm")


# --- what it leaves behind


def hooked(net: nn.Module) -> int:
    return sum(len(param._post_accumulate_grad_hooks or ()) for param in net.parameters())


def threads() -> int:
    """Returns how many background threads of overlaps wait for work."""
    return sum(frame.f_code is _overlap._work.__code__ for frame in sys._current_frames().values())


def test_nothing_is_left_after_close(make_twins: "MakeTwins", eventually: "Eventually") -> None:
    eventually(lambda: threads() == 0)
    twins = make_twins()
    twins.train(2)
    net, optimizer = twins.nets[0], twins.optimizers[0]
    assert hooked(net) == len(list(net.parameters()))
    eventually(lambda: threads() == 1)
    net(torch.ones(1, 4)).sum().backward()  # begins a push that never ends
    optimizer.close()
    optimizer.close()
    assert hooked(net) == 0
    eventually(lambda: threads() == 0)
    net(torch.ones(1, 4)).sum().backward()


def test_nothing_is_left_of_an_optimizer_that_is_garbage(
    client: deltaserve.Client, model: str, eventually: "Eventually"
) -> None:
    eventually(lambda: threads() == 0)
    net = nn.Linear(600, 600)
    optimizer = RemoteAdadelta(net.parameters(), client.target, model=model, overlap=True, transport="stream")
    for _ in range(2):
        net(torch.ones(1, 600)).sum().backward()
        optimizer.step()
    net(torch.ones(1, 600)).sum().backward()
    gone = weakref.ref(optimizer)
    del optimizer
    eventually(lambda: gc.collect() >= 0 and gone() is None)
    assert hooked(net) == 0
    eventually(lambda: threads() == 0)
    client.delete_model(model)


def test_gradients_are_released(make_twins: "MakeTwins", eventually: "Eventually") -> None:
    twins = make_twins()
    twins.train(2)
    net = twins.nets[0]
    net(torch.ones(1, 4)).sum().backward()
    gradients = [weakref.ref(param.grad) for param in net.parameters()]
    twins.optimizers[0].zero_grad()
    eventually(lambda: all(gradient() is None for gradient in gradients))


def test_a_copy_of_the_module_has_no_hooks(make_twins: "MakeTwins") -> None:
    twins = make_twins()
    twins.train(2)
    copied = copy.deepcopy(twins.nets[0])
    assert hooked(copied) == 0
    copied(torch.ones(1, 4)).sum().backward()
    twins.train(2)
    assert twins.fates[1:] == ["taken"] * 3


FORK = """
import os, sys, time
import torch
from deltaserve.torch import RemoteAdadelta

torch.set_num_threads(1)
net = torch.nn.Linear(600, 600)
optimizer = RemoteAdadelta(net.parameters(), sys.argv[1], model="fork", overlap=True, transport="stream")
for step in range(4):
    optimizer.zero_grad()
    push = optimizer._overlap.push
    net(torch.ones(1, 600)).sum().backward()
    while not push.header and not push.over:
        time.sleep(0.01)
    if step == 2:
        child = os.fork()
        if not child:
            queued = optimizer._overlap._jobs.qsize()
            net(torch.ones(1, 600)).sum().backward()
            os._exit(optimizer._overlap._jobs.qsize() - queued)
        assert os.waitpid(child, 0)[1] == 0
    optimizer.step()
    print(push.taken, flush=True)
optimizer.close()
"""


@pytest.mark.deep
def test_a_forked_child_queues_nothing(client: deltaserve.Client) -> None:
    command = [sys.executable, "-c", FORK, client.target]
    forked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (forked.returncode, forked.stdout.split()) == (0, ["False", "True", "True", "True"]), forked.stderr
    assert client.model("fork").info().version == 4
    client.delete_model("fork")
