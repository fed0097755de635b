"""The table of errors in the Python client: exception, reason, metadata, and an unchanged model."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from reused_server import ReusedServers
from wire import Wire, eventually, unchanged

import deltaserve
from deltaserve import (
    Adadelta,
    Adam,
    Async,
    Bounded,
    Client,
    ConflictError,
    Error,
    Model,
    Optimizer,
    RequestError,
    ServerError,
    SessionError,
    StaleGradientError,
    Sync,
    UnavailableError,
    Worker,
)
from deltaserve_server import ServerConfig
from deltaserve_server.memory.host import HostStore

SIZE = 10_000
CONFIG = ServerConfig(
    bind="127.0.0.1:0", device="cpu", memory_bytes=400_000, staged_bytes=60_000, models=3, sessions=4, watchers=1
)
ZEROS = np.zeros(3, np.float32)
ONES, ONE = np.ones(2, np.float32), np.ones((), np.float32)


@dataclass
class Stage:
    """A server with an asynchronous model "m" (w [2], b []), and a worker that has made one step."""

    client: Client
    wire: Wire
    model: Model
    worker: Worker
    stack: ExitStack
    monkeypatch: pytest.MonkeyPatch
    threads: ThreadPoolExecutor

    def worker_of(self, name: str, policy: deltaserve.Async | Bounded | Sync | None = None, size: int = 3) -> Worker:
        """Creates another model and returns a worker of it."""
        model = self.client.create_model(name, {"w": np.zeros(size, np.float32)}, policy=policy)
        return self.stack.enter_context(model.worker("first"))

    def another(self, model: str, worker: str) -> Worker:
        """Returns another worker."""
        return self.stack.enter_context(self.client.model(model).worker(worker))

    def push_that_waits(self, worker: Worker, gradient: ArrayLike, own: Optimizer | None = None) -> None:
        """Starts a step in another thread, whose result is ignored."""
        arrays = {"w": np.asarray(gradient, np.float32)}
        self.threads.submit(worker.step, arrays, hyperparameters=[own] if own else None)
        name = next(model.name for model in self.client.models() if model.name != "m")
        eventually(lambda: bool(self.wire.waiting(name)), "the push does not wait")


@pytest.fixture
def stage(reused_servers: ReusedServers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with (
        reused_servers.serving(CONFIG) as server,
        Wire(server.target) as wire,
        deltaserve.connect(server.target, timeout_seconds=20) as client,
        ThreadPoolExecutor() as threads,
        ExitStack() as stack,
    ):
        model = client.create_model("m", {"w": np.zeros(2, np.float32), "b": np.float32(0)})
        with model.worker("a") as worker:
            worker.step({"w": ONES, "b": ONE})  # which may have to wait for the kernels
            yield Stage(client, wire, model, worker, stack, monkeypatch, threads)


Provoke = Callable[[Stage], Callable[[], object]]
CASES: dict[str, tuple[type[Error], dict[str, str], Provoke]] = {}


def case(kind: type[Error], **metadata: str) -> Callable[[Provoke], Provoke]:
    """Adds a case. Its reason is the name of the function."""

    def add(provoke: Provoke) -> Provoke:
        CASES[provoke.__name__.upper()] = kind, metadata, provoke
        return provoke

    return add


@case(RequestError, field="name")
def name_invalid(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.create_model("../m", {"w": ZEROS})


@case(RequestError, tensor="w", shape="1x1x1x1x1x1x1x1x3")
def shape_invalid(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.create_model("n", {"w": np.zeros((1,) * 8 + (3,), np.float32)})


@case(RequestError, field="rho", allowed="in [0, 1]")
def hyperparameter_invalid(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.create_model("n", {"w": ZEROS}, optimizer=Adadelta(rho=1.5))


@case(RequestError, field="policy.sync.min_workers")
def policy_invalid(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.create_model("n", {"w": ZEROS}, policy=Sync(min_workers=0))


@case(RequestError, tensor="w", index="1")
def value_not_finite(stage: Stage) -> Callable[[], object]:
    return lambda: stage.worker.step({"w": np.array([1, np.nan], np.float32), "b": ONE})


@case(RequestError, tensor="b", index="0")
def value_too_large(stage: Stage) -> Callable[[], object]:
    return lambda: stage.worker.step({"w": ONES, "b": np.full((), 1e30, np.float32)})


@case(RequestError, model="other")
def model_not_found(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.model("other")


@case(ConflictError, model="m", difference="lr of group 0 is 1.0, not 0.5")
def model_mismatch(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.create_model("m", {"w": np.zeros(2), "b": np.zeros(())}, optimizer=Adadelta(lr=0.5))


@case(ConflictError, model="m", expected="adadelta", got="adam with amsgrad")
def optimizer_mismatch(stage: Stage) -> Callable[[], object]:
    return lambda: stage.worker.step({"w": ONES, "b": ONE}, hyperparameters=[Adam(amsgrad=True)])


@case(SessionError)
def session_unknown(stage: Stage) -> Callable[[], object]:
    stage.worker.close()
    return lambda: stage.worker.step({"w": ONES, "b": ONE})


@case(SessionError, worker="a", epoch="1", current="2")
def session_fenced(stage: Stage) -> Callable[[], object]:
    stage.another("m", "a")
    return lambda: stage.worker.step({"w": ONES, "b": ONE})


@case(ConflictError, field="groups[0].lr", round="0.5", got="0.25")
def hyperparameter_conflict(stage: Stage) -> Callable[[], object]:
    first = stage.worker_of("s", Sync())
    second = stage.another("s", "second")
    second.pull()
    stage.push_that_waits(first, ZEROS + 1, Adadelta(lr=0.5))
    return lambda: second.step({"w": ZEROS + 1}, hyperparameters=[Adadelta(lr=0.25)])


@case(UnavailableError, needed=str(24 * 100_000))
def memory_budget(stage: Stage) -> Callable[[], object]:
    return lambda: stage.client.create_model("n", {"w": np.zeros(100_000, np.float32)})


@case(UnavailableError, limit="4")
def session_limit(stage: Stage) -> Callable[[], object]:
    for number in range(3):
        stage.another("m", f"w{number}")
    return lambda: stage.model.worker("late")


@case(UnavailableError, limit="3")
def model_limit(stage: Stage) -> Callable[[], object]:
    for name in ("n", "o"):
        stage.client.create_model(name, {"w": ZEROS})
    return lambda: stage.client.create_model("p", {"w": ZEROS})


@case(UnavailableError, limit="1")
def watcher_limit(stage: Stage) -> Callable[[], object]:
    watched: Any = stage.model.watch()
    next(stage.stack.enter_context(closing(watched)))
    return lambda: next(stage.model.watch())


@case(RequestError, field="weight", allowed="1e-09 to 1e+09")
def push_invalid(stage: Stage) -> Callable[[], object]:
    return lambda: stage.worker.step({"w": ONES, "b": ONE}, weight=0.0)


@case(StaleGradientError, base="0", current="1")
def round_closed(stage: Stage) -> Callable[[], object]:
    first = stage.worker_of("s", Sync(quorum=1))
    second = stage.another("s", "second")
    second.pull()
    first.step({"w": ZEROS + 1})
    return lambda: second.step({"w": ZEROS + 1})


@case(StaleGradientError, base="0", current="2", bound="1")
def stale_base(stage: Stage) -> Callable[[], object]:
    first = stage.worker_of("s", Async(max_staleness=1))
    second = stage.another("s", "second")
    second.pull()
    for _ in range(2):
        first.step({"w": ZEROS + 1})
    return lambda: second.step({"w": ZEROS + 1})


@case(UnavailableError, got="1", need="2")
def round_failed(stage: Stage) -> Callable[[], object]:
    worker = stage.worker_of("s", Sync(min_workers=2, round_timeout_seconds=0.1))
    return lambda: worker.step({"w": ZEROS + 1})


@case(UnavailableError, ahead="1", slack="0")
def slack_exceeded(stage: Stage) -> Callable[[], object]:
    """A worker sends its next push although the answer to the last one is withheld."""
    quick = stage.worker_of("s", Bounded())
    stage.another("s", "slow")
    quick.pull()
    stage.client._connection.timeout_seconds = 0.5
    while quick._session.last_sent == 0 or quick.get_push().state != "applied":
        with pytest.raises(UnavailableError, match="did not answer"):
            quick.step({"w": ZEROS + 1})
    quick._session.sequence += 1
    return lambda: quick.step({"w": ZEROS + 2})


@case(ServerError)
def internal(stage: Stage) -> Callable[[], object]:
    def fault(*_: object) -> None:
        raise ZeroDivisionError

    worker = stage.worker_of("broken")
    worker.pull()
    with stage.monkeypatch.context() as patch:
        patch.setattr(HostStore, "update", fault)
        with pytest.raises(ServerError):
            worker.step({"w": ZEROS + 1})
    return worker.pull


@pytest.mark.parametrize("reason", CASES)
def test_a_refusal_raises_the_exception_of_the_table(reason: str, stage: Stage) -> None:
    kind, metadata, provoke = CASES[reason]
    call = provoke(stage)
    stage.client._connection.timeout_seconds = 1.8  # for those that may pass, which are tried again after a second
    with unchanged(stage.wire, "m"), pytest.raises(Error) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.reason == reason
    assert caught.value.metadata == caught.value.metadata | metadata
    assert str(caught.value).isprintable()
