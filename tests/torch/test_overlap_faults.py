"""`overlap=True` when things go wrong while a push is on its way before its time; and what it leaves behind."""

import copy
import functools
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
from deltaserve.torch import RemoteAdadelta

if TYPE_CHECKING:
    from tests.torch.conftest import Eventually, Remote, Twins

    MakeTwins = Callable[..., Twins]


@pytest.fixture
def proxy(target: str) -> Iterator[Proxy]:
    line = Proxy(target)
    yield line
    line.close()


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def start(source: str, *arguments: str) -> Program:
        made.append(Program(source, *arguments))
        return made[-1]

    yield start
    for each in made:
        each.kill()


class Behind:
    """An optimizer that overlaps, of a model of two layers, behind a line that can be cut; and its twin without."""

    def __init__(self, make_twins: "MakeTwins", proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[str] = []
        monkeypatch.setattr("deltaserve._transport.overlapped.failpoint", self.sent.append)
        self.twins = make_twins(line=proxy.target)
        self.net, self.optimizer = self.twins.nets[0], self.twins.optimizers[0]
        self.twins.train(2)
        self.sent.clear()


@pytest.fixture
def behind(make_twins: "MakeTwins", proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Behind:
    return Behind(make_twins, proxy, monkeypatch)


def test_a_connection_that_is_cut_during_backward(behind: Behind, proxy: Proxy, eventually: "Eventually") -> None:
    """Half of the push had been sent; `step` sends all of it anew."""

    def cut() -> None:
        if len(behind.twins.fates) == 2:
            eventually(lambda: len(behind.sent) >= 5)
            proxy.cut()

    behind.net.half_way = cut
    behind.twins.train(3)
    assert proxy.cuts == 1
    assert behind.twins.fates[3:] == ["taken", "taken"]


@pytest.mark.parametrize("bytes_down", [1, 100, 700, 1500])
def test_a_connection_that_is_cut_while_the_answer_comes(behind: Behind, proxy: Proxy, bytes_down: int) -> None:
    def cut(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if behind.optimizer.version == 2:
            proxy.cut_after("down", bytes_down)

    behind.optimizer.register_step_pre_hook(cut)
    behind.twins.train(3)
    assert proxy.cuts == 1
    assert behind.optimizer.version == 5, "each push counted once"


def test_an_answer_that_is_lost(behind: Behind, proxy: Proxy, target: str, eventually: "Eventually") -> None:
    """The server has the push, and knows it again when it comes a second time."""
    duplicates = []

    def cut() -> None:
        with deltaserve.connect(target, timeout_seconds=20) as client:
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


def errors_after_a_kill(overlap: bool, again: bool) -> list[str]:
    """Returns what steps raise after the server was killed in the middle of a backward pass."""
    server, net, errors = ServerProcess(), Deep(), []
    try:
        options: dict[str, Any] = {"overlap": overlap, "transport": "stream", "timeout_seconds": 20}
        with RemoteAdadelta(net.parameters(), server.target, model="m", **options) as optimizer:

            def kill() -> None:
                net.half_way = lambda: None
                server.kill()
                if again:
                    server.start()
                else:  # nobody is to be waited for
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


@pytest.mark.parametrize("again", [True, False], ids=["started again", "gone"])
def test_a_server_that_is_killed_during_backward(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are those that there are without overlap."""
    stream_all(monkeypatch)
    expected = ["StateLostError" if again else "UnavailableError"] * 2
    assert errors_after_a_kill(True, again) == errors_after_a_kill(False, again) == expected


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


def test_an_interrupt_while_the_round_is_waited_for(
    target: str, program: Callable[..., Program], eventually: "Eventually"
) -> None:
    """The push had been taken over; made again with the same gradient, it counts once."""
    with deltaserve.connect(target, timeout_seconds=30) as client:
        a = program(ROUND, target)
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

_overlap._PATIENCE = 1_000_000  # what it would give up for are the interrupts
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


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_storm_of_interrupts(seed: str, target: str, program: Callable[..., Program], tmp_path: Any) -> None:
    """Wherever they come, nothing hangs, and afterwards it goes on as before with the weights of the server."""
    storm = program(STORM, target, seed, str(tmp_path / "weights"))
    status, said, errors = storm.finish(100)
    assert status == 0, errors
    interrupts, before, after, version = map(int, said.split())
    assert interrupts >= 25
    assert before > 0
    assert after >= 4, "the first may have had the push before to settle"
    with deltaserve.connect(target) as client:
        state = client.model("storm").pull_state()
        assert state.version == version
        weights = torch.load(tmp_path / "weights", weights_only=True)
        for index, weight in enumerate(weights):
            assert state.weights[f"0.{index}"].tobytes() == weight.numpy().tobytes()
        client.delete_model("storm")


# --- what it leaves behind


def hooked(net: nn.Module) -> int:
    return sum(len(param._post_accumulate_grad_hooks or ()) for param in net.parameters())


def threads() -> int:
    return sum(thread.name.startswith("overlap of") for thread in threading.enumerate())


def test_nothing_is_left_after_close(make_twins: "MakeTwins", eventually: "Eventually") -> None:
    before = threads()
    twins = make_twins()
    twins.train(2)
    net, optimizer = twins.nets[0], twins.optimizers[0]
    assert hooked(net) == len(list(net.parameters()))
    assert threads() == before + 1
    net(torch.ones(1, 4)).sum().backward()  # begins a push that never ends
    optimizer.close()
    optimizer.close()
    assert hooked(net) == 0
    eventually(lambda: threads() == before)
    net(torch.ones(1, 4)).sum().backward()


def test_nothing_is_left_of_an_optimizer_that_is_garbage(target: str, eventually: "Eventually") -> None:
    before, net = threads(), nn.Linear(600, 600)
    optimizer = RemoteAdadelta(net.parameters(), target, model="garbage", overlap=True, transport="stream")
    for _ in range(2):
        net(torch.ones(1, 600)).sum().backward()
        optimizer.step()
    net(torch.ones(1, 600)).sum().backward()
    gone = weakref.ref(optimizer)
    del optimizer
    eventually(lambda: gc.collect() >= 0 and gone() is None)
    assert hooked(net) == 0
    eventually(lambda: threads() == before)
    with deltaserve.connect(target) as client:
        client.delete_model("garbage")


def test_gradients_are_let_go_of(make_twins: "MakeTwins", eventually: "Eventually") -> None:
    twins = make_twins()
    twins.train(2)
    net = twins.nets[0]
    net(torch.ones(1, 4)).sum().backward()
    gradients = [weakref.ref(param.grad) for param in net.parameters()]
    twins.optimizers[0].zero_grad()
    eventually(lambda: all(gradient() is None for gradient in gradients))


def test_a_copy_of_the_module_has_no_part_in_it(make_twins: "MakeTwins") -> None:
    twins = make_twins()
    twins.train(2)
    copied = copy.deepcopy(twins.nets[0])
    assert hooked(copied) == 0
    copied(torch.ones(1, 4)).sum().backward()
    twins.train(2)
    assert twins.fates[1:] == ["taken"] * 3


def test_two_optimizers_of_one_network(make_twins: "MakeTwins", plain_remote: "Remote") -> None:
    """One of all parameters; and one more of a part of them, on another model, which never makes a step."""
    twins = make_twins()
    other = plain_remote(twins.nets[0].above.parameters(), overlap=True, transport="stream")
    twins.train(4)
    assert twins.fates[1:] == ["taken"] * 3
    assert other.version == 0


def test_two_halves_of_a_network(plain_remote: "Remote", monkeypatch: pytest.MonkeyPatch) -> None:
    stream_all(monkeypatch)
    nets = Deep(), Deep()
    optimizers = [
        [plain_remote(part.parameters(), overlap=overlap, transport="stream") for part in (net.above, net.below)]
        for net, overlap in zip(nets, (True, False), strict=True)
    ]
    for step in range(6):
        for net, halves in zip(nets, optimizers, strict=True):
            net.zero_grad()
            net(batch(step)).pow(2).mean().backward()
            for half in halves:
                half.step()
        for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(one, two)


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


def test_a_forked_child_hands_nothing_over(target: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, target], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True", "True", "True"]), done.stderr
    with deltaserve.connect(target) as client:
        assert client.model("fork").info().version == 4
        client.delete_model("fork")


# --- where it does not go


def test_local_steps_have_no_gradient_to_push(target: str) -> None:
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="overlap: a local_optimizer's steps make what is pushed"):
        RemoteAdadelta([torch.zeros(1)], target, model="m", overlap=True, local_steps=2, local_optimizer=sgd)


def test_a_small_model_travels_in_one_message(plain_remote: "Remote") -> None:
    """Which is quicker than to begin early."""
    net = nn.Linear(4, 4)
    optimizer = plain_remote(net.parameters(), overlap=True)
    assert optimizer._overlap
    for _ in range(3):
        push = optimizer._overlap.push
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert push.header is None
